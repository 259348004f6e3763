"""Pairwise accuracy against human rankings, by the four rules in use; they differ on ties.

| rule | two images people tied | two images the model ties | average | used by |
|---|---|---|---|---|
| strict (M1) | left out | wrong | over all pairs | ImageReward, HPSv3; our headline |
| strict, by ranking (M2) | left out | wrong | of rankings, then their mean | HPSv2 on ImageReward |
| inversions, by ranking (M3) | right | in the order they stand | of rankings, then their mean | HPSv2 on HPDv2 |
| ties in the denominator (M4) | wrong | wrong | over all pairs | the released DiNa-LRM code |

Where people tied nothing, M1 is M4; where the model ties nothing either, M2 is M3.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

RULES = {
    "strict": "strict (M1)",
    "strict_by_prompt": "by ranking (M2)",
    "inversions_by_prompt": "HPSv2's (M3)",
    "released": "released (M4)",
}
RESAMPLES = 1000
MAX_WEIGHTS = 10_000_000  # held at once


@dataclasses.dataclass(frozen=True)
class PairCounts:
    """What becomes of the pairs of R rankings, (R,) each, at one level and noise draw.

    Attributes:
        pairs: of scored images.
        strict: of these, those that people did not tie.
        correct: of those, the ones the model orders as people do; a tie of the model is none.
        inverted: of those, the ones it orders the other way; of two equal scores the earlier image's is the higher.
    """

    pairs: np.ndarray
    strict: np.ndarray
    correct: np.ndarray
    inverted: np.ndarray


def count_pairs(ranks: Sequence[Sequence[float]], scores: Sequence[np.ndarray]) -> PairCounts:
    """Counts the pairs of every ranking.

    Args:
        ranks: of people, lower is better.
        scores: of the model, higher is better; NaN: the image could not be scored, and has no pairs.
    """
    return PairCounts(*np.array([_count(np.asarray(r), s) for r, s in zip(ranks, scores)]).reshape(-1, 4).T)


def pair_counts(scores: np.ndarray, mask: np.ndarray) -> PairCounts:
    """The same of P pairs of a preferred and another image, a ranking each; those out of the mask have no pair.

    Args:
        scores: (P, 2) of the two images.
        mask: (P,).
    """
    better, worse = (scores[:, 0] > scores[:, 1]) & mask, (scores[:, 0] < scores[:, 1]) & mask
    return PairCounts(mask.astype(int), mask.astype(int), better.astype(int), worse.astype(int))


def _count(ranks: np.ndarray, scores: np.ndarray) -> tuple[int, int, int, int]:
    scored = ~np.isnan(scores)
    ranks, scores = ranks[scored], scores[scored]
    first, second = np.triu_indices(len(ranks), 1)
    people = np.sign(ranks[second] - ranks[first])  # 1: the first is better
    model = np.sign(scores[first] - scores[second])
    strict = people != 0
    correct = strict & (people == model)
    inverted = strict & (people != np.where(model == 0, 1, model))
    return len(first), strict.sum(), correct.sum(), inverted.sum()


def accuracies(counts: PairCounts, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The accuracy by every rule.

    Args:
        counts: of R rankings.
        weights: (..., R) how often each ranking counts; once if not given.

    Returns:
        (...) shares in [0, 1] by rule; NaN where there is no pair.
    """
    weights = np.ones(len(counts.pairs)) if weights is None else np.asarray(weights, float)
    with np.errstate(invalid="ignore", divide="ignore"):
        some, strict = counts.pairs > 0, counts.strict > 0
        by_ranking = np.where(strict, counts.correct / counts.strict, 0)
        orderly = np.where(some, 1 - counts.inverted / counts.pairs, 0)
        return {
            "strict": (weights @ counts.correct) / (weights @ counts.strict),
            "strict_by_prompt": (weights @ by_ranking) / (weights @ strict),
            "inversions_by_prompt": (weights @ orderly) / (weights @ some),
            "released": (weights @ counts.correct) / (weights @ counts.pairs),
        }


def intervals(draws: Sequence[PairCounts], prompts: Sequence[str], seed: int = 0) -> dict[str, tuple[float, float]]:
    """95 % percentile bootstrap intervals of the mean over noise draws, by rule.

    Prompts are drawn with replacement, with all rankings of one: images and raters of a prompt are not
    independent of each other, prompts are.

    Args:
        draws: the pair counts of R rankings, one a noise draw.
        prompts: of the R rankings.
        seed: of the resampling.
    """
    return {
        rule: tuple(np.nanpercentile(values, [2.5, 97.5]).tolist())
        for rule, values in resampled(draws, prompts, seed).items()
    }


