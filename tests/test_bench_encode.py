"""Images and audio measured: encoders in a session and for the table, and a whole answer under a limit."""

import csv
import io
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from gemma_edge.benchmarks import ceiling, encode
from gemma_edge.benchmarks.machine.cgroup import mechanism
from gemma_edge.benchmarks.machine.child import ChildRun
from gemma_edge.benchmarks.machine.memory import PeakMemory
from gemma_edge.benchmarks.measure import answer_phases as answer
from gemma_edge.benchmarks.measure import session
from gemma_edge.benchmarks.measure.encoder_times import EncoderRun
from gemma_edge.benchmarks.measure.session import Bars
from gemma_edge.benchmarks.measure.target import Outcome, judge_ceiling, with_encoders
from gemma_edge.benchmarks.measure.worker import parse_worker_report
from gemma_edge.benchmarks.options import KernelOptions
from gemma_edge.benchmarks.output.report import render_page
from gemma_edge.benchmarks.output.table import render_table
from gemma_edge.benchmarks.records.record import read_records
from gemma_edge.benchmarks.records.rows import render
from gemma_edge.benchmarks.script import run_script
from gemma_edge.cli.main import main
from gemma_edge.export.exporter import export_bundle
from gemma_edge.runtime.errors import DeviceError, UsageError
from support.multimodal_conversation import write_checkpoint

limited = pytest.mark.skipif(mechanism().name == "none", reason=f"no kernel limit: {mechanism().reason}")
MB = 2**20
Json = dict[str, Any]
SMALL = ["-p", "16", "-n", "4", "-r", "2", "-t", "1", "--requests", "0", "--bandwidth", "0s", "--no-cold"]
RUN = EncoderRun("audio", 0, 30.0, 188, 2.0, 1.0, (9 * 10**9, 10 * 10**9, 12 * 10**9), 510_000_000, 7, 8)


