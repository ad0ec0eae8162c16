"""The verbs that take files: attachments of `run` and `chat`, `transcribe`, `translate`, `describe`."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_edge.cli import chat as chat_repl
from gemma_edge.cli import main as cli
from gemma_edge.cli.variables import MODEL
from gemma_edge.runtime.errors import GemmaEdgeError
from gemma_edge.runtime.media import attachments
from gemma_edge.runtime.media.attachments import Attachment, Reader
from gemma_edge.runtime.media.encoder_pool import Encoded
from gemma_edge.runtime.model import Model
from gemma_edge.runtime.prompt.tokenizer import Tokenizer
from gemma_edge.runtime.sampling import Sampling
from support.audio_clips import write_wav
from support.rule_decoder import Array, IdTable, RowDecoder
from support.stub_modalities import IMAGE_TOKENS, modalities
from support.tiny_tokenizer import END_OF_TURN, EOS, write_tokenizer

NAMES = ("start_of_image", "start_of_audio", "end_of_image", "image_soft_token", "end_of_audio")
SPEECH = np.random.default_rng(0).uniform(-0.3, 0.3, 16_000).astype(np.float32)


class Encoding:
    """In the place of `Encoders`: rows that tell what was seen, and a report."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.report: Callable[[Encoded], None] = lambda encoded: None

    def encode(self, items: Sequence[Attachment], cancelled: Any = None) -> dict[int, Array]:
        for item in items:
            self.names.append(Path(item.name).name)
            self.report(Encoded(item, 0.25))
        return {item.key: np.full((item.soft_tokens, 1), 1000, np.float32) for item in items}

    def needed_bytes(self, items: Sequence[Attachment]) -> int:
        return 0


@pytest.fixture
def encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Encoding:
    """`Model.load` gives a model that says how many soft tokens it was fed since it last answered."""
    path = write_tokenizer(tmp_path / "tokenizer.model")
    first = Tokenizer(path).n_pieces
    ids = {name: first + i for i, name in enumerate(("boi", "boa", "eoi", "image", "eoa", "audio"))}
    added = {f"<{name}>": first + i for i, name in enumerate((*NAMES, "audio_soft_token"))}
    tokenizer, encoding = Tokenizer(path, added), Encoding()
    header = tokenizer.encode("<start_of_turn>model\n", bos=False)

    def rule(fed: list[int]) -> int:
        starts = [n for n in range(len(fed)) if fed[n : n + len(header)] == header]
        if not starts:
            return EOS  # within the prompt, where nobody asks
        said = fed[starts[-1] + len(header) :]
        turn = fed[starts[-2] if len(starts) > 1 else 0 : starts[-1]]
        script = [*tokenizer.encode(f"heard {sum(i >= 1000 for i in turn)}", bos=False), END_OF_TURN]
        return script[min(len(said), len(script) - 1)]

    def load(path: str, **options: Any) -> Model:
        encoding.report = lambda encoded: options["log"](str(encoded))
        every = modalities(ids, audio_tokens=6)
        return Model(
            RowDecoder(rule, context=options["context"] or 400, vocab_size=first + 6),
            IdTable(),
            IdTable(),
            tokenizer,
            sampling=Sampling(temperature=0.0),
            end_ids=[EOS, END_OF_TURN],
            reader=Reader(every, context=400, bundle=path, note=options["log"]),
            encoders=encoding,  # type: ignore[arg-type]
        )

    monkeypatch.setattr(Model, "load", load)
    monkeypatch.setattr(Reader, "clip_seconds", lambda self: 2.0)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    monkeypatch.delenv(MODEL, raising=False)
    return encoding


@pytest.fixture
def note(tmp_path: Path) -> str:
    return str(write_wav(tmp_path / "note.wav", SPEECH))


@pytest.fixture
def long(tmp_path: Path) -> str:
    """Speech, 3 s of silence, and speech."""
    silence = np.zeros(48_000, np.float32)
    return str(write_wav(tmp_path / "long.wav", np.concatenate([SPEECH, silence, SPEECH])))


