"""The parity gate: its measures against other arithmetic, its bounds, and what it refuses to compare."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import Popen
from typing import Any

import numpy as np
import pytest

from gemma_edge.export.checkpoint.checkpoint import Checkpoint
from gemma_edge.export.emit.reference.reference_text import evaluate
from gemma_edge.export.gate import parity as verify
from gemma_edge.export.gate.engine_process import run_isolated
from gemma_edge.export.gate.parity import (
    Agreement,
    check_quality,
    unusual,
    verify_bundle,
    verify_sequences,
    write_bundle_logits,
)
from gemma_edge.export.synth.synth_checkpoint import synthesize
from gemma_edge.export.weights.recipe import Bounds
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.errors import BundleError, ConfigError, ParityError, UsageError
from support.margins import FP32

SEQUENCES = [[2, 5, 300, 7, 12, 513, 40], [2, 9, 9], [2]]
TEXT = "A text of our own, about nothing, and of no more than a few dozen tokens. " * 3
GOOD = Agreement(
    tokens=100, mean_kl=0.01, max_kl=0.1, top1=0.9, max_abs=0.5, perplexity=10.0, bundle_perplexity=10.1
)


def log_softmax(x: Any) -> Any:
    x = x.astype(np.float64)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


@pytest.fixture
def theirs(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[list[int]]], Any]:
    """In place of an engine: the reference's logits with noise that depends on the ids alone."""

    def logits(sequences: list[list[int]]) -> Any:
        with Checkpoint.open(tiny_checkpoint) as checkpoint:
            exact = evaluate(checkpoint, sequences)
        noise = [np.random.default_rng(s[: n + 1]).normal(size=544) for s in sequences for n in range(len(s))]
        return np.concatenate(exact) + np.float32(noise)

    def run(path: Path, function: Callable[..., None], sequences: list[list[int]], out: Path) -> None:
        logits(sequences).tofile(out)

    monkeypatch.setattr(verify, "run_isolated", run)
    return logits


