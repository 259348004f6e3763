"""Is one way of training better than another? Paired over seeds and held-out prompts, with an interval.

Both are trained with the same seeds and judged by the same pairs. What varies is a seed's training, how a prompt falls
to either, and what is left; each is estimated (an analysis of variance with both crossed), as another experiment would
draw other seeds and other prompts.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

POWER = 1.96 + 0.84  # standard errors that a difference must have, to be told in four of five experiments


@dataclasses.dataclass(frozen=True)
class Comparison:
    """By how much the first is more often right than the second, shares of pairs.

    Attributes:
        difference: mean over the seeds.
        interval: 95 %, over seeds and prompts; of one seed over prompts only.
        by_seed: of each seed.
        seeds_needed: how many would tell such a difference four times out of five; None: no number would, with so few
            prompts, or there is one seed, which does not say how they differ.
    """

    difference: float
    interval: tuple[float, float]
    by_seed: tuple[float, ...]
    seeds_needed: int | None

    @property
    def verdict(self) -> str:
        """ "better", "worse" or "cannot tell"."""
        low, high = self.interval
        return "better" if low > 0 else "worse" if high < 0 else "cannot tell"

    def __str__(self) -> str:
        low, high = (f"{100 * end:+.1f}" for end in self.interval)
        text = f"{100 * self.difference:+.1f} ({low} to {high}): {self.verdict}"
        if len(self.by_seed) == 1:
            return text + ", of one seed"
        if self.verdict != "cannot tell":
            return text
        return text + (f", {self.seeds_needed} seeds would" if self.seeds_needed else ", nor would more seeds")


def compare(first: Sequence[np.ndarray], second: Sequence[np.ndarray], prompts: np.ndarray) -> Comparison:
    """Compares two ways of training.

    Args:
        first, second: (P,) which pairs each one's model orders as people do, one array a seed; the same seeds.
        prompts: (P,) of the pairs; pairs of a prompt are not independent, prompts are.
    """
    from scipy import stats  # here, as it takes a second

    if len(first) != len(second) or not len(first):
        raise ValueError(f"the same seeds of both are compared, got {len(first)} and {len(second)}")
    _, group = np.unique(np.asarray(prompts), return_inverse=True)
    pairs = np.bincount(group)
    ahead = np.asarray(first, float) - np.asarray(second, float)  # (seeds, P)
    by_seed, (seeds, count) = ahead.mean(axis=1), (len(ahead), len(pairs))
    difference = float(by_seed.mean())
    # What each prompt adds to a seed's share of pairs, which is a ratio: (seeds, prompts), of mean `by_seed`.
    parts = np.stack([np.bincount(group, row) for row in ahead]) - difference * pairs
    parts = difference + parts / pairs.mean()
    residual = parts - parts.mean(axis=0) - parts.mean(axis=1, keepdims=True) + parts.mean()
    # Variances of the mean: by seeds and by prompts, in each of which the residual's is counted too.
    of_prompts = parts.mean(axis=0).var(ddof=1) / count if count > 1 else 0.0
    of_seeds = left = 0.0
    if seeds > 1:
        of_seeds = by_seed.var(ddof=1) / seeds
        left = np.square(residual).sum() / ((seeds - 1) * max(count - 1, 1)) / (seeds * count)
    # Student's half widths of either, of which seeds are few.
    of_seeds = max(of_seeds - left, 0.0)
    squares = ((of_seeds, seeds - 1), (of_prompts, count - 1))
    half = math.sqrt(sum(each * stats.t.ppf(0.975, freedom) ** 2 for each, freedom in squares if freedom))
    allowed = (difference / POWER) ** 2 - max(of_prompts - left, 0.0)  # of variance, to what more seeds make smaller
    needed = max(seeds + 1, math.ceil(seeds * (of_seeds + left) / allowed)) if seeds > 1 and allowed > 0 else None
    interval = (float(difference - half), float(difference + half))
    return Comparison(difference, interval, tuple(by_seed.tolist()), needed)