def resampled(draws: Sequence[PairCounts], prompts: Sequence[str], seed: int = 0) -> dict[str, np.ndarray]:
    """(RESAMPLES,) the mean over noise draws in each of the resamples of `intervals`, by rule.

    With the same prompts and seed the same prompts are drawn: what differs between two models is theirs.
    """
    _, group = np.unique(np.asarray(prompts), return_inverse=True)
    count, rng = group.max() + 1, np.random.default_rng(seed)
    found: dict[str, list[np.ndarray]] = {rule: [] for rule in RULES}
    at_once = max(1, MAX_WEIGHTS // len(prompts))
    for start in range(0, RESAMPLES, at_once):
        size = min(at_once, RESAMPLES - start)
        weights = rng.multinomial(count, np.full(count, 1 / count), size)[:, group]
        values = [accuracies(counts, weights) for counts in draws]
        for rule in RULES:
            found[rule].append(np.mean([value[rule] for value in values], axis=0))
    return {rule: np.concatenate(values) for rule, values in found.items()}


def rank_correlations(opinions: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Spearman's (SRCC), Pearson's (PLCC) and Kendall's (KRCC) correlation of people's opinions and scores, (N,) each.

    (PLCC without the logistic fit that some papers put before it: of the scores as they are.)
    """
    from scipy import stats  # here, as it takes a second

    return {
        "SRCC": float(stats.spearmanr(opinions, scores).statistic),
        "PLCC": float(stats.pearsonr(opinions, scores).statistic),
        "KRCC": float(stats.kendalltau(opinions, scores).statistic),
    }


@dataclasses.dataclass(frozen=True)
class Reliability:
    """How often the model is right where it says how sure it is.

    Attributes:
        confidence, accuracy: (bins,) means within bins of the confidence in [0.5, 1]; NaN where empty. Where shares of
            people are known, accuracy is the share that agrees.
        count: (bins,) pairs.
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray

    @property
    def calibration_error(self) -> float:
        """The expected calibration error: the bins' |accuracy - confidence|, by their pairs."""
        gaps = np.abs(self.accuracy - self.confidence)
        return float(np.nansum(gaps * self.count) / self.count.sum())


def reliability(probability: np.ndarray, share: np.ndarray | float = 1.0, bins: int = 10) -> Reliability:
    """Of predicted probabilities.

    Args:
        probability: (pairs,) of the image that people preferred.
        share: (pairs,) of people who did; 1 where only the order is known.
        bins: of equal width.
    """
    confidence = np.maximum(probability, 1 - probability)
    right = np.where(probability > 0.5, share, 1 - np.asarray(share))
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        expected, correct = (np.bincount(place, values, bins) / count for values in (confidence, right))
    return Reliability(expected, correct, count)


class StrictPairs(NamedTuple):
    """Pairs that people did not tie, (P,) each: the preferred and the other image's score, and the share of people who
    prefer it, 1 where only the order is known."""

    chosen: np.ndarray
    rejected: np.ndarray
    share: np.ndarray


def strict_pairs(
    ranks: Sequence[Sequence[float]],
    scores: Sequence[np.ndarray],
    shares: Sequence[Sequence[Sequence[float]] | None] | None = None,
) -> StrictPairs:
    """All of them; arguments as for `count_pairs`, and each ranking's `data.preferences.Ranking.shares`."""
    found: list[tuple[np.ndarray, ...]] = []
    for row, values, known in zip(ranks, scores, shares or [None] * len(ranks)):
        places = np.asarray(row)
        first, second = np.nonzero(places[:, None] < places[None])
        kept = ~np.isnan(values[first]) & ~np.isnan(values[second])
        first, second = first[kept], second[kept]
        agreeing = np.ones(len(first)) if known is None else np.asarray(known)[first, second]
        found.append((values[first], values[second], agreeing))
    return StrictPairs(*(map(np.concatenate, zip(*found)) if found else np.empty((3, 0))))


# What the paper's table has (arXiv 2602.11146), per cent: name -> model -> accuracy. Which rule it took is not known.
PAPER: Mapping[str, Mapping[str, float]] = {
    "ImageReward": {"DiNa-LRM, one level": 60.34, "DiNa-LRM, ensemble": 61.75, "HPSv3": 67.03},
    "HPDv2": {"DiNa-LRM, one level": 82.13, "DiNa-LRM, ensemble": 84.31, "HPSv3": 85.36},
    "HPDv3": {"DiNa-LRM, one level": 75.04, "DiNa-LRM, ensemble": 74.86, "HPSv3": 76.03},
    "GenAI-Bench": {"DiNa-LRM, one level": 68.43, "DiNa-LRM, ensemble": 68.98, "HPSv3": 70.95},
}
