"""How sure a difference between two methods is. Scores are paired: the same seed means the same order of images.

A claim is of one of two kinds. *More*: a is better than b. *Near*: a is not worse than b by the margin, which has to be
named before anybody looks. That a is better may also turn out to be a difference too small to care about: *level*, less
than that margin either way (two one-sided tests). Each has a p-value; those of all claims are corrected together, and
those of *level* by themselves.

A few pairs say little about their own spread. Where many methods were run with the same seeds, the spread is therefore
that of all of them: a score is the method's, plus the seed's, plus noise that is as large for every method (a
randomized block design, of which seeds are the blocks). With two methods this is the paired t-test.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.05
POWER = 0.8
MOST_SEEDS = 100


@dataclass(frozen=True)
class Noise:
    """What is left of the scores of several methods when that of the method and that of the seed are taken away.

    Attributes:
        methods: How many.
        deviation: Standard deviation of one score.
        freedom: Degrees of freedom of its estimate.
        equal: p-value of Levene's test, where two methods or more have three scores: a small one says that methods
            differ in noise, and should not share it.
    """

    methods: int
    deviation: float
    freedom: int
    equal: float | None

    def half(self, seeds: int) -> float:
        """Half of the 95 % interval of a method's mean over ``seeds``, to be compared with other methods' means.

        What all methods have in common in a seed is not part of it (Loftus and Masson 1994).
        """
        return float(stats.t.ppf(1 - LEVEL / 2, self.freedom)) * self.deviation / seeds**0.5


def noise(methods: Iterable[dict[str, float]]) -> Noise:
    """The noise of methods that were run with the same seeds.

    Args:
        methods: Scores by seed of each of at least two methods, of at least two seeds each. Some may lack seeds that
            others have.
    """
    methods = list(methods)
    seeds = sorted(set().union(*methods))
    rows = [(m, seeds.index(seed), score) for m, scores in enumerate(methods) for seed, score in scores.items()]
    design = np.zeros((len(rows), len(methods) + len(seeds)))
    for row, (m, s, _) in enumerate(rows):
        design[row, [m, len(methods) + s]] = 1
    scores = np.array([score for *_, score in rows])
    fitted, _, rank, _ = np.linalg.lstsq(design, scores)
    freedom = len(rows) - int(rank)
    left = float(np.linalg.norm(scores - design @ fitted))
    groups = [own for method in methods if len(own := list(method.values())) > 2 and np.ptp(own) > 0]
    equal = float(stats.levene(*groups).pvalue) if len(groups) > 1 else None
    return Noise(len(methods), left / freedom**0.5, freedom, equal)


@dataclass(frozen=True)
class Difference:
    """Scores of a minus those of b, in the scores' unit.

    Attributes:
        seeds: Pairs.
        mean, low, high: With the 95 % interval of Student's t.
        deviation: Standard deviation of the difference of one pair.
        freedom: Degrees of freedom of its estimate.
        methods: From so many methods it was estimated.
    """

    seeds: int
    mean: float
    low: float
    high: float
    deviation: float
    freedom: int
    methods: int

    @property
    def detectable(self) -> float:
        """The true difference that as many seeds find with a probability of 80 %."""
        return _quantiles(LEVEL, self.freedom) * self.deviation / self.seeds**0.5

    def p_more(self, margin: float = 0.0) -> float:
        """One-sided: how likely so large a mean is if a were better than b by ``margin`` only."""
        return self._p(self.mean - margin)

    def p_less(self, margin: float = 0.0) -> float:
        """One-sided: how likely so small a mean is if a were better than b by as much as ``margin``."""
        return self._p(margin - self.mean)

    def p_level(self, near: float) -> float:
        """How likely so small a mean, either way, is if a were better or worse than b by as much as ``near``."""
        return max(self.p_more(-near), self.p_less(near))

    def seeds_needed(self, margin: float = 0.0, claims: int = 1, near: float = 0.0) -> int | None:
        """How many seeds find with a probability of 80 % that a true difference of this size is not the margin.

        Args:
            margin: See :meth:`p_more`.
            near: Where it is not 0, finding that the difference is smaller than that, either way, counts as well.
            claims: So many are corrected together; the level is the strictest that Holm's correction asks for.

        Returns:
            None for more than ``MOST_SEEDS``, as where the two can hardly be told apart.
        """
        excess = max(abs(self.mean - margin), near - abs(self.mean))
        for n in range(2, MOST_SEEDS + 1):
            quantiles = _quantiles(LEVEL / claims, (self.methods - 1) * (n - 1))
            if excess >= quantiles * self.deviation / n**0.5 > 0:
                return n
        return None

    def _p(self, excess: float) -> float:
        error = self.deviation / self.seeds**0.5
        if error == 0:
            return 0.0 if excess > 0 else 1.0
        return float(stats.t.sf(excess / error, self.freedom))


def _quantiles(level: float, freedom: int) -> float:
    """How many standard errors a true difference needs to be found at a two-sided level with a probability of 80 %."""
    return float(stats.t.ppf(1 - level / 2, freedom) + stats.t.ppf(POWER, freedom))


def difference(a: list[float], b: list[float], shared: Noise | None = None) -> Difference:
    """The difference of two methods' scores, seed by seed; two seeds at least.

    Args:
        shared: The noise of all methods of the study, see :func:`noise`; without it, the spread of the pairs counts.
    """
    deltas = np.subtract(a, b)
    n, mean = len(deltas), float(deltas.mean())
    if shared is None:
        deviation, freedom, methods = float(deltas.std(ddof=1)), n - 1, 2
    else:
        deviation, freedom, methods = 2**0.5 * shared.deviation, shared.freedom, shared.methods
    half = float(stats.t.ppf(1 - LEVEL / 2, freedom)) * deviation / n**0.5
    return Difference(n, mean, mean - half, mean + half, deviation, freedom, methods)


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