def test_the_measures(theirs: Any, tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    """KL is from the checkpoint's distribution to the bundle's; sequences of one token are left out."""
    compared = SEQUENCES[:2]
    with Checkpoint.open(tiny_checkpoint) as checkpoint:
        ours = np.concatenate(evaluate(checkpoint, compared))
        agreement = verify_sequences(Bundle.open(tiny_bundle), checkpoint, SEQUENCES)
    theirs = theirs(compared)
    p, q = log_softmax(ours), log_softmax(theirs)
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    assert agreement.tokens == 10
    assert agreement.mean_kl == pytest.approx(kl.mean(), rel=1e-4) and agreement.mean_kl > 1e-4
    assert agreement.max_kl == pytest.approx(kl.max(), rel=1e-4)
    assert agreement.top1 == pytest.approx((ours.argmax(axis=1) == theirs.argmax(axis=1)).mean())
    assert agreement.max_abs == pytest.approx(np.abs(ours - theirs).max(), rel=1e-4)
    # The last token of a sequence predicts nothing that is known.
    rows = [0, 1, 2, 3, 4, 5, 7, 8]
    targets = [*SEQUENCES[0][1:], *SEQUENCES[1][1:]]
    assert agreement.perplexity == pytest.approx(np.exp(-p[rows, targets].mean()), rel=1e-4)
    assert agreement.bundle_perplexity == pytest.approx(np.exp(-q[rows, targets].mean()), rel=1e-4)


@pytest.mark.usefixtures("theirs")
def test_positions_before_a_start_do_not_count(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    whole, bundle = SEQUENCES[0], Bundle.open(tiny_bundle)
    with Checkpoint.open(tiny_checkpoint) as checkpoint:
        some = verify_sequences(bundle, checkpoint, [whole, SEQUENCES[1]], starts=[3, len(SEQUENCES[1])])
        everything = verify_sequences(bundle, checkpoint, [whole])
        head = verify_sequences(bundle, checkpoint, [whole[:3]])
    assert some.tokens == len(whole) - 3
    total = everything.mean_kl * len(whole)
    assert some.mean_kl * some.tokens + head.mean_kl * 3 == pytest.approx(total, rel=1e-4)


def test_bundle_logits_do_not_depend_on_the_calls(
    exact_bundle: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    ids = list(range(4, 60))
    write_bundle_logits(exact_bundle, [ids, ids[:3]], tmp_path / "by 32")
    monkeypatch.setattr(verify, "ROWS_PER_CALL", 5)
    write_bundle_logits(exact_bundle, [ids, ids[:3]], tmp_path / "by 5")
    first, second = (np.fromfile(tmp_path / name, np.float32).reshape(59, 544) for name in ("by 32", "by 5"))
    np.testing.assert_allclose(first, second, atol=FP32)
    # The second sequence starts from an empty cache.
    np.testing.assert_allclose(first[56:], first[:3], atol=FP32)


def test_verify_bundle_on_a_text(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    agreement = verify_bundle(tiny_bundle, tiny_checkpoint, text=TEXT, max_tokens=40)
    assert agreement.tokens == 40
    assert 0 < agreement.mean_kl < 0.3 and agreement.top1 > 0.5


# What it refuses. ---------------------------------------------------------------------------------


def test_too_short_a_text(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="fewer than two tokens"):
        verify_bundle(tiny_bundle, tiny_checkpoint, text="")


def test_another_checkpoint(tiny_bundle: Path, tmp_path: Path) -> None:
    other = synthesize(tmp_path / "other", config={"rms_norm_eps": 1e-5}, progress=False).path
    with pytest.raises(ConfigError, match=r"expected the bundle's model, got another\."):
        verify_bundle(tiny_bundle, other)


def test_another_checkpoint_of_the_same_shape(tiny_bundle: Path, tmp_path: Path) -> None:
    """Only its weights can tell."""
    other = synthesize(tmp_path / "other", seed=1, progress=False).path
    with pytest.raises(ParityError, match="the stored weights are not the checkpoint's"):
        verify_bundle(tiny_bundle, other, text=TEXT, max_tokens=40)


def test_an_altered_bundle(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    with open(bundle / "ple.bin", "r+b") as file:
        file.write(b"\x00" * 8)
    with pytest.raises(BundleError, match=r"ple\.bin: sha256"):
        verify_bundle(bundle, tiny_checkpoint)


def die(path: Path, number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "cause"),
    [(signal.SIGILL, "CPU lacks instructions"), (signal.SIGKILL, r"\(signal 9\)\. Is there enough memory")],
)
def test_an_engine_that_dies_takes_only_its_own_process_with_it(
    tmp_path: Path, number: int, cause: str
) -> None:
    with pytest.raises(BundleError, match=cause):
        run_isolated(tmp_path, die, number)


def test_ctrl_c_while_the_process_starts_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def interrupted(*args: Any, **options: Any) -> Any:
        started.append(Popen(*args, **options))
        os.kill(os.getpid(), signal.SIGINT)
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_isolated(tmp_path, os.listdir)
    assert started[0].returncode == -signal.SIGKILL


def test_ctrl_c_as_soon_as_the_process_has_started_blocks_no_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_handler = signal.signal

    def interrupted(number: int, handler: Any) -> Any:
        previous = set_handler(number, handler)
        if handler is signal.default_int_handler:
            raise KeyboardInterrupt
        return previous

    monkeypatch.setattr(signal, "signal", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_isolated(tmp_path, os.listdir)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def fail(path: Path, size: int) -> None:
    raise BundleError(path, "field", "x" * size, "y")


def test_an_error_of_any_size_comes_back(tmp_path: Path) -> None:
    """Larger than what a pipe holds, too."""
    with pytest.raises(BundleError) as caught:
        run_isolated(tmp_path, fail, 1 << 20)
    assert caught.value.expected == "x" * (1 << 20)


# Bounds. ------------------------------------------------------------------------------------------


BOUNDS = Bounds(mean_kl=0.01, top1=0.9, max_abs=0.5)


def test_quality_alone_does_not_refuse() -> None:
    check_quality(GOOD, BOUNDS)
    check_quality(replace(GOOD, mean_kl=5.0, top1=0.0, max_abs=60.0), BOUNDS)
    check_quality(GOOD, BOUNDS, max_kl=0.01)


@pytest.mark.parametrize(
    ("measures", "max_kl", "named"),
    [
        ({"mean_kl": 0.011}, 0.01, "mean KL 0.011 nats, and --max-kl is 0.01"),
        ({"mean_kl": float("nan")}, None, "not numbers"),
        ({"max_abs": float("nan")}, None, "not numbers"),
        ({"max_abs": float("inf")}, 1.0, "not numbers"),
    ],
)
def test_what_refuses(measures: dict[str, Any], max_kl: float | None, named: str) -> None:
    with pytest.raises(ParityError) as caught:
        check_quality(replace(GOOD, **measures), BOUNDS, max_kl)
    assert named in str(caught.value) and caught.value.exit_code == 6


def test_what_is_unusual_is_told() -> None:
    assert unusual(GOOD, BOUNDS) == ""
    told = unusual(replace(GOOD, mean_kl=0.02, top1=0.5, max_abs=1.0), BOUNDS)
    for part in ("mean KL 0.02 nats, at most 0.01", "top-1 agreement 0.500", "max logit error 1,"):
        assert part in told


@pytest.mark.parametrize(
    ("kl", "recipe", "word", "said"),
    [
        (0.01, "int4", "close", "close to the checkpoint"),
        (0.34, "int4", "usable", "usable"),
        (0.9, "int4", "poor", "poor; try --recipe int4_g32 or int8"),
        (0.9, "int8", "poor", "poor; try --recipe fp32"),
        (0.9, "fp32", "poor", "poor;"),
    ],
)
def test_quality_in_words(kl: float, recipe: str, word: str, said: str) -> None:
    agreement = replace(GOOD, mean_kl=kl)
    assert agreement.to_dict()["quality"] == word and said in agreement.in_words(recipe)
    unknown = replace(agreement, perplexity=3e3, bundle_perplexity=3e3)
    assert said not in unknown.in_words(recipe)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_logits_that_are_not_numbers_do_not_agree(
    poison: float, tiny_bundle: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One such row among good ones: it must not be lost in a maximum or a mean."""

    def logits(path: Path, function: Callable[..., None], sequences: list[list[int]], out: Path) -> None:
        function(path, sequences, out)
        values = np.memmap(out, np.float32, "r+").reshape(-1, 544)
        values[3, 17] = poison

    monkeypatch.setattr(verify, "run_isolated", logits)
    with Checkpoint.open(tiny_checkpoint) as checkpoint:
        agreement = verify_sequences(Bundle.open(tiny_bundle), checkpoint, SEQUENCES)
    assert not np.isfinite(agreement.max_abs)
    with pytest.raises(ParityError):
        check_quality(agreement, Bounds(mean_kl=100.0, top1=0.0))


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        (10.0, 10.01, "next token likeliest in 90% of places; the text surprises both alike (perplexity)"),
        (10.0, 12.0, "surprises the bundle 20% more than the checkpoint (perplexity)"),
        (2.2e5, 2.0e5, "9% less than the checkpoint (perplexity). Both are high: this model knows"),
        (10.0, float("inf"), "cannot be compared"),
        (float("nan"), float("nan"), "cannot be compared"),
    ],
)  # fmt: skip
def test_figures_are_explained_in_words(ours: float, theirs: float, said: str) -> None:
    words = replace(GOOD, perplexity=ours, bundle_perplexity=theirs).in_words()
    assert said in words and ("Both are high" in words) == (ours > 1000)


def test_summary_has_every_measure() -> None:
    text = GOOD.summary()
    for value in ("100 tokens", "0.01 nats", "max 0.1", "90.0%", "error 0.5", "10.1", "checkpoint 10"):
        assert value in text
