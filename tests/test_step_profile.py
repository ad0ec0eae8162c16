"""The parts of a decode step, in both engines, as a table, as a record, and refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemma_edge.benchmarks.measure.step_profile import (
    ATTENTION,
    BETWEEN,
    DECODER,
    ELEMENTWISE,
    FLOATS,
    HEAD,
    QUANTIZED,
    ROWS,
    SAMPLING,
    StepProfile,
    profile_steps,
)
from gemma_edge.benchmarks.output.plots import render_plots
from gemma_edge.benchmarks.records.results_file import read_records
from gemma_edge.cli.main import main
from gemma_edge.runtime.errors import UsageError

PARTS = {ATTENTION, BETWEEN, DECODER, ELEMENTWISE, FLOATS, HEAD, QUANTIZED, ROWS, SAMPLING}


@pytest.mark.parametrize("form", ["onnx", "tflite"])
def test_every_part_of_every_step_has_a_time(form: str, gate_bundles: dict[str, Path]) -> None:
    found = profile_steps(gate_bundles[form], steps=3, depth=5, threads=1)
    assert set(found.parts) == PARTS
    assert {len(times) for times in found.parts.values()} == {3}
    # What surely takes a microsecond, with random weights, too.
    for part in (HEAD, QUANTIZED, SAMPLING, ROWS):
        assert min(found.parts[part]) > 0
    parts = found.parts_ms
    assert list(parts.values()) == sorted(parts.values(), reverse=True)
    assert f"{sum(parts.values()):.2f}" in found.lines()[-1]


def test_the_quickest_tenth_counts() -> None:
    quick, slow = (0.001, 0.002), (0.5, 0.1)
    times = zip(*[quick, *[slow] * 9, *[slow] * 9, quick], strict=True)
    found = StepProfile("engine", 1, 64, 0, dict(zip((HEAD, ROWS), times, strict=True)))
    assert found.parts_ms == pytest.approx({ROWS: 2, HEAD: 1})
    assert list(found.parts_ms) == [ROWS, HEAD]


def test_the_command_prints_and_records_it(
    gate_bundles: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "profile.jsonl"
    argv = ["bench", str(gate_bundles["onnx"]), "--profile", "-n", "2", "-t", "1"]
    assert main([*argv, "--record", str(record), "--name", "small"]) == 0
    assert HEAD in capsys.readouterr().out
    title, svg = render_plots(read_records(record))["profile.svg"]
    assert title == "Where a decode step goes"
    assert "small, ONNX Runtime" in svg


@pytest.mark.parametrize("option", [["-n", "0"], ["-n", "2,3"], ["--device", "ssh://nowhere"]])
def test_what_cannot_be_profiled_is_refused(
    option: list[str], gate_bundles: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(gate_bundles["onnx"]), "--profile", *option]) == 2
    assert "--profile" in capsys.readouterr().err


def test_more_tokens_than_the_context_has(gate_bundles: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="do not fit the context"):
        profile_steps(gate_bundles["onnx"], steps=10**6)
