"""Take a small trained model from checkpoint to answers: export, verify, ask, measure.

The demo works in a temporary folder and takes seconds. Its model, Pocket, has every mechanism of Gemma 3n at
a thousandth of the size and is trained on a few kinds of questions about text, pictures and sounds.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import textwrap
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gemma_edge.benchmarks.measure.questions import Answered, Question, as_answer, ask, read_questions
from gemma_edge.benchmarks.measure.target import LocalTarget
from gemma_edge.benchmarks.measure.workload import Workload
from gemma_edge.devices.machine.memory import PROC
from gemma_edge.export.checkpoint.checkpoint import Checkpoint
from gemma_edge.export.exporter import Exported, export_bundle
from gemma_edge.export.gate.parity import Agreement
from gemma_edge.export.plan import Plan
from gemma_edge.export.plan_table import format_count, format_plan
from gemma_edge.export.weights.recipe import load_recipe
from gemma_edge.runtime.console import without_controls
from gemma_edge.runtime.engines.cores import physical_cores
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.files.abandoned import temporary_folder
from gemma_edge.runtime.model import Model
from gemma_edge.runtime.units import format_size
from gemma_edge.runtime.usage import Usage

RECIPE, CONTEXT = "int8", 1024
TOOLS = "tools.json"  # in SAMPLES: what the question with tools offers
SAMPLES = "samples"  # in Pocket's folder: the questions that are asked, and their files
# Pocket in a checkout, and where it is installed.
POCKET = (("pocket", "checkpoint"), ("pocket",))
N_PROMPT, N_GEN, REPS = 512, 64, 3
MEASURE_TIMEOUT = 120.0
WIDTH = 88


@dataclass(frozen=True)
class Demonstration:
    """A demo's results: the bundle and its agreement, the usage of the last answer, seconds in all."""

    exported: Exported
    usage: Usage
    seconds: float


def pocket() -> Path:
    """The folder of Pocket's checkpoint.

    Raises:
        UsageError: this installation has none.
    """
    above = Path(__file__).parents[1]
    for parts in POCKET:
        if (folder := above.joinpath(*parts)).joinpath("config.json").is_file():
            return folder
    raise UsageError("the demo's model is not part of this installation: install gemma-edge from a checkout")


def demonstrate(folder: Path, *, kept: bool = True) -> Demonstration:
    """Runs the demo in `folder`, makes `ckpt` and `out` there, and prints each step.

    Args:
        kept: the folder stays, so the printed commands name it.

    Raises:
        UsageError: `folder` holds a checkpoint already, or Pocket is not installed.
        ParityError: the bundle does not agree with its checkpoint.
    """
    started = time.perf_counter()
    source, prefix = pocket(), f"{folder}/" if kept else ""
    checkpoint = folder / "ckpt"
    if checkpoint.exists():
        raise UsageError(f"{checkpoint}: exists and is not an empty folder; choose another path")
    _say("Pocket, a small Gemma 3n, from checkpoint to answers.")

    _heading("1. A checkpoint", f"cp -r {source} {prefix}ckpt")
    shutil.copytree(source, checkpoint)
    _print_checkpoint(checkpoint)

    _heading("2. Export", f"gemma-edge export {prefix}ckpt {prefix}out --recipe {RECIPE} --context {CONTEXT}")
    exported = export_bundle(checkpoint, folder / "out", recipe=RECIPE, context=CONTEXT)
    print(format_plan(exported.plan.to_dict()))

    _heading("3. Does it agree?", f"gemma-edge verify {prefix}out --source {prefix}ckpt")
    if exported.agreement:
        _print_agreement(exported.agreement)

    _heading("4. Text, a picture, a sound, a tool")
    usage = _answer(exported.path, read_questions(checkpoint / SAMPLES / "questions.jsonl"), prefix)

    tests = f"-p {N_PROMPT} -n {N_GEN} -r {REPS} --requests 0 --no-cold --no-encode"
    _heading("5. Memory and speed", f"gemma-edge bench {prefix}out {tests}")
    _print_measures(exported, usage)

    seconds = time.perf_counter() - started
    _heading(f"Done in {seconds:.0f} s")
    _print_next(prefix)
    return Demonstration(exported, usage, seconds)


