"""A likelihood that means what it says: k and sigma_0 fitted to people's answers on held-out pairs.

Training fixes the two constants of `sigma_u^2 = k sigma^2 + sigma_0^2` before it knows how well the scores will order;
afterwards `Phi(z)` is as sure as they make it. Here they are fitted to half of the prompts by maximum likelihood, and
judged on the other half by the expected calibration error at each noise level.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import cast

import numpy as np

from dinalrm_jax.data.preferences import Ranking, stable_hash
from dinalrm_jax.evaluation.accuracy import Reliability, count_pairs, reliability
from dinalrm_jax.evaluation.benchmark import Evaluation
from dinalrm_jax.evaluation.markdown import table
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.preference import LossConfig, preferred, score_variance

FEWEST_PAIRS = 100
MOST = 1e3  # times the squared margins is a variance of probabilities within 2 % of a half


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
        ConfigError: scores that order all pairs right, or none better than chance: no variance fits best.
    """
    from scipy import optimize  # here, as it takes a second

    def loss(logarithms: np.ndarray) -> float:
        k, variance_0 = np.exp(logarithms)
        return float(np.mean([_surprise(one, k * one.sigma**2 + variance_0).mean() for one in levels]))

    scale = np.mean([np.mean(np.square(one.margin)) for one in levels]) + 1e-12  # of the scores
    start = np.log([scale, scale])
    found = optimize.minimize(loss, start, method="Nelder-Mead", options={"maxiter": 1000})
    k, variance_0 = np.exp(found.x)
    variances = [k * one.sigma**2 + variance_0 for one in levels]
    if not scale / MOST < min(variances) < MOST * scale:
        how = "no better than chance" if min(variances) > scale else "all right"
        raise ConfigError(f"the scores order these pairs {how}: there is no likelihood to fit")
    return LossConfig(k=float(k), sigma_0=float(np.sqrt(variance_0)))


def calibrate(evaluation: Evaluation) -> Calibration:
    """Fits to the pairs of half of the prompts, a draw of the noise each, and judges by the others.

    Raises:
        ConfigError: too few pairs, or as for `fit_likelihood`.
    """
    singles = [place for place, level in enumerate(evaluation.levels) if not isinstance(level, tuple)]
    strict = evaluation.counts(singles[0], evaluation.draws_of(shared=False)[0]).strict
    check_enough(evaluation.rankings, evaluation.name, strict)
    half_of = np.array([_half(ranking.prompt) for ranking in evaluation.rankings])
    halves = [np.flatnonzero(half_of == half).tolist() for half in (0, 1)]
    fitted, judged = ([level_pairs(evaluation, place, half) for place in singles] for half in halves)
    fitted_to, judged_by = (int(strict[half].sum()) for half in halves)
    before, after = evaluation.likelihood or LossConfig(), fit_likelihood(fitted)
    gains = np.log(2) - np.concatenate([_surprise(one, float(score_variance(one.sigma, after))) for one in judged])
    error = gains.std() / math.sqrt(judged_by)  # levels and draws of a pair are not independent of each other
    if gains.mean() < 2 * error:
        raise ConfigError(
            "on the pairs that it was not fitted to, the likelihood is no better than a coin: the scores order them no "
            "better than chance. Nothing is written into the checkpoint"
        )
    errors = {f"{one.sigma:g}": (_error(one, before), _error(one, after)) for one in judged}
    return Calibration(after, fitted_to, judged_by, errors)


def check_enough(rankings: Sequence[Ranking], name: str, strict: np.ndarray | None = None) -> None:
    """Raises ConfigError where the halves of `calibrate` have too few pairs.

    Args:
        rankings: of people.
        name: what the error calls them.
        strict: (R,) how many pairs with a winner were scored of each; None: all are.
    """
    if strict is None:
        strict = count_pairs([each.ranks for each in rankings], [np.zeros(len(each.ranks)) for each in rankings]).strict
    counts = np.bincount([_half(each.prompt) for each in rankings], strict, 2).astype(int)
    if counts.min() < FEWEST_PAIRS:
        raise ConfigError(
            f"--calibrate fits to half of the prompts and judges by the others, at least {FEWEST_PAIRS} pairs each; "
            f"{name} has {counts[0]} and {counts[1]}"
        )


def _half(prompt: str) -> int:
    """0: fitted to, 1: judged by."""
    return stable_hash("calibration", prompt)[0] % 2


def _surprise(pairs: LevelPairs, variance: float) -> np.ndarray:
    """(P,) the negative log-likelihood of people's answers."""
    from scipy import special  # here, as it takes a second

    z = pairs.margin / np.sqrt(2 * np.asarray(variance))
    return -(pairs.share * special.log_ndtr(z) + (1 - pairs.share) * special.log_ndtr(-z))


def level_pairs(evaluation: Evaluation, level: int, rankings: Sequence[int] | None = None) -> LevelPairs:
    """`Evaluation.pairs` at a single level, by its place."""
    chosen, rejected, share = evaluation.pairs(level, rankings)
    return LevelPairs(cast(float, evaluation.levels[level]), chosen - rejected, share)


def reliability_of(pairs: LevelPairs, likelihood: LossConfig) -> Reliability:
    """How often people agree where the likelihood says how sure it is."""
    nothing = np.zeros_like(pairs.margin)  # it depends on the scores' difference only
    return reliability(np.asarray(preferred(pairs.margin, nothing, pairs.sigma, likelihood)), pairs.share)


def _error(pairs: LevelPairs, likelihood: LossConfig) -> float:
    return round(100 * reliability_of(pairs, likelihood).calibration_error, 4)


def as_markdown(calibration: Calibration) -> str:
    """What was fitted, and the errors by level."""
    found = calibration.likelihood
    said = (
        f"Fitted to {calibration.fitted_to} pairs of half of the prompts: k {found.k:.4g}, sigma_0 "
        f"{found.sigma_0:.4g}. Expected calibration error on {calibration.judged_by} pairs of the others, %:"
    )
    rows = [[level, *(f"{error:.1f}" for error in errors)] for level, errors in calibration.errors.items()]
    return f"{said}\n\n{table(['sigma', 'before', 'after'], rows)}\n"
