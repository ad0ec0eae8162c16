"""`bench --serve`: its judge, its load, and its figures of a real server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemma_edge.benchmarks.output.plots import render_plots
from gemma_edge.benchmarks.records.record import Record
from gemma_edge.benchmarks.records.results_file import json_line, parse_record, read_records
from gemma_edge.benchmarks.serving.load_client import Response
from gemma_edge.benchmarks.serving.load_mix import KnownAnswer
from gemma_edge.benchmarks.serving.serve_bench import TIMES, bench_serve
from gemma_edge.benchmarks.serving.serve_records import serve_records
from gemma_edge.cli.main import main
from support.http_server import serving


def response(text: str, reason: str = "stop", *, status: int = 200) -> Response:
    message = {"content": text}
    return Response(status, [{"choices": [{"message": message, "finish_reason": reason}]}], complete=True)


def test_only_the_known_answer_fits() -> None:
    known = KnownAnswer({}, "five", "stop", ())
    assert known.fits(response("five"))
    for other in (response("six"), response("five", "length"), response("five", status=500), response("")):
        assert not known.fits(other)
    streamed = KnownAnswer({"stream": True}, "five", "stop", ())
    events = [{"choices": [{"delta": {"content": piece}, "finish_reason": None}]} for piece in ("fi", "ve")]
    end = {"choices": [{"delta": {}, "finish_reason": "stop"}]}
    assert streamed.fits(Response(200, [*events, end], complete=True))
    assert streamed.fits(Response(200, events[:1])) and not streamed.fits(Response(200, events[1:]))
    assert not streamed.fits(Response(200, [events[0], end], complete=True))


def test_a_load_is_answered(pocket_bundles: dict[str, Path]) -> None:
    figures = bench_serve(pocket_bundles["onnx"], requests=120, clients=8, pairs=2, tokens=8)
    assert figures.lost == 0 and figures.wrong == {}
    assert sum(figures.sent.values()) == 120 and len(figures.sent) >= 5
    assert len(figures.rss_anon) == len(figures.descriptors) == 1 and figures.growth == 0
    assert figures.serve_ttft_ms > 0 and figures.library_token_ms > 0
    json.dumps(figures.to_dict())
    assert {name: len(values) for name, values in figures.times_ms.items()} == dict.fromkeys(TIMES, 2)
    compared, load = serve_records(pocket_bundles["onnx"], "Pocket", figures, clients=8, threads=1)
    assert compared.raw == figures.times_ms and load.metrics["lost"] == 0
    assert [row.bar for row in (*compared.readme, *load.readme)] == [
        "<= 5 ms", "<= 2 %", "0 lost, 0 wrong", "< 1 %"
    ]  # fmt: skip
    assert parse_record(json.loads(json_line(load))) == load


def test_two_servers_race(
    pocket_bundles: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(pocket_bundles["tflite"]) as other:
        command = ["bench", str(pocket_bundles["onnx"]), "--serve", "--peer-port", str(other.port)]
        command += ["--peer-name", "tflite", "--record", str(tmp_path / "r.jsonl")]
        assert main([*command, "--rounds", "1", "--tokens", "4"]) == 0
    ours, peer = capsys.readouterr().out.splitlines()
    assert ours.startswith("| gemma-edge | first token") and peer.startswith("| tflite |")
    (record,) = read_records(tmp_path / "r.jsonl")
    assert isinstance(record, Record) and list(render_plots([record])) == [
        "serve-ttft.svg",
        "serve-total.svg",
    ]
    assert [row.row.partition(": ")[2] for row in record.readme] == [
        "first token against tflite", "total time against tflite"
    ]  # fmt: skip


def test_bad_options(pocket_bundles: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(pocket_bundles["onnx"]), "--serve", "--clients", "0"]) == 2
    assert main(["bench", str(pocket_bundles["onnx"]), "--serve", "--device", "ssh://x"]) == 2
    assert "--serve" in capsys.readouterr().err
