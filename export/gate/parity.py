"""The gate of `gemma-edge export` and of `gemma-edge verify`.

Two checks refuse: the stored weights are the checkpoint's (`weight_check.py`), and the engine computes what
they say (`graph_check.py`). Whoever passes both is what the recipe makes of the checkpoint.

How far that is from the checkpoint is a matter of quality, which is measured and told: the bundle's logits,
from its own engine, against the reference's over the same tokens. The measures are the divergence of the
next-token distributions (KL, in nats), how often the most likely token agrees, the largest logit error, and
the perplexity of both. The engine runs in a process of its own: a crash there is an error here, and its
memory is no part of the exporter's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_edge.export.checkpoint.checkpoint import Checkpoint
from gemma_edge.export.checkpoint.open_source import check_changes, open_source
from gemma_edge.export.emit.reference.reference_text import evaluate_blocks
from gemma_edge.export.export_families import tensor_specs
from gemma_edge.export.gate.encoder_parity import encoder_errors
from gemma_edge.export.gate.engine_process import run_isolated
from gemma_edge.export.gate.gate_prompts import prompt_ids
from gemma_edge.export.gate.graph_check import check_graph
from gemma_edge.export.gate.weight_check import check_weights
from gemma_edge.export.model.tower import with_image_size
from gemma_edge.export.progress_bar import ProgressBar
from gemma_edge.export.weights.recipe import Bounds
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.artifacts.modalities import KINDS
from gemma_edge.runtime.errors import ConfigError, ParityError, UsageError
from gemma_edge.runtime.files.abandoned import temporary_folder
from gemma_edge.runtime.prompt.tokenizer import Tokenizer

Array = NDArray[np.float32]
# Logits of so many tokens at a time are asked of the engine: a row of 262,400 is a megabyte.
ROWS_PER_CALL = 32
DEFAULT_TEXT_TOKENS = 256
HIGH_PERPLEXITY = 1000.0  # a model that knows the language of a text has less
# Mean KL, in nats a token, up to which a bundle is called so; that of a published 4-bit Gemma 4 E2B
# (Q4_K_M) is 0.34, with a top-1 agreement of 82 %.
CLOSE, USABLE = 0.05, 0.5


# What of an agreement a manifest must have.
AGREEMENT_SHAPE = {
    **dict.fromkeys(("tokens", "mean_kl", "max_kl", "top1", "max_abs", "perplexity"), "number"),
    "bundle_perplexity": "number",
    "encoders?": {"*": "number"},
    **dict.fromkeys(("tensors?", "weight_error?", "products?"), "number"),
    "quality?": "text",
}


@dataclass(frozen=True)
class Agreement:
    """How a bundle agrees with its checkpoint over `tokens` positions."""

    tokens: int
    mean_kl: float  # nats a token, from the checkpoint's distribution to the bundle's
    max_kl: float
    top1: float  # fraction of positions with the same most likely token
    max_abs: float  # largest absolute difference of a logit
    perplexity: float  # of the checkpoint, over the same text
    bundle_perplexity: float
    # Of "vision" and "audio": how far soft tokens are from the checkpoint's, see `verify_encoders`.
    encoders: dict[str, float] = field(default_factory=dict)
    tensors: int = 0  # stored ones that were compared with the checkpoint's, see `check_weights`
    weight_error: float = 0.0  # of the quantized ones, relative to the checkpoint's
    products: int = 0  # of the engine with weights that were followed, see `check_graph`

    def to_dict(self) -> dict[str, Any]:
        """JSON values; six digits say enough, and a .litertlm has little room for them."""
        return {**{key: _rounded(value) for key, value in asdict(self).items()}, "quality": self.quality}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Agreement:
        """Of `AGREEMENT_SHAPE`; what a later version adds is left out."""
        return cls(**{key.name: data[key.name] for key in fields(cls) if key.name in data})

    def summary(self) -> str:
        """What was checked, and the measures, a line each."""
        checked = (
            f"checked: {self.tensors} stored tensors, rounded by {self.weight_error:.2%} of their size, "
            f"and {self.products} products of the engine\n"
            if self.tensors
            else ""
        )
        return checked + (
            f"agreement over {self.tokens} tokens: KL {self.mean_kl:.3g} nats (max {self.max_kl:.3g}), "
            f"top-1 {self.top1:.1%}, max logit error {self.max_abs:.3g}, "
            f"perplexity {self.bundle_perplexity:.4g} (checkpoint {self.perplexity:.4g})"
            + "".join(f", {kind} encoder off by {error:.2g}" for kind, error in self.encoders.items())
        )

    def in_words(self, recipe: str = "") -> str:
        """What the figures mean, for people.

        Args:
            recipe: the bundle's.
        """
        ours, theirs = self.bundle_perplexity, self.perplexity
        change = ours / theirs - 1 if theirs else math.nan
        if not math.isfinite(change):
            perplexity = "the perplexities cannot be compared"
        elif abs(change) < 0.005:
            perplexity = "the text surprises both alike (perplexity)"
        else:
            side = "more" if change > 0 else "less"
            perplexity = (
                f"the text surprises the bundle {abs(change):.0%} {side} than the checkpoint (perplexity)"
            )
        if self.high:
            perplexity += ". Both are high: this model knows no such text, which says nothing of the export"
        same = f"both find the same next token likeliest in {self.top1:.0%} of places; {perplexity}"
        return f"in words: {same}" if self.high else f"in words: {self.verdict(recipe)}; {same}"

    @property
    def high(self) -> bool:
        """Whether the model knows no such text, so that the measures say nothing of the export."""
        return min(self.bundle_perplexity, self.perplexity) > HIGH_PERPLEXITY

    @property
    def quality(self) -> str:
        """ "close", "usable" or "poor", by the mean KL."""
        return "close" if self.mean_kl <= CLOSE else "usable" if self.mean_kl <= USABLE else "poor"

    def verdict(self, recipe: str = "") -> str:
        """The quality and, where it is poor, what to try in the place of `recipe`."""
        if self.quality == "close":
            return "close to the checkpoint"
        if self.quality == "usable":
            return "usable, though not the checkpoint word for word"
        better = {"int8": "fp32", "fp32": ""}.get(recipe, "int4_g32 or int8")
        return f"poor; try --recipe {better}" if better else "poor"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def verify_bundle(
    bundle: str | Path,
    source: str | Path,
    *,
    text: str | None = None,
    max_tokens: int = DEFAULT_TEXT_TOKENS,
    progress: bool = False,
    adapters: Sequence[str] = (),
    slice: str | None = None,
) -> Agreement:
    """Compares a bundle with the checkpoint it was made from, every file of it hashed first.

    Args:
        text: evaluated instead of the built-in prompts, in pieces of the bundle's context.
        max_tokens: of the text, from its beginning.
        adapters, slice: the changes of the checkpoint that it was exported with, as of `export_bundle`.

    Raises:
        BundleError, CheckpointError: one of them is bad, or they do not belong together.
        UsageError: the text is too short to compare anything.
    """
    opened = Bundle.open(bundle)
    with ProgressBar("checking hashes", sum(f.bytes for f in opened.files.values()), progress, "B") as bar:
        opened.check_hashes(bar.advance)
    kinds = [kind for kind in KINDS if kind in opened.modalities]
    with open_source(source, adapters, kinds, slice) as checkpoint:
        check_changes(checkpoint, opened.manifest, opened.container.manifest_path)
        if opened.vision:
            checkpoint.towers = with_image_size(checkpoint.towers, opened.vision.config.image_size)
        same = [opened.modalities[k].config == e.config for k, e in checkpoint.towers.items()]
        if checkpoint.config != opened.config or not all(same) or len(same) != len(opened.modalities):
            raise ConfigError(
                checkpoint.path / "config.json",
                "model",
                "the bundle's model",
                "another",
                "Name its own checkpoint.",
            )
        sequences = compared_sequences(opened, text, max_tokens)
        return verify_opened(opened, checkpoint, sequences, progress=progress)


def compared_sequences(bundle: Bundle, text: str | None, max_tokens: int) -> list[list[int]]:
    """Token ids of the built-in prompts, or of the beginning of a text in pieces of the bundle's context."""
    tokens, added = bundle.file("tokenizer.model"), bundle.member("added_tokens", dict)
    tokenizer = Tokenizer(tokens, added, bundle.config.vocab_size)
    if text is None:
        return prompt_ids(tokenizer, bundle.context)
    ids = tokenizer.encode(text, bos=True)[:max_tokens]
    return [ids[start : start + bundle.context] for start in range(0, len(ids), bundle.context)]


