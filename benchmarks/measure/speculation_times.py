"""What speculation gains: forced answers, decoded one token at a time and with drafts, in turn.

The tokens of an answer are given, so that it repeats its prompt as its kind says, whatever the weights are:
`copied` is the prompt again, `edited` has another token at every 24th place, and `shuffled` is of a dozen
tokens in random order, where every draft fails soon, which shows what speculation may cost.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gemma_edge.benchmarks.measure.workload import Workload
from gemma_edge.benchmarks.records.measurement import SpeculationRun
from gemma_edge.benchmarks.records.run_report import RunReport
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.sampling import Sampler, Sampling
from gemma_edge.runtime.usage import GenerationProgress

if TYPE_CHECKING:
    from gemma_edge.runtime.generate import TokenGenerator

EDIT_EVERY = 24  # tokens
DICE = 12  # tokens that are shuffled


class ForcedSampler(Sampler):
    """Does a greedy sampler's work, and picks the given tokens."""

    def __init__(self, tokens: Iterable[int]) -> None:
        super().__init__(Sampling(temperature=0.0))
        self._tokens = iter(tokens)

    def pick(self, logits: NDArray[np.float32], history: Collection[int] = ()) -> int:
        """The next of the tokens."""
        super().pick(logits, history)
        return next(self._tokens)


def measure_speculation(path: Path, workload: Workload) -> RunReport:
    """Decodes answers of `workload.speculate` tokens to prompts as long, `reps` times each way.

    Raises:
        UsageError: prompt and answer do not fit the context, or the bundle verifies no drafts.
    """
    from gemma_edge.runtime.generate import TokenGenerator
    from gemma_edge.runtime.model import Model

    with Model.load(
        path, threads=workload.threads, context=workload.context, snapshots=0, prefix_cache=None
    ) as model:
        workload.check(model.decoder.context)
        if not model.decoder.verify_rows:
            raise UsageError(f"{path}: it verifies no drafts: export it again, with a chunk of 2 or more")
        generator = TokenGenerator(model.residency, model.embeddings, model.per_layer)
        runs = [
            _measured(generator, text, prompt, answer, workload.reps)
            for text, (prompt, answer) in _texts(workload.speculate, model.tokenizer.vocab_size).items()
        ]
        return RunReport(context=model.decoder.context, speculation=tuple(runs))


def _texts(count: int, vocab_size: int) -> dict[str, tuple[list[int], list[int]]]:
    """Prompt and answer of each kind, `count` tokens each."""
    rng = np.random.default_rng(0)
    prompt = [int(i) for i in rng.permutation(vocab_size)[:count]]
    edited = [prompt[0] if i % EDIT_EVERY == EDIT_EVERY - 1 else t for i, t in enumerate(prompt)]
    dice = [int(i) for i in rng.choice(rng.integers(vocab_size, size=DICE), size=2 * count)]
    # An answer begins behind the prompt's first token: a draft needs two that stood together before.
    return {
        "copied": ([*prompt, prompt[0]], [*prompt[1:], prompt[0]]),
        "edited": ([*prompt, prompt[0]], [*edited[1:], prompt[0]]),
        "shuffled": (dice[:count], dice[count:]),
    }


def _measured(
    generator: TokenGenerator, text: str, prompt: list[int], answer: list[int], reps: int
) -> SpeculationRun:
    seconds: dict[bool, list[float]] = {False: [], True: []}
    progress = GenerationProgress()
    for repetition in range(1 + reps):  # the first measures what calls cost, and counts for nothing
        for speculate in (False, True):
            generator.reset()
            progress = GenerationProgress()
            tokens = generator.stream_tokens(
                prompt, ForcedSampler(answer), max_tokens=len(answer), progress=progress, speculate=speculate
            )
            assert list(tokens) == answer
            if repetition:
                seconds[speculate].append(round(progress.decode_s, 6))
    curve = generator.costs.curve
    return SpeculationRun(
        text=text,
        tokens=len(answer),
        plain_s=tuple(seconds[False]),
        speculated_s=tuple(seconds[True]),
        drafted=progress.drafted_tokens,
        accepted=progress.accepted_tokens,
        costs=curve.to_json() if curve else {},
    )
