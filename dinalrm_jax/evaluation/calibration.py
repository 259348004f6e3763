"""A likelihood that means what it says: k and sigma_0 fitted to people's answers on held-out pairs.

Training fixes the two constants of `sigma_u^2 = k sigma^2 + sigma_0^2` before it knows how well the scores will order;
afterwards `Phi(z)` is as sure as they make it. Here they are fitted to half of the prompts by maximum likelihood, and
judged on the other half by the expected calibration error at each noise level.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from dinalrm_jax import preference
from dinalrm_jax.data.preferences import stable_hash
from dinalrm_jax.evaluation.accuracy import reliability, strict_pairs
from dinalrm_jax.evaluation.benchmark import Evaluation
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.preference import LossConfig

FEWEST_PAIRS = 100
MOST_VARIANCE = 1e3  # of the squared margins: probabilities within 2 % of a half


@dataclasses.dataclass(frozen=True)
class LevelPairs:
    """Pairs with a winner at one noise level.

    Attributes:
        sigma: the level.
        margin: (P,) the preferred image's score less the other's.
        share: (P,) of people who prefer it; 1 where only the order is known.
    """

    sigma: float
    margin: np.ndarray
    share: np.ndarray


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A fitted likelihood, and what it changes.

    Attributes:
        likelihood: with the fitted constants.
        fitted_to, judged_by: pairs a level, of other prompts.
        errors: by level, the expected calibration error on the latter before and after, per cent.
    """

    likelihood: LossConfig
    fitted_to: int
    judged_by: int
    errors: dict[str, tuple[float, float]]


def fit_likelihood(levels: Sequence[LevelPairs]) -> LossConfig:
    """Thurstone's likelihood of the levels' pairs, `-mean s log Phi(z) + (1 - s) log Phi(-z)`, at its least.

    Args:
        levels: two or more, which tell k from sigma_0.

    Raises:
        ConfigError: scores that order the pairs no better than chance, which no variance fits.
    """
    from scipy import optimize, special  # here, as it takes a second

    def loss(logarithms: np.ndarray) -> float:
        k, variance_0 = np.exp(logarithms)
        total = 0.0
        for one in levels:
            z = one.margin / np.sqrt(2 * (k * one.sigma**2 + variance_0))
            total -= np.mean(one.share * special.log_ndtr(z) + (1 - one.share) * special.log_ndtr(-z))
        return total / len(levels)

    scale = np.mean([np.mean(np.square(one.margin)) for one in levels]) + 1e-12  # of the scores
    start = np.log([scale, scale])
    found = optimize.minimize(loss, start, method="Nelder-Mead", options={"maxiter": 1000})
    k, variance_0 = np.exp(found.x)
    if min(k * one.sigma**2 + variance_0 for one in levels) > MOST_VARIANCE * scale:
        raise ConfigError("the scores order these pairs no better than chance: there is no likelihood to fit")
    return LossConfig(k=float(k), sigma_0=float(np.sqrt(variance_0)))


def calibrate(evaluation: Evaluation) -> Calibration:
    """Fits to the pairs of half of the prompts, a draw of the noise each, and judges by the others.

    Raises:
        ConfigError: too few pairs, or as for `fit_likelihood`.
    """
    singles = [place for place, level in enumerate(evaluation.levels) if not isinstance(level, tuple)]
    half_of = [stable_hash("calibration", ranking.prompt)[0] % 2 for ranking in evaluation.rankings]
    halves = [[place for place, found in enumerate(half_of) if found == half] for half in (0, 1)]
    fitted, judged = ([level_pairs(evaluation, place, half) for place in singles] for half in halves)
    draws = len(evaluation.draws_of(shared=False))
    counts = [len(half[0].margin) // draws for half in (fitted, judged)]
    if min(counts) < FEWEST_PAIRS:
        raise ConfigError(
            f"--calibrate fits to half of the prompts and judges by the others, at least {FEWEST_PAIRS} pairs each; "
            f"{evaluation.name} has {counts[0]} and {counts[1]}"
        )
    before, after = evaluation.likelihood or LossConfig(), fit_likelihood(fitted)
    errors = {f"{one.sigma:g}": (_error(one, before), _error(one, after)) for one in judged}
    return Calibration(after, *counts, errors)


def level_pairs(evaluation: Evaluation, level: int, rankings: Sequence[int] | None = None) -> LevelPairs:
    """The pairs of some rankings, or all, at a single level, of all draws that are images' own; all by their places."""
    places = range(len(evaluation.rankings)) if rankings is None else rankings
    some = [evaluation.rankings[place] for place in places]
    ranks, shares = [one.ranks for one in some], [one.shares for one in some]
    found = [
        strict_pairs(ranks, [evaluation.scores[place][:, level, draw] for place in places], shares)
        for draw in evaluation.draws_of(shared=False)
    ]
    chosen, rejected, share = (np.concatenate(each) for each in zip(*found))
    return LevelPairs(float(evaluation.levels[level]), chosen - rejected, share)


def _error(pairs: LevelPairs, likelihood: LossConfig) -> float:
    probability = np.asarray(preference.preferred(pairs.margin, np.zeros_like(pairs.margin), pairs.sigma, likelihood))
    return round(100 * reliability(probability, pairs.share).calibration_error, 4)


def as_markdown(calibration: Calibration) -> str:
    """What was fitted, and the errors by level."""
    found = calibration.likelihood
    lines = [
        f"Fitted to {calibration.fitted_to} pairs of half of the prompts: k {found.k:.4g}, sigma_0 "
        f"{found.sigma_0:.4g}. Expected calibration error on {calibration.judged_by} pairs of the others, %:",
        "",
        "| sigma | before | after |",
        "|---|---|---|",
    ]
    lines += [f"| {level} | {before:.1f} | {after:.1f} |" for level, (before, after) in calibration.errors.items()]
    return "\n".join(lines) + "\n"
