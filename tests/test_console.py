"""Text for terminals and pipes."""

from __future__ import annotations

import sys

import pytest

from gemma_edge.runtime.console import for_stdout, without_controls


def test_controls_are_left_out_and_letters_of_any_script_kept() -> None:
    assert (
        without_controls("a\x1b[2J\r\nb\t\x9b\N{REPLACEMENT CHARACTER}東")
        == "a[2J\nb\t\N{REPLACEMENT CHARACTER}東"
    )


@pytest.mark.parametrize(("terminal", "got"), [(True, "a[2J"), (False, "a\x1b[2J")])
def test_a_pipe_gets_every_character(monkeypatch: pytest.MonkeyPatch, terminal: bool, got: str) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    assert for_stdout("a\x1b[2J") == got
