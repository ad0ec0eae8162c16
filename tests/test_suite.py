"""The fast selection keeps its promise: it has tests of every file that is not slow as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import SLOW_FILES, WITHOUT_FAST


def test_every_file_but_the_slow_ones_has_a_fast_test(pytestconfig: pytest.Config) -> None:
    if pytestconfig.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        pytest.skip("only some files were collected")
    assert pytestconfig.stash[WITHOUT_FAST] <= SLOW_FILES


def test_slow_files_exist() -> None:
    assert {path.stem for path in Path(__file__).parent.rglob("test_*.py")} >= SLOW_FILES
