"""Images and audio measured: encoders in a session and for the table, and a whole answer under a limit."""

import csv
import io
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gemma_edge.benchmarks.measure import answer_phases, session
from gemma_edge.benchmarks.measure.bars import Bars
from gemma_edge.benchmarks.measure.ceiling_verdict import judge_ceiling, with_encoders
from gemma_edge.benchmarks.measure.target import Outcome
from gemma_edge.benchmarks.measure.workload import Workload
from gemma_edge.benchmarks.output.report import render_page
from gemma_edge.benchmarks.output.result_text import render
from gemma_edge.benchmarks.output.table import render_table
from gemma_edge.benchmarks.records.measurement import EncoderRun
from gemma_edge.benchmarks.records.record import CeilingRecord, Head, Record
from gemma_edge.benchmarks.records.results_file import parse_record, read_records
from gemma_edge.benchmarks.records.run_report import MemoryReport, RunReport
from gemma_edge.cli.main import main
from gemma_edge.devices.machine.cgroup import mechanism
from gemma_edge.devices.machine.child import ChildRun
from gemma_edge.devices.machine.memory import MemorySample, PeakMemory
from gemma_edge.export.exporter import export_bundle
from gemma_edge.runtime.errors import DeviceError, UsageError
from gemma_edge.runtime.files.typed_json import to_json
from support.multimodal_conversation import write_checkpoint
from support.results import read_rows

limited = pytest.mark.skipif(mechanism().name == "none", reason=f"no kernel limit: {mechanism().reason}")
MB = 2**20
Json = dict[str, Any]
SMALL = ["-p", "16", "-n", "4", "-r", "2", "-t", "1", "--requests", "0", "--bandwidth", "0s", "--no-cold"]
RUN = EncoderRun("audio", 0, 30.0, 188, 2.0, 1.0, (9 * 10**9, 10 * 10**9, 12 * 10**9), 510_000_000, 7, 8)


def typed(rows: list[Json]) -> list[Head]:
    return [parse_record(row) for row in rows]