def _print_checkpoint(folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint:
        config = checkpoint.config
    size = (folder / "model.safetensors").stat().st_size
    _say(
        f"{format_count(size // 2)} weights, {format_size(size)} in bf16; {config.num_hidden_layers} layers, "
        f"{config.num_kv_shared_layers} of which read the KV cache of layers below; most see a window of "
        f"{config.sliding_window} tokens. An encoder each for images and for sound."
    )


def _answer(bundle: Path, questions: Iterable[Question], prefix: str) -> Usage:
    """Asks the bundle each question, and prints the question as a command with its answer."""
    model = Model.load(bundle, keep_encoders=True, log=lambda text: None)
    for question in questions:
        text, files = _asked(question)
        options = "".join(f" -a {prefix}{file}" for file in files)
        if question.tools:
            options += f" --tools {prefix}ckpt/{SAMPLES}/{TOOLS}"
        print(f"$ gemma-edge run {prefix}out{options} {shlex.quote(text)}")
        said = ask(model, question)
        calls = [json.dumps(call.to_dict(), ensure_ascii=False) for call in said.tool_calls]
        print(without_controls("\n".join([said.text] * bool(said.text) + calls)))
        given = Answered(question.task, question.answer.strip(), as_answer(said.text, said.tool_calls))
        print("  right" if given.right else f"  wrong; the right answer: {question.answer}", flush=True)
    return said.usage


def _asked(question: Question) -> tuple[str, list[str]]:
    """The text and the files of a question of one turn."""
    content = question.messages[0]["content"]
    if isinstance(content, str):
        return content, []
    text = " ".join(part["text"] for part in content if part["type"] == "text")
    files = [str(part[part["type"]]) for part in content if part["type"] != "text"]
    return text, [f"ckpt/{SAMPLES}/{Path(file).name}" for file in files]


def _print_agreement(agreement: Agreement) -> None:
    bounds = load_recipe(RECIPE).bounds
    _say(f"Over {agreement.tokens} tokens of the built-in prompts, bundle against checkpoint in fp32:")
    _table(
        [
            (
                "mean KL divergence",
                f"{agreement.mean_kl:.3f} nats",
                f"usual for {RECIPE}: at most {bounds.mean_kl:g}",
            ),
            (
                "same likeliest token",
                f"{agreement.top1:.1%}",
                f"usual for {RECIPE}: {bounds.top1:.0%} or more",
            ),
            ("largest logit error", f"{agreement.max_abs:.2f}", "logits lie within ±30, the softcap"),
        ]
    )


def _print_measures(exported: Exported, usage: Usage) -> None:
    if not PROC.is_dir():
        _table(
            [
                ("prefill", f"{usage.prefill_tokens_per_s or 0:,.0f} tok/s", f"{usage.prompt_tokens} tokens"),
                (
                    "decode",
                    f"{usage.decode_tokens_per_s or 0:,.0f} tok/s",
                    f"{usage.completion_tokens} tokens",
                ),
            ]
        )
        _say("Memory is measured on Linux only.")
        return
    threads = physical_cores()
    workload = Workload((N_PROMPT,), (N_GEN,), reps=REPS, threads=threads, context=CONTEXT)
    report = LocalTarget(exported.path).work(workload, None, MEASURE_TIMEOUT).report
    assert report is not None and report.memory is not None  # without a limit nothing kills the run
    memory, (prefill, decode) = report.memory, report.tests
    cores = f"{threads} thread{'s' if threads > 1 else ''}"
    _table(
        [
            ("RssAnon", format_size(memory.steady.rss_anon), "heap: what must stay in memory"),
            ("  at its peak", format_size(memory.peak.rss_anon), _prediction(exported.plan)),
            (
                "RssFile",
                format_size(memory.steady.rss_file),
                "files mapped: can be dropped, read again",
            ),
            ("prefill", f"{prefill.median_ts:,.0f} tok/s", f"{N_PROMPT} tokens, {cores}, median of {REPS}"),
            ("decode", f"{decode.median_ts:,.0f} tok/s", f"{N_GEN} tokens, {cores}, median of {REPS}"),
        ]
    )


def _prediction(plan: Plan) -> str:
    return f"planned {format_size(plan.peak_bytes)}, {format_size(plan.base_bytes)} of it for the engine"


def _print_next(kept: str) -> None:
    if kept:
        print(f"Checkpoint and bundle are in {kept}. Try: gemma-edge chat {kept}out")
    _say("With a real checkpoint - a folder, or a Hugging Face id such as google/gemma-3n-E2B-it:")
    print("  gemma-edge export CHECKPOINT out/ --dry-run     # the plan, before any work")
    print("  gemma-edge export CHECKPOINT out/ --ceiling 2GiB")
    print('  gemma-edge run out/ "Why is the sky blue?"')


def _say(text: str) -> None:
    print(textwrap.fill(text, WIDTH))


def _heading(title: str, command: str = "") -> None:
    print(f"\n{title}", flush=True)
    if command:
        print(f"$ {command}", flush=True)


def _table(rows: Iterable[tuple[str, str, str]]) -> None:
    for name, value, note in rows:
        print(f"  {name:<20}  {value:>12}   {note}")


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `gemma-edge demo`."""
    parser.add_argument(
        "--keep", metavar="DIR", help="work in this folder and leave checkpoint and bundle there"
    )


def run(args: argparse.Namespace) -> int:
    """The verb. Raises what `demonstrate` raises."""
    if args.keep:
        demonstrate(Path(args.keep))
        return 0
    with temporary_folder("demo") as folder:
        demonstrate(folder, kept=False)
    return 0
