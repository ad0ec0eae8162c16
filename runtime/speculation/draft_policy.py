"""`DraftPolicy`: how many tokens to verify at once, by what was guessed right and what a call costs.

Each answer has its own. It is a function of the tokens and of the cost curve alone, not of a clock, so that
the same prompt takes the same steps.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

from gemma_edge.runtime.speculation.cost_curve import CostCurve

# Matches of these lengths and above are rated together: how often the next token is right, before anything
# is known of the answer. Texts that copy are above, others below.
MATCHES = (2, 3, 4, 6, 9, 13)
PRIORS = (0.4, 0.6, 0.7, 0.8, 0.88, 0.92)
WEIGHT = 1 / 8  # of the latest guess
LEAST_GAIN = 1.1  # expected tokens over cost, below which nothing is tried
# What drafts may lose, in decode steps: at once, and for each token. 64 tokens lose 3 % at most.
CREDIT, CREDIT_A_TOKEN = 1.75, 0.0025
MOST_PROFIT = 4.0  # that drafts may lose again
HIT_PROFIT = 0.15  # of a right guess, verified or not: where calls are dear, it takes several to try one
# An answer begins with these costs, on a machine that was measured, too: it takes the same steps there.
UNMEASURED = CostCurve({2: 1.25, 16: 4.75})


class DraftPolicy:
    """See the module.

    Attributes:
        costs: of this machine; None until a first draft is wanted.
        tokens: of the answer behind its first one.
        cost: decode steps that they took, by the cost curve.
    """

    def __init__(self, costs: CostCurve | None = None) -> None:
        self.costs = costs
        self.tokens, self.cost = 0, 0.0
        self._hits = list(PRIORS)
        self._profit = 0.0

    def observe(self, match: int, hit: bool) -> None:
        """Says whether the token behind a match of this length was guessed right, verified or not."""
        at = bisect_right(MATCHES, match) - 1
        self._hits[at] += WEIGHT * (hit - self._hits[at])
        self._profit = min(MOST_PROFIT, self._profit + HIT_PROFIT * hit)

    def rows(self, match: int, most: int, sizes: Sequence[int]) -> int:
        """How many tokens to feed at once: 1 for a plain step.

        Args:
            match: length of the match that the draft comes from.
            most: as many as there are, the token that is fed anyway included.
            sizes: that the decoder offers; see `Decoder.verify_rows`.
        """
        costs = self.costs or UNMEASURED
        credit = CREDIT + CREDIT_A_TOKEN * self.tokens + self._profit
        best, gain = 1, LEAST_GAIN
        for size in sizes:
            count, cost = min(size, most), costs.of(size)
            if count < 2 or (self.costs and cost - 1 > credit):
                break
            expected = self._expected(match, count) / cost
            if expected > gain:
                best, gain = count, expected
            if size >= most:
                break
        return best

    def _expected(self, match: int, rows: int) -> float:
        """Tokens that a call of so many rows is expected to give."""
        hits = (self._hits[bisect_right(MATCHES, match + ahead) - 1] for ahead in range(rows - 1))
        total = chance = 1.0
        for hit in hits:
            chance *= hit
            total += chance
        return total

    def step(self, size: int, tokens: int) -> None:
        """Says what a call of `size` rows gave."""
        cost = (self.costs or UNMEASURED).of(size)
        self.tokens += tokens
        self.cost += cost
        self._profit = min(MOST_PROFIT, self._profit + tokens - cost)

    @property
    def speedup(self) -> float:
        """Plain decode steps over those that the answer took; NaN of nothing."""
        return self.tokens / self.cost if self.cost else math.nan