@pytest.fixture(autouse=True)
def _no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking whether the machine is busy takes a second."""
    monkeypatch.setattr(session, "busy_cores", lambda: None)


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
    return read_rows(path)


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
    assert Bars(audio_ms=10_000.0).judge(None, [], [RUN])[0].met


def test_encoders_are_in_every_output(rows: list[Json]) -> None:
    table = list(csv.DictReader(io.StringIO(render(typed(rows), "csv"))))
    assert [row["test"] for row in table] == ["image 64x64", "audio 30 s", "pp16", "tg4"]
    assert float(table[1]["real_time"]) > 0 and table[1]["avg_ts"] == ""
    audio = next(line for line in render(typed(rows), "md").splitlines() if "| audio 30 s |" in line)
    assert "x real time" in audio and "MiB" in audio
    page = render_page(typed(rows))
    assert "Images and audio" in page and "image 64x64" in page and "The longest clip" in page


def test_they_can_be_left_out(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.jsonl"
    assert main(["bench", str(bundle), *SMALL, "--no-encode", "-o", str(path)]) == 0
    assert [row["kind"] for row in read_rows(path)] == ["bench", "bench", "session"]
    assert main(["bench", str(bundle), *SMALL, "--no-encode", "--assert-image-ms", "9"]) == 2
    assert "--assert-image-ms needs a bundle with an encoder of vision" in capsys.readouterr().err


def test_a_bundle_for_text_has_none(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.jsonl"
    assert main(["bench", str(tiny_bundle), *SMALL, "-o", str(path)]) == 0
    assert "encode" not in {row["kind"] for row in read_rows(path)}
    assert main(["bench", str(tiny_bundle), *SMALL, "--answer", "--image", "1"]) == 2
    assert "--image needs a bundle with an encoder of vision" in capsys.readouterr().err


@limited
def test_they_run_under_the_same_ceiling(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    argv = ["bench", str(bundle), *SMALL, "--ceiling", "600MiB", "--control", "12MiB", "-o", str(path)]
    assert main(argv) == 0
    image, audio, *_, last = read_rows(path)
    assert image["limit_bytes"] == audio["limit_bytes"] == 600 * MB
    assert last["ceiling"]["met"] and "; encoders: peak RssAnon" in last["ceiling"]["text"]


def test_encoders_that_do_not_fit_exceed_the_ceiling() -> None:
    peak = PeakMemory(rss_anon=60, rss=60, high_water=60)
    decoder = Outcome(RunReport(memory=MemoryReport(MemorySample(60, 0), peak)))
    fits = judge_ceiling(100, decoder, None, 50, "no permission")
    assert fits.met
    small, large = (RunReport(encode=(replace(RUN, peak_rss_anon=size),)) for size in (90, 110))
    assert with_encoders(fits, Outcome(small)).met
    sampled = with_encoders(fits, Outcome(large))
    assert not sampled.met and sampled.text.startswith("exceeded by the encoders: ")
    killed = with_encoders(fits, Outcome(None, "cgroup-v1", 100, killed=True))
    assert not killed.met and killed.enforced and "while encoding images and audio" in killed.text


@pytest.mark.parametrize("damage", [{"samples_ns": []}, {"samples_ns": [0]}, {"load_s": None}])
def test_a_report_without_times_is_an_error(damage: Json) -> None:
    def parse(run: Json) -> RunReport:
        stdout = json.dumps({"schema": 1, "tests": [], "encode": [run]})
        return ChildRun(0, stdout, "", 1.0, PeakMemory()).parse(RunReport, "encoding")

    assert parse(to_json(RUN)).encode == (RUN,)
    with pytest.raises(DeviceError, match="no report"):
        parse({**to_json(RUN), **damage})


# For the tables ---------------------------------------------------------------------------------------


def test_the_tables_rows_come_from_a_record(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    argv = ["bench", str(bundle), *SMALL, "--name", "tiny int8", "--target", "vision=<= 1 s"]
    assert main([*argv, "--record", str(path), "-o", "csv"]) == 0
    encoders, compared = read_records(path)
    assert isinstance(encoders, Record) and encoders.kind == "encoders" and compared.kind == "compare"
    assert len(encoders.raw["encode"][0]["samples_ns"]) == 2
    image, audio = (row for row in render_table([encoders]).splitlines() if "encode" in row)
    assert image.startswith("| tiny int8: encode one 64x64 image, 1 thread | <= 1 s | ")
    assert audio.startswith("| tiny int8: encode 30 s of audio, 1 thread | faster than real time | ")
    assert "x real time), peak RssAnon " in audio


# One answer, under a limit ----------------------------------------------------------------------------

PHASES = ["tables and tokenizer", "read", "image encode", "audio encode", "decoder load", "prefill", "decode"]


@pytest.fixture
def small_photo(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("PIL")
    monkeypatch.setattr(answer_phases, "PHOTO", (90, 120))


@limited
def test_an_answer_about_a_photo_and_a_recording_is_proved_phase_by_phase(
    bundle: Path, tmp_path: Path, small_photo: None
) -> None:
    path, records = tmp_path / "r.jsonl", tmp_path / "records.jsonl"
    argv = ["bench", str(bundle), *SMALL, "--no-encode", "--context", "512", "-p", "300", "--answer"]
    argv += ["--ceiling", "600MiB", "--control", "24MiB", "--name", "tiny", "--record", str(records)]
    assert main([*argv, "-o", str(path)]) == 0
    answer = read_rows(path)[-1]["answer"]
    assert [phase["name"] for phase in answer["phases"]] == PHASES
    assert all(phase["peak"]["rss_anon"] > MB and phase["seconds"] > 0 for phase in answer["phases"])
    prefill, decode = answer["tests"]
    assert 300 <= prefill["n_prompt"] <= 320
    assert (decode["n_gen"], decode["n_depth"]) == (4, prefill["n_prompt"])
    assert answer["ceiling"]["enforced"] and answer["ceiling"]["control_killed"]
    _, _, record = read_records(records)
    assert isinstance(record, CeilingRecord) and record.raw.run.kernel is not None
    assert record.raw.run.kernel.soft_tokens == 16 + 188
    peaks = [phase["peak"]["rss_anon"] for phase in answer["phases"]]
    assert record.metrics["peak_rss_anon_bytes"] == max(peaks)
    assert record.metrics["audio_encode_peak_rss_anon_bytes"] == peaks[3]
    assert (record.metrics["images"], record.metrics["clips"]) == (1, 1)
    (row,) = record.readme
    what = "1 image and 30 s of audio, prefill at least 300, decode 4, context 512"
    assert row.row == f"tiny: {what} under a kernel limit of 600 MiB"
    assert "audio encode " in row.value and "tokenizer" not in row.value
    assert row.value.endswith("; control killed")


def test_an_answer_that_does_not_fit_the_context_is_refused(
    bundle: Path, tmp_path: Path, small_photo: None
) -> None:
    files = answer_phases.write_media(tmp_path, 1, 1)
    workload = Workload((250,), (20,), threads=1, context=256, attach=tuple(map(str, files)))
    with pytest.raises(UsageError, match="do not fit a context of 256"):
        answer_phases.measure_answer(bundle, workload)


@pytest.mark.parametrize("flags", [["--image", "-1"], ["--audio", "17"], ["--image", "0", "--audio", "0"]])
def test_a_number_of_attachments_that_cannot_be(flags: list[str], bundle: Path) -> None:
    assert main(["bench", str(bundle), "--answer", *flags]) == 2
