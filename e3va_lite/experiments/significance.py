"""How sure a difference between two methods is. Scores are paired: the same seed means the same order of images.

A claim is of one of two kinds. *More*: a is better than b. *Near*: a is not worse than b by the margin, which has to be
named before anybody looks. Each has a p-value; those of all claims are corrected together.
"""

from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.05
POWER = 0.8
MOST_SEEDS = 100


@dataclass(frozen=True)
class Difference:
    """Scores of a minus those of b, in the scores' unit.

    Attributes:
        seeds: Pairs.
        mean, low, high: With the 95 % interval of Student's t.
        deviation: Standard deviation of the differences.
        detectable: The true difference that as many seeds find with a probability of 80 %.
    """

    seeds: int
    mean: float
    low: float
    high: float
    deviation: float
    detectable: float

    def p_more(self, margin: float = 0.0) -> float:
        """One-sided: how likely so large a mean is if a were better than b by ``margin`` only."""
        return self._p(self.mean - margin)

    def p_less(self, margin: float = 0.0) -> float:
        """One-sided: how likely so small a mean is if a were better than b by as much as ``margin``."""
        return self._p(margin - self.mean)

    def seeds_needed(self, margin: float = 0.0, claims: int = 1) -> int | None:
        """How many seeds find with a probability of 80 % that a true difference of this size is not the margin.

        Args:
            margin: See :meth:`p_more`.
            claims: So many are corrected together; the level is the strictest that Holm's correction asks for.

        Returns:
            None for more than ``MOST_SEEDS``, as where the two can hardly be told apart.
        """
        excess = abs(self.mean - margin)
        for n in range(2, MOST_SEEDS + 1):
            quantiles = stats.t.ppf(1 - LEVEL / claims / 2, n - 1) + stats.t.ppf(POWER, n - 1)
            if excess >= quantiles * self.deviation / n**0.5 > 0:
                return n
        return None

    def _p(self, excess: float) -> float:
        error = self.deviation / self.seeds**0.5
        if error == 0:
            return 0.0 if excess > 0 else 1.0
        return float(stats.t.sf(excess / error, self.seeds - 1))


def difference(a: list[float], b: list[float]) -> Difference:
    """The difference of two methods' scores, seed by seed; two seeds at least."""
    deltas = np.subtract(a, b)
    n, deviation = len(deltas), float(deltas.std(ddof=1))
    mean, half = interval(deltas)
    enough = float(stats.t.ppf(1 - LEVEL / 2, n - 1) + stats.t.ppf(POWER, n - 1)) * deviation / n**0.5
    return Difference(n, mean, mean - half, mean + half, deviation, enough)


def interval(scores: list[float]) -> tuple[float, float]:
    """Mean and half of the 95 % interval of one method's scores."""
    n = len(scores)
    return float(np.mean(scores)), float(stats.t.ppf(1 - LEVEL / 2, n - 1) * np.std(scores, ddof=1) / n**0.5)


def holm(values: list[float]) -> list[float]:
    """Holm's correction: p-values that may be compared with the level although there are many of them."""
    order = np.argsort(values)
    corrected = np.empty(len(values))
    corrected[order] = np.minimum(1, np.maximum.accumulate(np.sort(values) * np.arange(len(values), 0, -1)))
    return corrected.tolist()
