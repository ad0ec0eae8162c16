"""The command line: verbs, exit codes, pipes, and the verbs `run` and `chat` on a small model."""

from __future__ import annotations

import errno
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

import gemma_edge
from gemma_edge.cli import chat as chat_repl
from gemma_edge.cli import main as cli
from gemma_edge.cli import run as run_verb
from gemma_edge.export.weights.recipe import list_recipes, load_recipe
from gemma_edge.runtime.conversations.conversation import Conversation
from gemma_edge.runtime.errors import BundleError, CeilingError, DeviceError, GemmaEdgeError, ParityError
from gemma_edge.runtime.model import Model
from support.rule_decoder import RuleDecoder, answers, hash_rule, tiny_model
from support.tiny_tokenizer import tiny_tokenizer

COMMAND = [sys.executable, "-m", "gemma_edge.cli.main"]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """What `Model.load` gives, whatever the bundle."""
    tokenizer = tiny_tokenizer(tmp_path)
    made = tiny_model(tokenizer, answers("the first", "the second", "the third", tokenizer=tokenizer))
    monkeypatch.setattr(Model, "load", lambda path, **options: made)
    return made


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    return monkeypatch


def verb(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Makes `run` a verb that raises."""

    def run(args: object) -> int:
        raise error

    module = types.SimpleNamespace(__doc__="A verb.", configure=lambda parser: None, run=run)
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: module)


# The dispatcher. ----------------------------------------------------------------------------------


def test_help_lists_every_verb_and_imports_none() -> None:
    code = "import sys, gemma_edge.cli.main as m; m.main(['--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(f"  {name} " in done.stdout for name in cli.VERBS)
    assert {"numpy", "onnxruntime", "jinja2", "sentencepiece"}.isdisjoint(done.stderr.split())


def test_the_runtime_imports_nothing_heavy() -> None:
    code = "import sys; import gemma_edge.runtime.model, gemma_edge.cli.chat; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "onnx", "onnxruntime", "jinja2", "sentencepiece", "tokenizers"}
    assert heavy.isdisjoint(done.stdout.split())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("gemma-edge ")


def test_no_verb_shows_the_help_as_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "usage: gemma-edge" in err


@pytest.mark.parametrize(
    ("typed", "hint"), [("chta", "did you mean 'chat'"), ("xyzzy", "the verbs are demo")]
)
def test_an_unknown_verb(capsys: pytest.CaptureFixture[str], typed: str, hint: str) -> None:
    assert cli.main([typed]) == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize("name", ["run", "chat"])
def test_a_verbs_help(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert cli.main([name, "--help"]) == 0
    out = capsys.readouterr().out
    for option in (
        "--system",
        "--top-k",
        "--repetition-penalty",
        "--stop",
        "--max-tokens",
        "--usage",
        "--json",
    ):
        assert option in out


@pytest.mark.parametrize("argv", [["run"], ["run", "b", "--top-k", "x"], ["run", "b", "--nonsense"]])
def test_malformed_arguments(argv: list[str]) -> None:
    assert cli.main(argv) == 2


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (GemmaEdgeError("broken"), 1, "error: broken"),
        (BundleError("b", "f", "x", "y"), 3, "error: b: f: expected x, got y"),
        (DeviceError("no device"), 4, "no device"),
        (CeilingError("too much"), 5, "too much"),
        (ParityError("differs"), 6, "differs"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "no space", "out/ple.bin"), 1, "the disk is full: out/ple.bin"),
        (PermissionError(errno.EACCES, "denied", "out"), 1, "no permission: out"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), 1, "No such file: x"),
        (MemoryError(), 1, "not enough memory"),
        (
            ModuleNotFoundError("No module", name="onnx.helper"),
            2,
            'needs onnx: pip install ".[export]" in a clone',
        ),
        (
            ModuleNotFoundError("No module", name="huggingface_hub"),
            2,
            'huggingface-hub: pip install ".[hub]" in a clone',
        ),
        (ZeroDivisionError("oops"), 1, "internal error: ZeroDivisionError: oops"),
    ],
)
def test_errors_become_messages_and_exit_codes(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    message: str,
) -> None:
    verb(monkeypatch, error)
    assert cli.main(["run"]) == code
    out, err = capsys.readouterr()
    assert out == "" and message in err and "Traceback" not in err


def test_a_traceback_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    verb(monkeypatch, ZeroDivisionError())
    monkeypatch.setenv(cli.TRACEBACK, "1")
    with pytest.raises(ZeroDivisionError):
        cli.main(["run"])


def test_a_missing_bundle(tmp_path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "run", str(tmp_path / "absent"), "hi"], capture_output=True, text=True, input=""
    )
    assert done.returncode == 3
    assert "absent" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="pipes are closed in another way")
def test_a_closed_pipe_is_silent() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*COMMAND, "--help"], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


# run ----------------------------------------------------------------------------------------------


def test_run_streams_the_answer(
    model: Model, stdin: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "b", "hi"]) == 0
    assert capsys.readouterr() == ("the first\n", "")


def test_run_joins_the_prompt_and_stdin() -> None:
    assert run_verb.join_prompt("sum up", "text\n") == "sum up\n\ntext\n"
    assert run_verb.join_prompt(None, "text") == "text"
    assert run_verb.piped_text(io.StringIO(" \n")) is None


def test_run_reads_stdin(model: Model, stdin: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stdin.setattr(sys, "stdin", io.StringIO("hi"))
    assert cli.main(["run", "b", "--json", "-s", "be brief"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["text"], answer["finish_reason"]) == ("the first", "stop")
    assert answer["usage"]["prompt_tokens"] == len(model.prompt_ids("hi", system="be brief"))


def test_run_without_a_prompt(
    model: Model, stdin: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "b"]) == 2
    assert "no prompt" in capsys.readouterr().err


def test_stdin_that_is_not_text(
    model: Model, stdin: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stdin.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    assert cli.main(["run", "b"]) == 2
    assert "stdin is not utf-8 text" in capsys.readouterr().err


def test_run_takes_the_options(
    model: Model, stdin: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "run",
        "b",
        "hi",
        "--stop",
        "zzz",
        "--stop",
        " fir",
        "--max-tokens",
        "30",
        "--top-k",
        "1",
        "--seed",
        "1",
    ]
    assert cli.main([*argv, "-u"]) == 0
    out, err = capsys.readouterr()
    assert out == "the\n"
    assert err.startswith("prompt ") and "tok/s" in err and err.endswith("stop\n")


def test_run_names_an_option_out_of_range(
    model: Model, stdin: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "b", "hi", "--top-p", "7"]) == 2
    assert "top_p must be" in capsys.readouterr().err


def test_run_reports_logprobs_and_takes_biases(
    model: Model, stdin: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["run", "b", "hi", "--json", "--logprobs", "2"]
    assert cli.main([*argv, "--logit-bias", "the=-100", "--logit-bias", "id:5=100"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["text"] == "" and [token["id"] for token in answer["logprobs"]] == [5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--logprobs", "2"], "--logprobs reports within --json"),
        (["--logit-bias", "the"], "--logit-bias must be TOKEN=N, such as yes=5, not 'the'"),
        (["--logit-bias", "the=x"], "must be TOKEN=N"),
        (["--logit-bias", "theeth=1"], "is not one token but"),
    ],
)
def test_run_names_a_bias_or_a_report_that_cannot_be(
    model: Model,
    stdin: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    assert cli.main(["run", "b", "hi", *options]) == 2
    assert message in capsys.readouterr().err


def test_run_shows_the_prompt_and_cuts_a_long_one(
    model: Model, stdin: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "b", "hi", "--show-prompt"]) == 0
    out, err = capsys.readouterr()
    assert out == "the first\n"
    assert err == "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n\n"
    assert cli.main(["run", "b", "e" * 1000]) == 2
    assert "--truncate" in capsys.readouterr().err
    assert cli.main(["run", "b", "a" + "e" * 1000, "--truncate", "end", "--show-prompt"]) == 0
    out, err = capsys.readouterr()
    assert out == "the first\n" and "user\naeeee" in err and len(err) < 600


# chat ---------------------------------------------------------------------------------------------


def chat(monkeypatch: pytest.MonkeyPatch, lines: str, *argv: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    return cli.main(["chat", "b", *argv])


def test_chat_keeps_the_history(
    model: Model, stdin: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(stdin, "hi\n\non\n", "-u") == 0
    out, err = capsys.readouterr()
    assert out == "the first\nthe second\n"
    second = err.splitlines()[1]
    assert "(0 cached)" not in second


def test_chat_commands(model: Model, stdin: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat(stdin, "hi\n/reset\nhi\n/help\n/nonsense\n/quit\nnever\n") == 0
    out, err = capsys.readouterr()
    assert out == "the first\nthe first\n"
    assert "forgotten" in err and "/quit" in err and "no command /nonsense" in err


def test_a_path_is_not_a_command(
    model: Model, stdin: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(stdin, "/etc/hosts is what\n") == 0
    assert capsys.readouterr().out == "the first\n"


def test_chat_json_is_a_line_an_answer(
    model: Model, stdin: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(stdin, "hi\non\n", "--json") == 0
    assert [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()] == [
        "the first",
        "the second",
    ]


def test_a_turn_that_does_not_fit(
    model: Model, stdin: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(stdin, "e" * 1000 + "\nhi\n") == 2
    out, err = capsys.readouterr()
    assert out == "" and "context of 512" in err


def test_at_a_terminal_chat_goes_on_after_an_error(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    lines = iter(["e" * 1000, "hi", None])
    chat_repl.chat(Conversation(model), lambda: next(lines), interactive=True)
    out, err = capsys.readouterr()
    assert out == "the first\n" and "context of 512" in err


def test_ctrl_c_ends_the_answer_and_not_the_chat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model(tiny_tokenizer(tmp_path), hash_rule, context=400)
    decoder = model.decoder
    assert isinstance(decoder, RuleDecoder)

    def rule(ids: list[int]) -> int:
        if len(ids) == 60:
            signal.raise_signal(signal.SIGINT)
        return hash_rule(ids)

    decoder.rule = rule
    conversation = Conversation(model, options={"max_tokens": 200})
    lines = iter(["the", "/help", None])
    handler = signal.getsignal(signal.SIGINT)
    chat_repl.chat(conversation, lambda: next(lines))
    assert signal.getsignal(signal.SIGINT) is handler
    assert decoder.position <= 60
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"]
    assert conversation.messages[1]["content"].strip() == capsys.readouterr().out.strip()


def test_ctrl_c_at_the_prompt(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    lines = iter([KeyboardInterrupt(), None])

    def read() -> str | None:
        line = next(lines)
        if line is not None:
            raise line
        return None

    chat_repl.chat(Conversation(model), read, interactive=True)
    assert "/quit" in capsys.readouterr().err
    lines = iter([KeyboardInterrupt()])
    with pytest.raises(KeyboardInterrupt):
        chat_repl.chat(Conversation(model), read)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_gets_no_control_characters_of_an_answer(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = ["a\x1b", "]0;title\x07b", "\x9b2J\tc\r\x08\x7f", "é\n"]

    class Answer(list[str]):
        completion = types.SimpleNamespace(text="".join(pieces), tool_calls=[])

    read, write = os.openpty() if terminal else os.pipe()
    with open(write, "w", encoding="utf-8", newline="") as out:
        monkeypatch.setattr(sys, "stdout", out)
        run_verb.print_answer(Answer(pieces))  # type: ignore[arg-type]
        got = b""
        while not got.endswith(b"\n"):
            got += os.read(read, 4096)
    os.close(read)
    assert got.decode() == (
        "a]0;titleb2J\tcé\r\n" if terminal else "".join(pieces)
    )  # a terminal writes \n as \r\n


# What every verb shares. --------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [["version"], ["--version"], ["-V"]])
def test_the_version_in_every_spelling(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 0
    assert capsys.readouterr().out == f"gemma-edge {gemma_edge.__version__}\n"


def test_help_of_a_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["help", "run"]) == 0
    asked = capsys.readouterr().out
    assert cli.main(["run", "--help"]) == 0
    assert capsys.readouterr().out == asked and "--top-k" in asked
    assert cli.main(["help", "rnu"]) == 2
    assert "did you mean 'run'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_program_without_its_script() -> None:
    for line in ("-m gemma_edge version", "-c 'import gemma_edge; print(gemma_edge.__version__)'"):
        done = subprocess.run(
            [sys.executable, *shlex.split(line)], capture_output=True, text=True, check=True
        )
        assert done.stdout.split()[-1] == gemma_edge.__version__
    code = "import sys, gemma_edge; print(*sys.modules); from gemma_edge import Model; print(Model.load)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"numpy", "argparse", "onnxruntime"}.isdisjoint(done.stdout.splitlines()[0].split())


@pytest.mark.parametrize("argv", [["-q", "list"], ["list", "--quiet"]])
def test_quiet_prints_answers_and_errors_alone(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*argv, str(tmp_path)]) == 0
    assert capsys.readouterr() == ("", "")
    assert cli.main([*argv, str(tmp_path / "nothing")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert cli.main(["list", str(tmp_path)]) == 0  # it holds for one command alone
    assert "no bundle" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["-v", "run", "b", "hi"], ["run", "b", "hi", "--verbose"]])
def test_verbose_logs_versions_time_and_memory(
    argv: list[str], model: Model, stdin: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    assert out == "the first\n"
    assert f"run: gemma-edge {gemma_edge.__version__}, Python " in err and "MiB resident" in err


@pytest.mark.slow
@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_standard_files_are_no_error(closed: str, tmp_path: Path) -> None:
    """Nor does a file that is opened get the number of one that is missing."""
    line = f"{shlex.join(COMMAND)} list {shlex.quote(str(tmp_path))} --json {closed}"
    done = subprocess.run(["bash", "-c", line], stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    code = "import os, sys; import gemma_edge.cli.main as m; m.main(['version']); sys.exit(os.open('/', 0))"
    line = f"{shlex.join([sys.executable, '-c', code])} >&- <&-"
    done = subprocess.run(["bash", "-c", line], stderr=subprocess.PIPE, text=True)
    assert done.returncode > 2


def test_an_attachment_that_is_a_url(
    model: Model, stdin: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "b", "-a", "https://example.org/a.png", "what?"]) == 2
    said = "https://example.org/a.png: only files are read: download it first."
    assert capsys.readouterr().err == f"gemma-edge: error: {said}\n"


# Recipes and bundles. -----------------------------------------------------------------------------


def test_recipes_are_a_table_json_or_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[2:]] == list(list_recipes())
    assert "4/64" in next(line for line in table if line.startswith("int4 "))
    assert cli.main(["recipes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["int8"] == load_recipe("int8").to_dict()
    assert cli.main(["recipes", "int4"]) == 0
    (tmp_path / "mine.json").write_text(capsys.readouterr().out)
    assert load_recipe(tmp_path / "mine.json") == load_recipe("int4")
    assert cli.main(["recipes", "int5"]) == 2


def test_list_finds_bundles_below_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"decoder.onnx": {"bytes": 40, "sha256": ""}, "ple.bin": {"bytes": 2, "sha256": ""}}
    manifest = {"format": "onnx", "recipe": {"name": "int4"}, "context": 256, "files": files}
    for name in ("b/deep", ".hidden/one", "a", "damaged"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "manifest.json").write_text("{" if name == "damaged" else json.dumps(manifest))
    (tmp_path / "empty.litertlm").touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    assert cli.main(["list", str(tmp_path), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    found = {Path(each["path"]).relative_to(tmp_path).as_posix(): each for each in listed}
    assert list(found) == ["a", "b/deep", "damaged"]
    known = {"format": "onnx", "recipe": "int4", "context": 256, "bytes": 42, "source": "?"}
    assert found["a"] == {"path": str(tmp_path / "a"), **known} and found["damaged"]["recipe"] == "?"
    assert cli.main(["list", str(tmp_path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + 3
    assert cli.main(["list", str(tmp_path / "nothing")]) == 2


def test_list_finds_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", str(tmp_path)]) == 0
    assert "no bundle in it or below" in capsys.readouterr().err