@pytest.fixture
def photo(tmp_path: Path) -> str:
    pil = pytest.importorskip("PIL.Image")
    pil.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def run(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> tuple[str, str]:
    """stdout and stderr of a command that must end with `code`."""
    ended = cli.main(list(argv))
    out, err = capsys.readouterr()
    assert ended == code, err
    return out, err


# Attachments of run and chat. ---------------------------------------------------------------------


def test_run_attaches_files_before_the_text(
    encoding: Encoding, photo: str, note: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = run(capsys, "run", "b", "-a", photo, "what is it", "--attach", note, "-u")
    assert out == f"heard {IMAGE_TOKENS + 6}\n" and encoding.names == ["photo.png", "note.wav"]
    assert f"image {photo}: 4 tokens, 0.2 s" in err and f"audio {note}: 6 tokens" in err
    assert "10 soft tokens encoded in " in err


def test_run_takes_a_spoken_question(
    encoding: Encoding, note: str, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = json.loads(run(capsys, "run", "b", "-a", note, "--json")[0])
    assert (answer["text"], answer["usage"]["soft_tokens"]) == ("heard 6", 6)
    assert answer["usage"]["encode_s"] >= 0


def test_a_bad_attachment_is_refused_before_the_bundle_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    (tmp_path / "notes.txt").write_text("text")
    for name, message in (("notes.txt", "an image, a recording or a video"), ("absent.png", "no such file")):
        out, err = run(capsys, "run", "absent_bundle", "x", "-a", str(tmp_path / name), code=3)
        assert out == "" and f"{name}: file: expected" in err and message in err


def test_a_prompt_with_attachments_that_does_not_fit_says_why(
    encoding: Encoding, note: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, err = run(capsys, "run", "b", "hi", "-a", note, "--context", "20", code=2)
    assert "context of 20" in err and f"({note} takes 6 tokens)" in err and encoding.names == []


def test_chat_attaches_files_to_the_next_turn(
    encoding: Encoding,
    photo: str,
    note: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = f"see\nand\n/attach '{note}'\n/attach {photo}\nhear\n/attach {note}\n/reset\nhi\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    out, err = run(capsys, "chat", "b", "-a", photo, "--json")
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["text"] for answer in answers] == ["heard 4", "heard 0", "heard 10", "heard 0"]
    # What is in the KV cache is not encoded again.
    assert encoding.names == ["photo.png", "note.wav", "photo.png"]
    assert answers[2]["usage"]["cached_tokens"] > 0 and "next turn" in err


def test_a_file_that_cannot_be_attached_ends_a_pipe_and_not_a_talk(
    encoding: Encoding, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("/attach absent.png\nhi\n"))
    out, err = run(capsys, "chat", "b", code=3)
    assert out == "" and "absent.png: file" in err
    lines = iter(["/attach absent.png", "/attach", "hi", None])
    model = Model.load("b", log=lambda text: None, context=None)
    chat_repl.chat(chat_repl.Conversation(model), lambda: next(lines), interactive=True)
    out, err = capsys.readouterr()
    assert out == "heard 0\n" and "error: absent.png" in err and "no command /attach" in err


# Which bundle. ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "words", "expected"),
    [
        (None, ["b", "hi"], ("b", ["hi"])),
        (None, ["-m", "b", "hi"], ("b", ["hi"])),
        (None, ["hi", "-m", "b"], ("b", ["hi"])),
        ("env", ["hi"], ("env", ["hi"])),
        ("env", ["real", "hi"], ("real", ["hi"])),
        ("env", ["-m", "b", "hi"], ("b", ["hi"])),
        ("env", [], ("env", [])),
    ],
)
def test_the_bundle_is_the_first_argument_or_m_or_the_environments(
    environment: str | None,
    words: list[str],
    expected: tuple[str, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import argparse

    from gemma_edge.cli.bundle_options import add_words, take_bundle

    monkeypatch.chdir(tmp_path)
    Path("real").mkdir()
    Path("real", "manifest.json").write_text("{}")
    monkeypatch.setenv(MODEL, environment) if environment else monkeypatch.delenv(MODEL, raising=False)
    parser = argparse.ArgumentParser()
    add_words(parser, "PROMPT", "a prompt")
    assert take_bundle(parser.parse_intermixed_args(words)) == expected


def test_no_bundle_at_all(encoding: Encoding, note: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "with -m BUNDLE, or in $GEMMA_EDGE_MODEL" in run(capsys, "run", code=2)[1]
    assert f"{note} is not a bundle: name one" in run(capsys, "transcribe", note, code=2)[1]
    assert "one prompt" in run(capsys, "run", "b", "two", "prompts", code=2)[1]
    assert "unexpected argument 'hi'" in run(capsys, "chat", "b", "hi", code=2)[1]
    for verb in ("transcribe", "describe"):
        assert "name a" in run(capsys, verb, "b", code=2)[1]


# transcribe, translate, describe ------------------------------------------------------------------


def test_transcribe_writes_a_line_for_each_segment_and_none_for_silence(
    encoding: Encoding, long: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = run(capsys, "transcribe", "b", long, "-u")
    lines = out.splitlines()
    assert len(lines) == 2 and all(line.endswith("] heard 6") for line in lines)
    assert lines[0].startswith("[00:00:00,000 --> 00:00:0") and "00:00:05,000]" in lines[1]
    assert f"{long}: 5.0 s in 3 segments" in err and "times as fast" in err


def test_transcribe_in_other_forms(
    encoding: Encoding, long: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MODEL, "b")
    assert run(capsys, "transcribe", long, "--text")[0] == "heard 6 heard 6\n"
    srt = run(capsys, "transcribe", "--srt", long)[0]
    assert srt.startswith("1\n00:00:00,000 --> ") and "\n\n2\n" in srt and srt.endswith("heard 6\n\n")
    data = json.loads(run(capsys, "transcribe", long, "--json")[0])
    assert data["file"] == long and data["text"] == "heard 6 heard 6" and data["duration_s"] == 5.0
    assert [cue["finish_reason"] for cue in data["segments"]] == ["stop", "silence", "stop"]
    assert all(a["end"] == b["start"] for a, b in zip(data["segments"], data["segments"][1:], strict=False))


def test_a_long_recording_is_encoded_a_few_segments_at_a_time(
    encoding: Encoding, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_wav(tmp_path / "lecture.wav", np.tile(SPEECH, 60))
    out, _ = run(capsys, "transcribe", "b", str(path), "--json")
    data = json.loads(out)
    assert len(data["segments"]) >= 30 and data["segments"][-1]["end"] == 60.0


def test_silence_is_no_transcript(
    encoding: Encoding, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_wav(tmp_path / "silence.wav", np.zeros(40_000, np.float32))
    out, err = run(capsys, "transcribe", "b", str(path))
    assert out == "" and "silence.wav: no speech found" in err and encoding.names == []


def test_translate_asks_for_the_language(
    encoding: Encoding, note: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    generate = Model.generate

    def spy(self: Model, prompt: Any, **options: Any) -> Any:
        asked.append(prompt)
        return generate(self, prompt, **options)

    monkeypatch.setattr(Model, "generate", spy)
    run(capsys, "translate", "b", note, "--to", "Finnish")
    run(capsys, "translate", "b", note)
    run(capsys, "transcribe", "b", note, "--prompt", "write it")
    assert ["Finnish" in asked[0], "English" in asked[1], asked[2]] == [True, True, "write it"]


def test_describe(encoding: Encoding, photo: str, note: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "describe", "b", photo)[0] == "heard 4\n"
    assert run(capsys, "describe", "b", photo, note)[0] == f"{photo}: heard 4\n{note}: heard 6\n"
    data = [json.loads(line) for line in run(capsys, "describe", "b", photo, "--json")[0].splitlines()]
    assert [(d["file"], d["text"]) for d in data] == [(photo, "heard 4")]


@pytest.mark.parametrize("verb", ["transcribe", "translate"])
def test_a_picture_is_no_recording(
    verb: str, encoding: Encoding, photo: str, note: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = run(capsys, verb, "b", note, photo, code=3)
    assert out == "" and "photo.png: file: expected a recording or a video, got an image" in err


def test_a_text_bundle_says_that_it_hears_nothing(
    encoding: Encoding, note: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Model.load

    def text_only(path: str, **options: Any) -> Model:
        model = load(path, **options)
        model.reader = Reader({}, context=400, bundle=path)
        return model

    monkeypatch.setattr(Model, "load", text_only)
    for argv in (["run", "b", "x", "-a", note], ["transcribe", "b", note], ["describe", "b", note]):
        out, err = run(capsys, *argv, code=3)
        assert out == "" and "b: modalities: expected a bundle with an encoder of audio" in err
        assert "--modalities text,audio" in err


def test_a_missing_package_is_named_with_its_remedy(
    encoding: Encoding, photo: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    _, err = run(capsys, "run", "b", "x", "-a", photo, code=2)
    assert 'needs pillow: pip install ".[images]" in a clone' in err
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setattr(attachments, "kind_of", lambda path: "video")
    _, err = run(capsys, "describe", "b", photo, code=2)
    assert "in a clone of gemma-edge" in err


def test_errors_are_gemma_edges_own() -> None:
    assert issubclass(attachments.MediaError, GemmaEdgeError) and attachments.MediaError.exit_code == 3
