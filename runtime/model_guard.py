"""`ModelGuard`: asks another bundle whether a text breaks a policy, in the manner of ShieldGemma."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.guards import Stage
from gemma_edge.runtime.model import Model

SPARE_TOKENS = 8  # where the text meets the question, tokens may be others
ASKED = {"prompt": "user's prompt", "answer": "assistant's answer"}
QUESTION = """\
You are a policy expert. Decide whether the {what} below violates the policy.

{what}:
{text}

Policy:
{policy}

Does the {what} violate the policy? Your answer must start with '{yes}' or '{no}'."""


class ModelGuard:
    """A guard that refuses what a model calls a violation. It can be wrong in both directions.

    The probability of a violation is that of the first token of `yes` against that of `no`, as the beginning
    of the model's answer.
    A text that is too long for the model's context is judged in overlapping windows, by the worst of them.

    Args:
        model: not the one whose answers it guards.
        policy: what a text must not do.
        threshold: the probability from which a text is refused.
        interval: characters of an answer between two checks.
        question: the prompt, with the fields `what`, `text`, `policy`, `yes` and `no`.

    Raises:
        UsageError: `yes` and `no` begin with the same token, or an option is out of range.
    """

    def __init__(
        self,
        model: Model,
        policy: str,
        *,
        threshold: float = 0.5,
        interval: int = 400,
        yes: str = "Yes",
        no: str = "No",
        question: str = QUESTION,
    ) -> None:
        if not 0 < threshold <= 1 or interval < 1:
            raise UsageError("a guard's threshold must be above 0 and at most 1, its interval 1 or more")
        self.model, self.policy, self.threshold, self.interval = model, policy, threshold, interval
        self._words = {"yes": yes, "no": no}
        begins = [model.tokenizer.encode(word, bos=False)[:1] for word in (yes, no)]
        if not (begins[0] and begins[1] and begins[0] != begins[1]):
            raise UsageError(f"a guard's answers must begin with different tokens, unlike {yes!r} and {no!r}")
        self._ids = [ids[0] for ids in begins]
        self._question = question
        try:
            self._prompt("prompt", "")
        except (LookupError, ValueError) as error:
            raise UsageError(f"a guard's question has a field that is not one of its own: {error}") from None

    def __call__(self, stage: Stage, text: str) -> bool:
        """False for a violation."""
        return self.probability(stage, text) < self.threshold

    def probability(self, stage: Stage, text: str) -> float:
        """That of a violation; 0 for a text without words.

        Raises:
            As `Model.generate`.
        """
        # Markers of turns in the text must not speak for the guard.
        plain = self.model.tokenizer.without_special(text).strip()
        return max((self._ask(stage, window) for window in self._windows(stage, plain)), default=0.0)

    def _windows(self, stage: Stage, text: str) -> Iterator[str]:
        tokenizer = self.model.tokenizer
        frame = len(self.model.prompt_ids(self._prompt(stage, "")))
        room = (
            self.model.decoder.context - frame - 8
        )  # tokens of the text may join the frame's in another way
        if room < 16:
            raise UsageError(f"the guard's context of {self.model.decoder.context} has no room for a text")
        ids = tokenizer.encode(text, bos=False)
        for start in range(0, len(ids), room - room // 4):
            yield tokenizer.decode(ids[start : start + room], skip_special=False)
            if start + room >= len(ids):
                return

    def _prompt(self, stage: Stage, text: str) -> str:
        return self._question.format(what=ASKED[stage], text=text, policy=self.policy, **self._words)

    def _ask(self, stage: Stage, text: str) -> float:
        seen: list[NDArray[np.float32]] = []
        prompt = self.model.prompt(self._prompt(stage, text))
        list(
            self.model.stream_tokens(
                prompt, max_tokens=1, observe=lambda logits, _: seen.append(logits.copy())
            )
        )
        yes, no = (float(seen[0][i]) for i in self._ids)
        return 1 / (1 + math.exp(min(no - yes, 700)))
