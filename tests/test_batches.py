"""Batches: answers in any order of work, files that survive a kill, lines that are wrong."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_edge.cli import main as cli
from gemma_edge.export.exporter import export_bundle
from gemma_edge.runtime.answers import Completion
from gemma_edge.runtime.batches.answers_file import AnswersFile
from gemma_edge.runtime.batches.batch import BatchRequest, _branches, batch_answers, generate_batch
from gemma_edge.runtime.batches.batch_run import run_batch
from gemma_edge.runtime.batches.prompts_file import MAX_LINE_BYTES, read_prompts
from gemma_edge.runtime.errors import FileError, GemmaEdgeError, UsageError
from gemma_edge.runtime.model import Model
from support.processes import wait_for
from support.rule_decoder import RuleDecoder, hash_rule, tiny_model
from support.small_disk import small_disk
from support.tiny_tokenizer import tiny_tokenizer

COMMAND = [sys.executable, "-m", "gemma_edge.cli.main"]
SHORT = {"max_tokens": 6}


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return tiny_model(tiny_tokenizer(tmp_path), hash_rule, context=256)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    lines = [
        '"the sea"',
        '{"prompt": "the sun", "id": "sun", "max_tokens": 3}',
        "",
        '{"prompt": 7, "id": "seven"}',
        '{"messages": [{"role": "user", "content": "the sea and the sun"}], "id": 5}',
        '"' + "e" * 400 + '"',
    ]
    return write(tmp_path / "prompts.jsonl", *lines)


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def texts(path: Path) -> dict[int, str]:
    """What each line was answered, without times."""
    return {answer["line"]: answer.get("text") or answer["error"]["message"] for answer in read(path)}


# In memory. ---------------------------------------------------------------------------------------


def test_answers_come_in_the_order_of_the_prompts_and_are_the_models(model: Model) -> None:
    asked = ["the sun", "a hat", "the sea", "the sea and the sun", "a hat"]
    answers = generate_batch(model, asked, **SHORT)  # type: ignore[arg-type]
    alone = [tiny_model(model.tokenizer, hash_rule).generate(prompt, **SHORT).text for prompt in asked]  # type: ignore[call-overload]
    assert [answer.text for answer in answers if isinstance(answer, Completion)] == alone


def test_prompts_that_begin_alike_follow_each_other(model: Model) -> None:
    asked = ["the b", "a", "the a", "a b", "the"]
    order = [answer.index for answer in batch_answers(model, asked, {"max_tokens": 1})]
    said = [asked[index] for index in order]
    groups = [text.split()[0] for text in said]
    assert groups in (["a"] * 2 + ["the"] * 3, ["the"] * 3 + ["a"] * 2)


def test_a_shared_prefix_is_computed_once(model: Model) -> None:
    chapters = ["the sea " * 12 + chapter * 70 for chapter in "nrt"]
    asked = [f"{chapter}{letter}" for letter in "acf" for chapter in chapters]
    model = tiny_model(model.tokenizer, hash_rule, context=512, chunk=64)
    decoder = model.decoder
    assert isinstance(decoder, RuleDecoder)
    answers = generate_batch(model, asked, max_tokens=1)
    usages = [answer.usage for answer in answers if isinstance(answer, Completion)]
    fed = sum(usage.prompt_tokens - usage.cached_tokens for usage in usages)
    assert fed == sum(decoder.calls)
    # The beginning once, each chapter once, and the rest of each prompt.
    beginning = len(model.prompt_ids("the sea " * 12))
    assert fed <= beginning + 3 * 70 + 9 * 12
    assert sum(usage.prompt_tokens for usage in usages) > 2 * fed


@given(st.lists(st.lists(st.integers(0, 2), max_size=6)))
def test_branches_are_where_later_prompts_differ(keys: list[list[int]]) -> None:
    keys.sort()
    for number, branches in enumerate(_branches(keys)):
        pairs = [zip(keys[number], other, strict=False) for other in keys[number + 1 :]]
        shared = {sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both)) for both in pairs}
        assert set(branches) == shared


def test_a_prompt_that_cannot_be_answered_is_an_error_in_its_place(model: Model) -> None:
    odd, long = BatchRequest("hi", {"top_p": 7}), BatchRequest("hi", SHORT)
    asked = ["the sea", "e" * 400, [{"role": "nobody"}], odd, long]
    answers = generate_batch(model, asked, max_tokens=2)  # type: ignore[arg-type]
    assert [type(answer) for answer in answers] == [
        Completion,
        UsageError,
        UsageError,
        UsageError,
        Completion,
    ]
    last = answers[-1]
    assert isinstance(last, Completion) and last.usage.completion_tokens == 6


def test_a_model_that_is_broken_ends_the_batch(model: Model) -> None:
    assert isinstance(model.decoder, RuleDecoder)
    model.decoder.broken = True
    with pytest.raises(GemmaEdgeError, match="nan"):
        generate_batch(model, ["hi"])


def test_an_option_that_does_not_exist_is_a_mistake_of_the_program(model: Model) -> None:
    with pytest.raises(TypeError, match="nonsense"):
        generate_batch(model, ["hi"], nonsense=1)  # type: ignore[call-arg]


# Files of prompts. --------------------------------------------------------------------------------


def test_a_line_is_a_text_or_an_object(prompts: Path) -> None:
    lines = list(read_prompts(prompts))
    assert [(line.number, line.id) for line in lines] == [
        (1, None),
        (2, "sun"),
        (4, "seven"),
        (5, 5),
        (6, None),
    ]
    assert lines[0].request == BatchRequest("the sea")
    assert lines[1].request == BatchRequest("the sun", {"max_tokens": 3})
    assert lines[2].request is None and "prompt must be a text" in str(lines[2].error)


def test_files_are_named_relative_to_the_batch(tmp_path: Path) -> None:
    path = write(
        tmp_path / "b.jsonl",
        '{"prompt": "x", "attach": ["a.png", "/b.wav"]}',
        json.dumps({"messages": [{"role": "user", "content": [{"type": "image", "path": "c.png"}]}]}),
    )
    first, second = (line.request for line in read_prompts(path))
    assert first and first.options["attach"] == [str(tmp_path / "a.png"), "/b.wav"]
    assert second and second.prompt[0]["content"][0]["path"] == str(tmp_path / "c.png")  # type: ignore[index]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "expected JSON, got Expecting property name"),
        ("[1]", "expected a JSON object with prompt or messages, or a text"),
        ("7", "expected a JSON object"),
        ("{}", "expected either prompt or messages"),
        ('{"prompt": "a", "messages": []}', "expected either prompt or messages"),
        ('{"messages": "a"}', "prompt must be a text, and messages a list"),
        ('{"prompt": "a", "max_token": 3}', "there is no option 'max_token': did you mean 'max_tokens'?"),
        ('{"prompt": "a", "guard": 3}', "there is no option 'guard'"),
        ('{"prompt": "a", "id": 1.5}', "id must be a text or an integer"),
        ('{"prompt": "a", "max_tokens": "3"}', "max_tokens must be an integer"),
        ('{"prompt": "a", "attach": "x.png"}', "attach must be a list of files"),
        ('{"prompt": "a", "stop": [1]}', "stop must be a text or a list of texts"),
        ('{"prompt": "a", "system": 1}', "system must be a text"),
        ('{"prompt": "a", "raw": 1}', "raw must be true or false"),
        ("[" * 100_000, "brackets within brackets"),
        ("1" * 5000, "expected JSON, got"),
        ('"' + "a" * MAX_LINE_BYTES + '"', "longer than 4,194,304 bytes"),
        ('{"prompt": "\\ud800"}', "not valid Unicode"),
    ],
)
def test_a_wrong_line_is_an_error_and_the_next_is_answered(
    model: Model, tmp_path: Path, line: str, message: str
) -> None:
    path = write(tmp_path / "prompts.jsonl", line, '"the sea"')
    run_batch(model, path, tmp_path / "answers.jsonl", max_tokens=2)
    answers = {answer["line"]: answer for answer in read(tmp_path / "answers.jsonl")}
    assert message in answers[1]["error"]["message"] and answers[1]["error"]["type"] == "UsageError"
    assert answers[2]["text"]


def test_bytes_that_are_no_text_are_an_error_of_their_line(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'"caf\xe9"\n"the sea"')  # and no newline at the end
    totals = run_batch(model, path, tmp_path / "answers.jsonl", max_tokens=2)
    assert (totals.answers, totals.errors) == (1, 1)
    assert "expected UTF-8" in texts(tmp_path / "answers.jsonl")[1]


# Files of answers. --------------------------------------------------------------------------------


def test_a_batch_goes_on_where_it_stopped(model: Model, prompts: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    totals = run_batch(model, prompts, whole, max_tokens=6)
    assert (totals.answers, totals.errors) == (3, 2)
    assert totals.completion_tokens == 6 + 3 + 6
    lines = whole.read_bytes().splitlines(keepends=True)
    assert len(lines) == 5
    for cut in range(0, len(whole.read_bytes()), 97):
        parts.write_bytes(whole.read_bytes()[:cut])
        decoder = model.decoder
        assert isinstance(decoder, RuleDecoder)
        decoder.calls.clear()
        kept = [line for line in lines[: parts.read_bytes().count(b"\n")] if b'"error"' not in line]
        assert run_batch(model, prompts, parts, max_tokens=6) == totals
        assert texts(parts) == texts(whole) and len(read(parts)) == 5
        assert parts.read_bytes().startswith(b"".join(kept))
        if len(kept) == 3:
            assert decoder.calls == []
        assert sorted(tmp_path.glob(".*")) == []


def test_a_mended_line_is_asked_again(model: Model, tmp_path: Path) -> None:
    path, answers = write(tmp_path / "p.jsonl", '"the sea"', '{"promt": "x"}'), tmp_path / "a.jsonl"
    run_batch(model, path, answers, max_tokens=2)
    write(path, '"the sea"', '{"prompt": "x"}')
    totals = run_batch(model, path, answers, max_tokens=2)
    assert (totals.answers, totals.errors) == (2, 0)
    assert [answer["line"] for answer in read(answers)] == [1, 2]


@pytest.mark.parametrize("change", ["prompt", "option", "fewer"])
def test_answers_to_other_prompts_are_not_taken_for_these(model: Model, tmp_path: Path, change: str) -> None:
    path, answers = write(tmp_path / "p.jsonl", '"the sea"', '"the sun"'), tmp_path / "a.jsonl"
    run_batch(model, path, answers, max_tokens=2)
    before = answers.read_bytes()
    if change == "prompt":
        write(path, '"the sea"', '"a hat"')
    elif change == "fewer":
        write(path, '"the sea"')
    with pytest.raises(FileError, match=r"a\.jsonl: the answer to line [12]: .*Name another file"):
        run_batch(model, path, answers, max_tokens=3 if change == "option" else 2)
    assert answers.read_bytes() == before


@pytest.mark.parametrize(
    "text",
    [
        "notes of mine",
        "notes\n",
        '{"line": 1}\n',
        '{"line": 1.5, "key": "a"}\n',
        '{"line": -1, "key": "a"}\n{"line"',
        "[]\n",
    ],
)
def test_a_file_of_something_else_is_left_alone(
    model: Model, prompts: Path, tmp_path: Path, text: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(FileError, match="Name another file for the answers"):
        run_batch(model, prompts, path)
    assert path.read_text() == text


def test_what_is_no_file_is_refused(model: Model, prompts: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="regular file"):
        run_batch(model, prompts, tmp_path / "pipe")
    with pytest.raises(UsageError, match="folder"):
        run_batch(model, prompts, tmp_path)
    with pytest.raises(FileError, match="a device or a pipe"):
        run_batch(model, tmp_path / "pipe", tmp_path / "a.jsonl")
    with pytest.raises(FileError, match="no such file"):
        run_batch(model, tmp_path / "nothing", tmp_path / "a.jsonl")


def test_two_processes_do_not_write_one_file(model: Model, prompts: Path, tmp_path: Path) -> None:
    with (
        AnswersFile(tmp_path / "a.jsonl"),
        pytest.raises(UsageError, match="another process writes answers into it"),
    ):
        run_batch(model, prompts, tmp_path / "a.jsonl")
    assert run_batch(model, prompts, tmp_path / "a.jsonl", max_tokens=2).answers == 3


def test_the_prompts_are_not_taken_for_a_file_of_answers(model: Model, prompts: Path) -> None:
    before = prompts.read_bytes()
    with pytest.raises(FileError, match="Name another file"):
        run_batch(model, prompts, prompts)
    assert prompts.read_bytes() == before


def test_a_disk_that_is_full_is_named_and_the_batch_goes_on_later(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Model, "load", lambda path, **options: model)
    lines = [json.dumps({"prompt": f"the sea {n}", "id": "x" * 200_000}) for n in range(8)]
    path = write(tmp_path / "p.jsonl", *lines)
    with small_disk(tmp_path / "disk", 1) as disk:
        argv = ["run", "b", "--batch", str(path), "-o", str(disk / "a.jsonl"), "--max-tokens", "2"]
        assert cli.main(argv) == 1
        assert "the disk is full: " in (err := capsys.readouterr().err) and "a.jsonl" in err
        torn = (disk / "a.jsonl").read_bytes()
        assert 2 <= torn.count(b"\n") <= 5
        (tmp_path / "a.jsonl").write_bytes(torn)
    totals = run_batch(model, path, tmp_path / "a.jsonl", max_tokens=2)
    assert totals.answers == 8 and len(read(tmp_path / "a.jsonl")) == 8


def test_a_lone_surrogate_in_an_id_is_written(model: Model, tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", '{"prompt": "the sea", "id": "\\ud800"}')
    run_batch(model, path, tmp_path / "a.jsonl", max_tokens=2)
    assert read(tmp_path / "a.jsonl")[0]["id"] == "\ud800"


# The command. -------------------------------------------------------------------------------------


@pytest.fixture
def command(model: Model, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    monkeypatch.setattr(Model, "load", lambda path, **options: model)
    return monkeypatch


def test_run_answers_a_batch(
    command: pytest.MonkeyPatch, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["run", "b", "--batch", str(prompts), "-o", str(tmp_path / "a.jsonl"), "--max-tokens", "6"]
    assert cli.main([*argv, "--logprobs", "1"]) == 2  # the exit code of the first error
    out, err = capsys.readouterr()
    assert out == "" and "3 of 5 prompts answered" in err
    assert "error: line 4: prompt must be a text" in err and "line 6" in err
    assert [bool(answer.get("logprobs")) for answer in read(tmp_path / "a.jsonl")].count(True) == 3
    assert cli.main([*argv, "--logprobs", "1"]) == 2
    assert "3 of 5 prompts are answered; going on" in capsys.readouterr().err
    assert cli.main(argv) == 3
    assert "Name another file" in capsys.readouterr().err


def test_without_a_file_answers_go_to_stdout(
    command: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "p.jsonl", '"the sea"', '"the sun"')
    assert cli.main(["run", "b", "--batch", str(path), "--max-tokens", "6"]) == 0
    out = capsys.readouterr().out
    assert sorted(json.loads(line)["line"] for line in out.splitlines()) == [1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["hi", "--batch", "p.jsonl"], "unexpected argument 'hi'"),
        (["--batch", "p.jsonl", "--show-prompt"], "--show-prompt shows one prompt"),
        (["hi", "-o", "a.jsonl"], "it goes with --batch"),
        (["--batch", "empty.jsonl"], "expected a prompt, got none"),
        (["--batch", "nothing.jsonl"], "no such file"),
    ],
)
def test_what_does_not_go_together_is_named(
    command: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    command.chdir(tmp_path)
    write(tmp_path / "p.jsonl", '"the sea"')
    write(tmp_path / "empty.jsonl", "", " ")
    assert cli.main(["run", "b", *options]) in (2, 3)
    assert message in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(
    command: pytest.MonkeyPatch,
    model: Model,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    decoder = model.decoder
    assert isinstance(decoder, RuleDecoder)
    calls = iter(range(100))

    def rule(ids: list[int]) -> int:
        if next(calls) == 6:
            signal.raise_signal(signal.SIGINT)
        return hash_rule(ids)

    decoder.rule = rule
    argv = ["run", "b", "--batch", str(prompts), "-o", str(tmp_path / "a.jsonl"), "--max-tokens", "3"]
    assert cli.main(argv) == 130
    err = capsys.readouterr().err
    assert "1 of 5 prompts are answered; the same command goes on there" in err
    decoder.rule = hash_rule
    assert cli.main(argv) == 2
    assert len(read(tmp_path / "a.jsonl")) == 5


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "tflite"])
def test_a_killed_batch_goes_on(tiny_checkpoint: Path, tmp_path: Path, form: str) -> None:
    options: dict[str, Any] = {"recipe": "int8", "context": 256, "chunk": 64, "verify": False}
    bundle = export_bundle(tiny_checkpoint, tmp_path / "bundle", format=form, **options).path
    prompts = write(
        tmp_path / "p.jsonl",
        *(json.dumps({"prompt": f"the long road, mile {number}", "id": number}) for number in range(8)),
    )
    killed, whole = tmp_path / "killed.jsonl", tmp_path / "whole.jsonl"
    argv = [*COMMAND, "run", str(bundle), "--batch", str(prompts), "--max-tokens", "40", "--temperature", "0"]
    argv += ["--threads", "1", "-o"]
    process = subprocess.Popen([*argv, str(killed)], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def answered() -> int:
        return killed.read_bytes().count(b"\n") if killed.exists() else 0

    wait_for(lambda: answered() >= 2 or process.poll() is not None, "no answers")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert answered() >= 2
    before = killed.read_bytes()
    before = before[: before.rfind(b"\n") + 1]
    for file in (killed, whole):
        done = subprocess.run([*argv, str(file)], stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert killed.read_bytes().startswith(before)
    answers = read(killed)
    assert sorted(answer["id"] for answer in answers) == list(range(8))
    assert sorted(answer["id"] for answer in read(whole)) == list(range(8))
