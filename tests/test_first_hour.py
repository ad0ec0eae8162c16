"""What a new user types in the first hour: the same commands, as programs of their own."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_edge.cli.exported_once import is_checkpoint
from gemma_edge.export.gate.parity import HIGH_PERPLEXITY
from gemma_edge.runtime.artifacts.bundle import Bundle
from support.processes import PATIENCE_S
from support.repository import ROOT, blocks, read
from support.terminal import Terminal

POCKET = ROOT / "pocket" / "checkpoint"
README, GUIDE = ROOT / "README.md", ROOT / "docs" / "guide.md"
TYPED = [sys.executable, "-m", "gemma_edge.cli.main"]


def typed(line: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs the line of a shell in which `gemma-edge` is this one."""
    command = shlex.join(TYPED)
    line = re.sub(r"\bgemma-edge\b", lambda _: command, line)
    return subprocess.run(
        ["bash", "-c", line], cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


@pytest.fixture
def home(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    """A working folder with a checkpoint `ckpt`."""
    (tmp_path / "ckpt").symlink_to(tiny_checkpoint)
    return tmp_path


# Exports. -----------------------------------------------------------------------------------------


def test_every_printed_export_runs_on_pocket(tmp_path: Path) -> None:
    """In the order of the pages; a hub's id is a folder here, since nothing is downloaded."""
    for name in ("ckpt", "pocket/checkpoint", "google/gemma-3n-E2B-it"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(POCKET)
    lines = [
        line.removeprefix("$ ").partition("#")[0]
        for page in (README, GUIDE)
        for block in blocks(page, "sh", "console")
        for line in block.splitlines()
        if line.removeprefix("$ ").startswith("gemma-edge export ")
    ]
    assert len(lines) >= 9
    for line in lines:
        done = typed(line, tmp_path)
        assert done.returncode == 0, (line, done.stderr)
    made = ("out", "e2b", "model.litertlm", "all/onnx", "all/tflite", "all/model.litertlm")
    assert [Bundle.open(tmp_path / name).format for name in made] == [
        "onnx", "onnx", "litertlm", "onnx", "tflite", "litertlm"
    ]  # fmt: skip


def test_several_formats_do_not_go_into_a_bundle(home: Path) -> None:
    assert typed("gemma-edge export ckpt out --context 64 --no-verify --recipe int8", home).returncode == 0
    done = typed("gemma-edge export ckpt out --format onnx --format tflite --context 64 --no-verify", home)
    assert done.returncode == 2 and "out is a bundle" in done.stderr
    assert sorted(path.name for path in home.iterdir()) == ["ckpt", "out"]
    assert typed("gemma-edge inspect out", home).returncode == 0


def test_an_export_says_what_it_replaces_and_refuses_what_it_should_not(home: Path) -> None:
    line = "gemma-edge export ckpt out --context 64 --no-verify --calibrate none"
    assert "replaces" not in typed(line, home).stderr
    (home / "out" / "README.md").write_text("mine")
    again = typed(line, home)
    assert again.returncode == 0 and "out: replaces a bundle of ckpt in recipe int4_g128\n" in again.stderr
    other = typed(f"{line} --recipe int8", home)
    assert other.returncode == 2 and "--force replaces it" in other.stderr
    forced = typed(f"{line} --recipe int8 --force", home)
    assert forced.returncode == 0 and "out: replaces a bundle of ckpt in recipe int4_g128\n" in forced.stderr
    assert Bundle.open(home / "out").manifest["recipe"]["name"] == "int8"
    assert (home / "out" / "README.md").read_text() == "mine"


def test_the_suffix_is_the_format(home: Path) -> None:
    done = typed("gemma-edge export ckpt foo.litertlm --context 64 --no-verify", home)
    assert done.returncode == 0 and (home / "foo.litertlm").is_file()
    wrong = typed("gemma-edge export ckpt bar.litertlm --format onnx", home)
    assert wrong.returncode == 2 and "a .litertlm is a file of --format litertlm, not onnx" in wrong.stderr
    assert not (home / "bar.litertlm").exists()


def test_the_ceiling_that_the_plan_shows_is_accepted(home: Path) -> None:
    plan = json.loads(typed("gemma-edge export ckpt --dry-run --json", home).stdout)
    refused = typed(f"gemma-edge export ckpt --dry-run --ceiling {plan['needed_bytes'] - 1}", home)
    assert refused.returncode == 5 and "for file pages in use), the ceiling is" in refused.stderr
    shown = re.search(r"the smallest --ceiling is ([^:]+):", refused.stdout)
    assert shown
    ceiling = shown[1].replace(" ", "")
    assert typed(f"gemma-edge export ckpt --dry-run --ceiling {ceiling}", home).returncode == 0


# Asking. ------------------------------------------------------------------------------------------


def test_run_leaves_a_loops_input_alone(home: Path, tiny_bundle: Path) -> None:
    (home / "out").symlink_to(tiny_bundle)
    (home / "prompts").write_text("one\ntwo\nthree\n")
    line = 'while read l; do echo "[$l]"; gemma-edge run out "$l" --max-tokens 2 >/dev/null; done < prompts'
    assert typed(line, home).stdout == "[one]\n[two]\n[three]\n"


def test_run_with_a_prompt_does_not_wait_for_an_open_pipe(tiny_bundle: Path) -> None:
    ours, theirs = os.pipe()
    with open(ours, "rb") as stdin, open(theirs, "wb"):
        command = [*TYPED, "run", str(tiny_bundle), "hi", "--max-tokens", "2"]
        assert subprocess.run(command, stdin=stdin, timeout=PATIENCE_S, check=False).returncode == 0


def test_stdin_is_the_prompt_without_one_and_joins_it_where_a_dash_is(home: Path, tiny_bundle: Path) -> None:
    (home / "out").symlink_to(tiny_bundle)

    def tokens(line: str) -> int:
        done = typed(f"{line} --json --max-tokens 1", home)
        assert done.returncode == 0, done.stderr
        return int(json.loads(done.stdout)["usage"]["prompt_tokens"])

    both = tokens("gemma-edge run out 'one\n\ntwo'")
    assert tokens("printf 'one\n\ntwo' | gemma-edge run out") == both
    assert tokens("printf 'one\n\ntwo' | gemma-edge run out -") == both
    assert tokens("printf two | gemma-edge run out one -") == both
    assert tokens("printf two | gemma-edge run out one") < both


# Naming the bundle. -------------------------------------------------------------------------------

VERBS_OF_A_BUNDLE = {
    "inspect": "",
    "verify": "--source ckpt --tokens 8",
    "eval": "tasks.jsonl",
    "bench": "-p 8 -n 2 -r 1 --requests 0 --no-cold --no-encode --bandwidth 0s",
    "run": "hi --max-tokens 1",
    "chat": "< /dev/null",
}


@pytest.mark.parametrize("verb", VERBS_OF_A_BUNDLE)
def test_a_bundle_is_an_argument_or_an_option_or_in_the_environment(
    verb: str, home: Path, tiny_bundle: Path
) -> None:
    (home / "out").symlink_to(tiny_bundle)
    question = {"task": "any", "messages": [{"role": "user", "content": "hi"}], "answer": "x"}
    (home / "tasks.jsonl").write_text(json.dumps(question))
    rest = VERBS_OF_A_BUNDLE[verb]
    for line in (
        f"gemma-edge {verb} out {rest}",
        f"gemma-edge {verb} -m out {rest}",
        f"GEMMA_EDGE_MODEL=out gemma-edge {verb} {rest}",
        f"GEMMA_EDGE_MODEL=nothing gemma-edge {verb} out {rest}",
    ):
        done = typed(line, home)
        assert done.returncode == 0, (line, done.stderr)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("gemma-edge inspect", "name one as the first argument, with -m BUNDLE, or in $GEMMA_EDGE_MODEL"),
        ("gemma-edge inspect -m out other", "unexpected argument 'other'"),
        ("gemma-edge chat out other", "unexpected argument 'other'"),
        ("gemma-edge eval out", "no questions: gemma-edge eval BUNDLE TASKS"),
        ("gemma-edge bench out --device local --fleet fleet.toml", "--device and --fleet: give one of them"),
    ],
)
def test_arguments_that_contradict(line: str, message: str, home: Path, tiny_bundle: Path) -> None:
    (home / "out").symlink_to(tiny_bundle)
    done = typed(line, home)
    assert done.returncode == 2 and message in done.stderr


def test_the_suggested_command_is_one_that_the_model_answers_well(tmp_path: Path) -> None:
    """Pocket names its own example; its line of samples has the right answer."""
    (tmp_path / "ckpt").symlink_to(POCKET)
    done = typed("gemma-edge export ckpt out --context 512", tmp_path)
    suggested = done.stdout.strip().partition("out: ready. Next: ")[2]
    sample = next(
        question
        for line in read(POCKET / "samples" / "questions.jsonl").splitlines()
        if isinstance((question := json.loads(line))["messages"][0]["content"], str)
    )
    assert suggested == f"gemma-edge run out {shlex.quote(sample['messages'][0]['content'])}"
    assert typed(suggested, tmp_path).stdout.strip() == sample["answer"]
    # Nothing alarms beside "ready": what is high is explained.
    assert "both find the same next token likeliest" in done.stderr
    (known,) = re.findall(r"perplexity \S+ \(checkpoint ([^)]+)\)", done.stderr)
    assert ("Both are high" in done.stderr) == (float(known) > HIGH_PERPLEXITY)


def test_a_checkpoint_without_an_example_gets_a_general_one(home: Path) -> None:
    done = typed("gemma-edge export ckpt 'my out' --context 64 --no-verify", home)
    assert done.stdout == "my out: ready. Next: gemma-edge run 'my out' 'Why is the sky blue?'\n"


# A checkpoint in a bundle's place. ----------------------------------------------------------------


def test_a_checkpoint_is_exported_once_and_answers(tmp_path: Path) -> None:
    """A hub's id is a folder here, since nothing is downloaded."""
    (tmp_path / "google").mkdir()
    (tmp_path / "google" / "gemma-3n-E2B-it").symlink_to(POCKET)
    line = "export GEMMA_EDGE_CACHE=$PWD/cache; gemma-edge run google/gemma-3n-E2B-it"
    refused = typed(f"{line} 'Who are you?'", tmp_path)
    command = refused.stderr.partition("add --yes, or run ")[2].strip()
    assert refused.returncode == 2 and command.startswith("gemma-edge export google/gemma-3n-E2B-it ")
    assert not (tmp_path / "cache" / "bundles").exists()
    first = typed(f"{line} 'Who are you?' --max-tokens 8 --temperature 0 --yes", tmp_path)
    assert first.returncode == 0 and first.stdout.strip(), first.stderr
    again = typed(f"{line} 'Who are you?' --max-tokens 8 --temperature 0", tmp_path)
    assert (again.returncode, again.stdout, again.stderr) == (0, first.stdout, "")
    assert typed(command, tmp_path).returncode == 0, "the command that was said does the same"
    served = typed(f"{line.replace(' run ', ' serve ')} --port 0 --check", tmp_path)
    assert served.returncode == 0 and "answers with 1 model" in served.stderr, served.stderr


def test_at_a_terminal_the_export_is_asked_about(home: Path) -> None:
    variables = {
        "GEMMA_EDGE_CACHE": str(home / "cache"),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    with Terminal([*TYPED, "run", "ckpt", "hi", "--max-tokens", "2"], home, variables) as terminal:
        terminal.read_to(r"Do it now\? \[y/N\]")
        terminal.type("n\r")
        assert terminal.ended() == 2
    with Terminal([*TYPED, "run", "ckpt", "hi", "--max-tokens", "2"], home, variables) as terminal:
        terminal.read_to(r"Do it now\? \[y/N\]")
        terminal.type("y\r")
        terminal.read_to("in words: ")
        assert terminal.ended() == 0
    assert len(list((home / "cache" / "bundles").iterdir())) == 1


@pytest.mark.parametrize(
    ("name", "yes"),
    [
        ("google/gemma-3n-E2B-it", True),
        ("owner/model-v1.0", True),
        ("owner/model.v2", True),
        ("pictures/photo.png", False),
        ("models/m.litertlm", False),
        ("out", False),
        ("a/b/c", False),
        ("m.litertlm", False),
    ],
)
def test_names_that_may_be_a_checkpoint(name: str, yes: bool) -> None:
    assert is_checkpoint(name) is yes


# Several bundles. ---------------------------------------------------------------------------------


def test_several_bundles_in_one_bench_as_json(home: Path, tiny_bundle: Path, exact_bundle: Path) -> None:
    (home / "int4").symlink_to(tiny_bundle)
    shutil.copytree(exact_bundle, home / "fp32")
    (home / "other").mkdir()
    (home / "other" / "fp32").symlink_to(exact_bundle)
    sizes = "-p 8 -n 2 -r 1 --requests 0 --no-cold --no-encode --bandwidth 0s"
    done = typed(f"gemma-edge bench int4 fp32 {sizes} -o json", home)
    assert done.returncode == 0, done.stderr
    rows = [row for row in json.loads(done.stdout) if row["kind"] == "bench"]
    assert [(row["name"], row["test"]) for row in rows] == [
        (name, test) for name in ("int4", "fp32") for test in ("pp8", "tg2")
    ]
    twice = typed(f"gemma-edge bench fp32 other/fp32 {sizes}", home)
    assert twice.returncode == 2 and "several bundles of one name" in twice.stderr