def verify_opened(
    bundle: Bundle,
    checkpoint: Checkpoint,
    sequences: Sequence[Sequence[int]],
    *,
    scratch: Path | None = None,
    progress: bool = False,
) -> Agreement:
    """Every check of the gate: the stored weights, the engine's graph, and what both make of token ids.

    Args:
        scratch: as in `verify_sequences`.

    Raises:
        ParityError: the stored weights are not the checkpoint's, or the engine computes something else.
        UsageError: there is nothing to compare.
    """
    stored = check_weights(bundle, checkpoint, progress=progress)
    followed = check_graph(bundle, scratch=scratch, progress=progress)
    agreement = verify_sequences(bundle, checkpoint, sequences, scratch=scratch, progress=progress)
    return replace(
        agreement,
        encoders=encoder_errors(bundle, checkpoint, scratch=scratch, progress=progress),
        tensors=stored.tensors,
        weight_error=stored.relative_error,
        products=followed.products,
    )


def verify_sequences(
    bundle: Bundle,
    checkpoint: Checkpoint,
    sequences: Sequence[Sequence[int]],
    *,
    starts: Sequence[int] | None = None,
    scratch: Path | None = None,
    progress: bool = False,
) -> Agreement:
    """As `verify_bundle`, over token ids; each sequence starts from an empty cache.

    Args:
        starts: of each sequence, the first position whose logits are compared; 0 for all.
        scratch: a folder for the bundle's logits, 4 bytes a token and entry of the vocabulary; by default the
            temporary one.
    """
    pairs = zip(sequences, starts or [0] * len(sequences), strict=True)
    chosen = [(list(s), start) for s, start in pairs if len(s) > 1]
    sequences = [sequence for sequence, _ in chosen]
    if not sequences:
        raise UsageError("there is nothing to compare: the text has fewer than two tokens")
    weights = sum(
        spec.size for name, spec in tensor_specs(bundle.config).items() if "per_layer.w" not in name
    )
    with temporary_folder(parent=scratch) as folder:
        path = folder / "logits.f32"
        with ProgressBar("running the bundle", 0, progress):
            run_isolated(bundle.path, write_bundle_logits, sequences, path)
        rows = sum(map(len, sequences))
        theirs = np.memmap(path, dtype=np.float32, mode="r", shape=(rows, bundle.config.vocab_size))
        with ProgressBar("running the reference", weights, progress, "weights") as bar:
            comparison = _Comparison(sequences, [start for _, start in chosen])
            for block in evaluate_blocks(checkpoint, sequences, progress=bar.advance):
                comparison.add(block, theirs)
    return comparison.agreement()


