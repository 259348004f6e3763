"""Is one way of training better than another? Paired over seeds and held-out prompts, with an interval.

Both are trained with the same seeds and judged by the same pairs. Seeds and prompts are drawn with replacement, the
same ones for both; what lies outside of the 95 % interval is told apart.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from dinalrm_jax.evaluation.accuracy import RESAMPLES

POWER = 1.96 + 0.84  # standard errors that a difference must have, to be told in four of five experiments


@dataclasses.dataclass(frozen=True)
class Comparison:
    """By how much the first is more often right than the second, shares of pairs.

    Attributes:
        difference: mean over the seeds.
        interval: 95 %, of seeds and prompts.
        by_seed: of each seed.
        seeds_needed: how many would tell such a difference four times out of five; None: no number would, with so few
            prompts.
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
        if self.verdict != "cannot tell":
            return text
        return text + (f", {self.seeds_needed} seeds would" if self.seeds_needed else ", nor would more seeds")


def compare(
    first: Sequence[np.ndarray], second: Sequence[np.ndarray], prompts: np.ndarray, seed: int = 0
) -> Comparison:
    """Compares two ways of training.

    Args:
        first, second: (P,) which pairs each one's model orders as people do, one array a seed; the same seeds.
        prompts: (P,) of the pairs, which are resampled with all pairs of theirs.
        seed: of the resampling.
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(f"the same seeds of both are compared, got {len(first)} and {len(second)}")
    _, group = np.unique(np.asarray(prompts), return_inverse=True)
    pairs = np.bincount(group)
    ahead = np.asarray(first, float) - np.asarray(second, float)  # (seeds, P)
    by_prompt = np.stack([np.bincount(group, row) for row in ahead])  # (seeds, prompts)
    rng, seeds = np.random.default_rng(seed), len(first)
    of_prompts = rng.multinomial(len(pairs), np.full(len(pairs), 1 / len(pairs)), RESAMPLES)
    of_seeds = np.full((RESAMPLES, seeds), 1 / seeds)
    if seeds > 1:  # resamples of few spread less than what they are drawn from, by (seeds - 1) / seeds
        of_seeds += (rng.multinomial(seeds, of_seeds[0], RESAMPLES) / seeds - of_seeds) * math.sqrt(seeds / (seeds - 1))
    drawn = np.einsum("bs,sg,bg->b", of_seeds, by_prompt, of_prompts) / (of_prompts @ pairs)
    low, high = np.percentile(drawn, [2.5, 97.5])
    by_seed = ahead.mean(axis=1)
    prompt_variance = np.var(by_prompt.mean(axis=0) @ of_prompts.T / (of_prompts @ pairs))
    left = (by_seed.mean() / POWER) ** 2 - prompt_variance  # what seeds may add to the variance
    needed = None
    if seeds > 1 and left > 0:
        needed = max(2, math.ceil(by_seed.var(ddof=1) / left))
    return Comparison(float(by_seed.mean()), (float(low), float(high)), tuple(by_seed.tolist()), needed)