@pytest.fixture(autouse=True)
def _no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking whether the machine is busy takes a second."""
    for module in (session, encode):
        monkeypatch.setattr(module, "busy_cores", lambda: None)


@pytest.fixture(scope="module", params=["onnx", "tflite"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    out = folder / request.param
    checkpoint = write_checkpoint(folder / "ckpt")
    recipe = "int8" if request.param == "onnx" else "int4_channelwise"
    return export_bundle(
        checkpoint, out, recipe=recipe, context=1024, chunk=64, verify=False, format=request.param
    ).path


@pytest.fixture(scope="module")
def rows(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Json]:
    """The rows of a session with everything about encoders."""
    path = tmp_path_factory.mktemp("results") / "r.jsonl"
    argv = ["bench", str(bundle), *SMALL, "--assert-image-ms", "1e6", "--assert-audio-ms", "0.001"]
    assert main([*argv, "-o", str(path), "--name", "tiny"]) == 5
    return read_records(path)


# In a session -----------------------------------------------------------------------------------------


def test_each_encoder_is_a_row_with_its_samples_and_its_memory(rows: list[Json]) -> None:
    image, audio = (row for row in rows if row["kind"] == "encode")
    assert (image["test"], image["soft_tokens"], image["encoder"]) == ("image 64x64", 16, "vision")
    assert (audio["test"], audio["soft_tokens"], audio["encoder"]) == ("audio 30 s", 188, "audio")
    for row in (image, audio):
        assert row["run"] == rows[-1]["run"] and row["n_threads"] == 1 and row["name"] == "tiny"
        assert len(row["samples_ns"]) == 2 and min(row["samples_ns"]) > 0
        assert row["median_ns"] == pytest.approx(statistics.median(row["samples_ns"]), abs=1)
        assert row["load_s"] > 0 and row["first_load_s"] > 0
        assert row["peak_rss"] > row["peak_rss_anon"] > 10 * MB and row["peak_rss_file"] > MB
        assert row["limit_bytes"] is None
    assert image["real_time"] is None
    assert audio["real_time"] == pytest.approx(30e9 / audio["median_ns"], rel=0.01)
    assert audio["peak_rss_anon"] > image["peak_rss_anon"], "30 s are more than 64 x 64 pixels"


def test_bars_judge_encoders_by_their_medians(rows: list[Json]) -> None:
    judged = {bar["what"]: bar["met"] for bar in rows[-1]["bars"]}
    assert judged == {"vision encoder, ms": True, "audio encoder, ms": False}
    assert ["audio encoder" in problem for problem in rows[-1]["problems"]] == [True]
    assert Bars(audio_ms=10_000.0).judge(None, [], [RUN.to_dict()])[0]["met"]


def test_encoders_are_in_every_output(rows: list[Json]) -> None:
    table = list(csv.DictReader(io.StringIO(render(rows, "csv"))))
    assert [row["test"] for row in table] == ["image 64x64", "audio 30 s", "pp16", "tg4"]
    assert float(table[1]["real_time"]) > 0 and table[1]["avg_ts"] == ""
    audio = next(line for line in render(rows, "md").splitlines() if "| audio 30 s |" in line)
    assert "x real time" in audio and "MiB" in audio
    page = render_page(rows)
    assert "Images and audio" in page and "image 64x64" in page and "The longest clip" in page


def test_they_can_be_left_out(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.jsonl"
    assert main(["bench", str(bundle), *SMALL, "--no-encode", "-o", str(path)]) == 0
    assert [row["kind"] for row in read_records(path)] == ["bench", "bench", "session"]
    assert main(["bench", str(bundle), *SMALL, "--no-encode", "--assert-image-ms", "9"]) == 2
    assert "--assert-image-ms needs a bundle with an encoder of vision" in capsys.readouterr().err


def test_a_bundle_for_text_has_none(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.jsonl"
    assert main(["bench", str(tiny_bundle), *SMALL, "-o", str(path)]) == 0
    assert "encode" not in {row["kind"] for row in read_records(path)}
    assert run_script(lambda: encode.main([str(tiny_bundle)])) == 2
    assert "has no encoders: export the checkpoint with --modalities" in capsys.readouterr().err


@limited
def test_they_run_under_the_same_ceiling(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    argv = ["bench", str(bundle), *SMALL, "--ceiling", "600MiB", "--control", "12MiB", "-o", str(path)]
    assert main(argv) == 0
    image, audio, *_, last = read_records(path)
    assert image["limit_bytes"] == audio["limit_bytes"] == 600 * MB
    assert last["ceiling"]["met"] and "; encoders: peak RssAnon" in last["ceiling"]["text"]


def test_encoders_that_do_not_fit_exceed_the_ceiling() -> None:
    peak = {"rss_anon": 60, "rss": 60, "high_water": 60}
    decoder = Outcome({"memory": {"peak": peak}}, None, None)
    fits = judge_ceiling(100, decoder, None, 50, "no permission")
    assert fits.met
    small, large = ({"encode": [{"peak_rss_anon": size}]} for size in (90, 110))
    assert with_encoders(fits, Outcome(small, None, None)).met
    sampled = with_encoders(fits, Outcome(large, None, None))
    assert not sampled.met and sampled.text.startswith("exceeded by the encoders: ")
    killed = with_encoders(fits, Outcome(None, "cgroup-v1", 100, killed=True))
    assert not killed.met and killed.enforced and "while encoding images and audio" in killed.text


@pytest.mark.parametrize("damage", [{"samples_ns": []}, {"samples_ns": [0]}, {"load_s": None}])
def test_a_report_without_times_is_an_error(damage: Json) -> None:
    def stdout(run: Json) -> str:
        return json.dumps({"schema": 1, "tests": [], "encode": [run]})

    good = ChildRun(0, stdout(RUN.to_dict()), "", 1.0, PeakMemory())
    assert EncoderRun.from_dict(parse_worker_report(good)["encode"][0]) == RUN
    with pytest.raises(DeviceError, match="no report"):
        parse_worker_report(ChildRun(0, stdout({**RUN.to_dict(), **damage}), "", 1.0, PeakMemory()))


# For the table ----------------------------------------------------------------------------------------


def test_the_tables_rows_come_from_a_record(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.jsonl"
    argv = [
        str(bundle),
        "-r",
        "2",
        "-t",
        "1",
        "--name",
        "tiny int8",
        "--image-bar",
        "<= 1 s",
        "-o",
        str(path),
    ]
    assert run_script(lambda: encode.main(argv)) == 0
    assert "audio 30 s: " in capsys.readouterr().out
    (record,) = read_records(path)
    assert record["kind"] == "encoders" and record["metrics"]["audio_s"] > 0
    assert len(record["raw"]["encode"][0]["samples_ns"]) == 2
    image, audio = (row for row in render_table([record]).splitlines() if "encode" in row)
    assert image.startswith("| tiny int8: encode one 64x64 image, 1 thread | <= 1 s | ")
    assert audio.startswith("| tiny int8: encode 30 s of audio, 1 thread | faster than real time | ")
    assert "x real time), peak RssAnon " in audio


def test_a_row_says_time_speed_and_memory() -> None:
    row = encode.encode_readme_row("E2B", RUN, 2, "faster than real time")
    assert row["row"] == "E2B: encode 30 s of audio, 2 threads"
    assert row["value"] == "10.0 s (3.0x real time), peak RssAnon 510 MB"


# One answer, under a limit ----------------------------------------------------------------------------

PHASES = ["tables and tokenizer", "read", "image encode", "audio encode", "decoder load", "prefill", "decode"]


@pytest.fixture
def small_photo(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("PIL")
    monkeypatch.setattr(answer, "PHOTO", (90, 120))


@limited
def test_an_answer_about_a_photo_and_a_recording_is_proved_phase_by_phase(
    bundle: Path, tmp_path: Path, small_photo: None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.jsonl"
    argv = [
        str(bundle),
        "--image",
        "1",
        "--audio",
        "1",
        "-p",
        "300",
        "-n",
        "4",
        "-t",
        "1",
        "--context",
        "512",
    ]
    argv += ["--limit", "600MiB", "--control", "24MiB", "--name", "tiny", "-o", str(path)]
    assert run_script(lambda: ceiling.main(argv)) == 0
    assert "image encode" in capsys.readouterr().err
    (record,) = read_records(path)
    report = record["raw"]["run"]["kernel"]
    assert [phase["name"] for phase in report["phases"]] == PHASES
    assert all(phase["peak"]["rss_anon"] > MB and phase["seconds"] > 0 for phase in report["phases"])
    assert report["soft_tokens"] == 16 + 188
    prefill, decode = report["tests"]
    assert 300 <= prefill["n_prompt"] <= 320 and (decode["n_gen"], decode["n_depth"]) == (
        4,
        prefill["n_prompt"],
    )
    peaks = [phase["peak"]["rss_anon"] for phase in report["phases"]]
    assert record["metrics"]["peak_rss_anon_bytes"] == max(peaks)
    assert record["metrics"]["audio_encode_peak_rss_anon_bytes"] == peaks[3]
    assert record["metrics"]["control_killed"] and (
        record["metrics"]["images"],
        record["metrics"]["clips"],
    ) == (1, 1)
    (row,) = record["readme"]
    what = "1 image and 30 s of audio, prefill at least 300, decode 4, context 512"
    assert row["row"] == f"tiny: {what} under a kernel limit of 600 MiB"
    assert (
        "audio encode " in row["value"]
        and "tokenizer" not in row["value"]
        and row["value"].endswith("; control killed")
    )


def test_an_answer_that_does_not_fit_the_context_is_refused(
    bundle: Path, tmp_path: Path, small_photo: None
) -> None:
    files = answer.write_media(tmp_path, 1, 1)
    with pytest.raises(UsageError, match="do not fit a context of 256"):
        answer.measure(bundle, files, KernelOptions(250, 20, 1, 1, 256))


@pytest.mark.parametrize("flags", [["--image", "-1"], ["--audio", "17"]])
def test_a_number_of_attachments_that_cannot_be(flags: list[str], bundle: Path) -> None:
    assert run_script(lambda: ceiling.main([str(bundle), "--limit", "1GiB", *flags])) == 2