def check_quality(agreement: Agreement, bounds: Bounds, max_kl: float | None = None) -> None:
    """Refuses what no recipe makes of a checkpoint, and what is further off than the caller allows.

    Args:
        bounds: the recipe's; of encoders, whose graphs are not followed, a bound of it refuses.
        max_kl: the largest mean KL in nats a token; None for any.

    Raises:
        ParityError: a logit is not a number, an encoder is outside its bound, or `max_kl` is exceeded.
    """
    failures = []
    if not math.isfinite(agreement.max_abs) or math.isnan(agreement.mean_kl):
        failures.append("some of its logits are not numbers")
    elif max_kl is not None and not agreement.mean_kl <= max_kl:
        failures.append(f"mean KL {agreement.mean_kl:.3g} nats, and --max-kl is {max_kl:g}")
    for kind, error in agreement.encoders.items():
        if bounds.encoder is not None and not error <= bounds.encoder:
            failures.append(f"the {kind} encoder is off by {error:.3g}, the bound is {bounds.encoder:g}")
    if failures:
        raise ParityError(f"the bundle does not agree with its checkpoint: {'; '.join(failures)}")


def unusual(agreement: Agreement, bounds: Bounds) -> str:
    """What is further off than the recipe leads to expect, for people; "" for nothing."""
    found = []
    if not agreement.mean_kl <= bounds.mean_kl:
        found.append(f"mean KL {agreement.mean_kl:.3g} nats, at most {bounds.mean_kl:g} is usual")
    if not agreement.top1 >= bounds.top1:
        found.append(f"top-1 agreement {agreement.top1:.3f}, at least {bounds.top1:g} is usual")
    if bounds.max_abs is not None and not agreement.max_abs <= bounds.max_abs:
        found.append(f"max logit error {agreement.max_abs:.3g}, at most {bounds.max_abs:g} is usual")
    if not found:
        return ""
    return (
        f"further from the checkpoint than this recipe leads to expect: {'; '.join(found)}. Weights and "
        "graph are right, but these weights round badly"
    )


class _Comparison:
    """Accumulates the measures over blocks of logits, from the start of each sequence on."""

    def __init__(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> None:
        self.compared = np.concatenate(
            [np.arange(len(s)) >= start for s, start in zip(sequences, starts, strict=True)]
        )
        # The next token of every row; -1 for the last one of a sequence, which has none.
        self.targets = np.concatenate([np.append(s[1:], -1) for s in sequences])
        self.rows = 0
        self.kl: list[float] = []
        self.same = 0
        self.max_abs = 0.0
        self.losses: tuple[list[float], list[float]] = ([], [])

    def add(self, ours: Array, all_theirs: Array) -> None:
        for row in ours:
            other = np.asarray(all_theirs[self.rows])
            target, compared = self.targets[self.rows], self.compared[self.rows]
            self.rows += 1
            if not compared:
                continue
            error = float(np.max(np.abs(row - other)))
            # A NaN compares false with everything; it must not look like agreement.
            self.max_abs = error if math.isnan(error) else max(self.max_abs, error)
            self.same += int(np.argmax(row) == np.argmax(other))
            with np.errstate(invalid="ignore"):
                log_p, log_q = _log_softmax(row), _log_softmax(other)
            self.kl.append(_divergence(log_p, log_q) if math.isfinite(error) else math.nan)
            if target >= 0:
                self.losses[0].append(-float(log_p[target]))
                self.losses[1].append(-float(log_q[target]))

    def agreement(self) -> Agreement:
        return Agreement(
            tokens=len(self.kl),
            mean_kl=float(np.mean(self.kl)),
            max_kl=float(np.max(self.kl)),
            top1=self.same / len(self.kl),
            max_abs=self.max_abs,
            perplexity=float(np.exp(np.mean(self.losses[0]))),
            bundle_perplexity=float(np.exp(np.mean(self.losses[1]))),
        )


def divergence(row: Array, other: Array) -> float:
    """Kullback-Leibler divergence of the distributions of two rows of logits, from the first, in nats."""
    return _divergence(_log_softmax(row), _log_softmax(other))


def _divergence(log_p: NDArray[np.float64], log_q: NDArray[np.float64]) -> float:
    return max(0.0, float(np.sum(np.exp(log_p) * (log_p - log_q))))


def _log_softmax(x: Array) -> NDArray[np.float64]:
    shifted = x.astype(np.float64) - float(x.max())
    return shifted - math.log(float(np.exp(shifted).sum()))


def write_bundle_logits(path: Path, sequences: Sequence[Sequence[int]], out: Path) -> None:
    """Writes the bundle's fp32 logits of every token of `sequences` to a file, row after row."""
    from gemma_edge.runtime.model import Model

    model = Model.load(path)
    with open(out, "wb") as file:
        for sequence in sequences:
            model.decoder.reset()
            step = min(ROWS_PER_CALL, model.decoder.chunk)
            for start in range(0, len(sequence), step):
                ids = np.asarray(sequence[start : start + step], dtype=np.int64)
                logits = model.decoder.forward(
                    model.embeddings.lookup(ids), model.per_layer.lookup(ids), len(ids)
                )
                file.write(np.ascontiguousarray(logits).data)
