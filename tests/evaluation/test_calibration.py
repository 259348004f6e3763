"""A fitted likelihood: finds the constants that made the answers, and is read again from the checkpoint."""

import dataclasses

import numpy as np
import pytest
from scipy import stats

from dinalrm_jax.data.preferences import Ranking, stable_hash
from dinalrm_jax.evaluation import calibration
from dinalrm_jax.evaluation.accuracy import reliability, strict_pairs
from dinalrm_jax.evaluation.benchmark import Evaluation
from dinalrm_jax.evaluation.calibration import LevelPairs, as_markdown, calibrate, fit_likelihood
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.noise import NoiseDraw
from dinalrm_jax.preference import LossConfig

K, SIGMA_0 = 3.0, 0.5


def answered(sigma, count, rng):
    """Margins of the image that people preferred, where they answer by Phi with K and SIGMA_0."""
    margin = 2 * rng.standard_normal(count)
    agree = rng.random(count) < stats.norm.cdf(margin / np.sqrt(2 * (K * sigma**2 + SIGMA_0**2)))
    return np.where(agree, margin, -margin)


def test_the_constants_that_made_the_answers_are_found():
    rng = np.random.default_rng(0)
    levels = [LevelPairs(sigma, answered(sigma, 20_000, rng), np.ones(20_000)) for sigma in (0.0, 0.3, 0.8)]
    found = fit_likelihood(levels)
    assert found.k == pytest.approx(K, rel=0.1)
    assert found.sigma_0 == pytest.approx(SIGMA_0, rel=0.05)


def test_shares_of_people_are_answers_too():
    """With the exact share as label no pair is drawn, so the constants come out exactly."""
    margins = np.linspace(0.1, 3, 200)
    levels = [
        LevelPairs(sigma, margins, stats.norm.cdf(margins / np.sqrt(2 * (K * sigma**2 + SIGMA_0**2))))
        for sigma in (0.0, 0.5)
    ]
    found = fit_likelihood(levels)
    assert (found.k, found.sigma_0) == (pytest.approx(K, rel=1e-2), pytest.approx(SIGMA_0, rel=1e-2))


def test_reliability_beside_shares():
    """A probability of 0.8 is right where 80 % of people agree, though all of those pairs have the same winner."""
    sure, share = np.array([0.8, 0.8, 0.3]), np.array([0.8, 0.8, 0.7])
    assert reliability(sure, share).calibration_error == pytest.approx((0 + 0 + abs(0.3 - 0.7)) / 3)
    assert reliability(sure).calibration_error == pytest.approx((0.2 * 2 + 0.7) / 3)


def test_pairs_with_their_shares():
    shares = ((0.5, 0.9, 0.6), (0.1, 0.5, 0.2), (0.4, 0.8, 0.5))
    chosen, rejected, share = strict_pairs([(1, 3, 2)], [np.array([5.0, 6.0, np.nan])], [shares])
    assert (chosen.tolist(), rejected.tolist(), share.tolist()) == ([5], [6], [0.9])
    assert strict_pairs([(1, 2)], [np.array([0.0, 1.0])])[2].tolist() == [1]


def evaluation(rng, prompts=400, likelihood=None):
    rankings, scores = [], []
    for number in range(prompts):
        margin = np.stack([answered(sigma, 1, rng)[0] for sigma in (0.2, 0.6)])
        rankings.append(Ranking(f"prompt {number}", ("a", "b"), (1, 2)))
        scores.append(np.stack([margin, np.zeros(2)])[..., None].astype(np.float32))
    return Evaluation("test", (0.2, 0.6), (NoiseDraw(0),), rankings, scores, {}, likelihood)


def test_calibration_is_judged_by_other_prompts_and_makes_an_overconfident_likelihood_honest():
    rng, overconfident = np.random.default_rng(0), LossConfig(k=0.01, sigma_0=0.1)
    found = calibrate(evaluation(rng, 6000, overconfident))
    assert found.fitted_to + found.judged_by == 6000
    assert 2700 < found.fitted_to < 3300
    for before, after in found.errors.values():
        assert before > 9
        assert after < 4  # per cent; 3,000 pairs in ten bins are off by some 2 by chance
    text = as_markdown(found)
    assert f"k {found.likelihood.k:.4g}" in text
    assert text.count("\n| 0.") == 2


def test_what_cannot_be_fitted():
    with pytest.raises(ConfigError, match="at least 100 pairs each"):
        calibrate(evaluation(np.random.default_rng(0), 150))
    one_prompt = evaluation(np.random.default_rng(0), 300)
    rankings = [dataclasses.replace(row, prompt="the same") for row in one_prompt.rankings]
    with pytest.raises(ConfigError, match="at least 100 pairs each"):
        calibrate(dataclasses.replace(one_prompt, rankings=rankings))
    twice = evaluation(np.random.default_rng(0), 150)
    scores = [np.repeat(row, 4, axis=2) for row in twice.scores]
    with pytest.raises(ConfigError, match="has 66 and 84"):  # draws of the noise are no further pairs
        calibrate(dataclasses.replace(twice, scores=scores, draws=tuple(map(NoiseDraw, range(4)))))
    rng = np.random.default_rng(0)
    guesses = [LevelPairs(sigma, rng.standard_normal(4000), np.full(4000, 0.5)) for sigma in (0.2, 0.6)]
    with pytest.raises(ConfigError, match="no better than chance"):
        fit_likelihood(guesses)
    with pytest.raises(ConfigError, match="all right"):
        fit_likelihood([LevelPairs(sigma, 1 + rng.random(400), np.ones(400)) for sigma in (0.2, 0.6)])


def test_a_fit_that_is_no_better_than_a_coin_is_refused():
    """Signs at random: a fit to one half may seem to gain, the other half tells."""
    for seed in range(12):
        found = evaluation(np.random.default_rng(seed), 500)
        signs = np.random.default_rng(100 + seed).choice([-1, 1], 500)
        scores = [row * sign for row, sign in zip(found.scores, signs)]
        with pytest.raises(ConfigError, match="no better than"):
            calibrate(dataclasses.replace(found, scores=scores))


def halves(count):
    """As many prompts that are fitted to, and that judge."""
    prompts = [f"prompt {i}" for i in range(10 * count)]
    return [[p for p in prompts if stable_hash("calibration", p)[0] % 2 == half][:count] for half in (0, 1)]


def of_margins(prompts, margins):
    rankings = [Ranking(prompt, ("a", "b"), (1, 2)) for prompt in prompts]
    scores = [np.array([[margin, margin], [0, 0]], np.float32)[..., None] for margin in margins]
    return Evaluation("test", (0.2, 0.6), (NoiseDraw(0),), rankings, scores, {})


def test_errors_are_those_of_the_prompts_that_judge():
    """All of those have margin 1 and are right: the error is what probability leaves."""
    fitted, judged = halves(600)
    answers = answered(0.4, 600, np.random.default_rng(0))
    found = calibrate(of_margins([*fitted, *judged], [*answers, *np.ones(600)]))
    for sigma, (_, after) in found.errors.items():
        variance = found.likelihood.k * float(sigma) ** 2 + found.likelihood.sigma_0**2
        assert after == pytest.approx(100 * stats.norm.sf(1 / np.sqrt(2 * variance)), abs=0.01)


@pytest.mark.parametrize(("right", "kept"), [(138, False), (144, True)])
def test_a_gain_is_two_errors_of_as_many_pairs(monkeypatch, right, kept):
    """Gains are log 2 Phi(+-1 / sqrt 2) = 0.419 and -0.735: of 200 pairs 138 right are 1.6 errors, 144 are 2.6."""
    fitted, judged = halves(200)
    monkeypatch.setattr(calibration, "fit_likelihood", lambda levels: LossConfig(k=1e-9, sigma_0=1.0))
    given = of_margins([*fitted, *judged], [1] * 200 + [1] * right + [-1] * (200 - right))
    if kept:
        assert calibrate(given).judged_by == 200
    else:
        with pytest.raises(ConfigError, match="no better than a coin"):
            calibrate(given)


def test_pairs_are_counted_and_not_rankings():
    (fitted, judged), rng = halves(100), np.random.default_rng(0)
    rankings = [Ranking(prompt, ("a", "b", "c"), (1, 2, 3)) for prompt in (*fitted, *judged)]
    better = np.array([2.0, 1.0, 0.0])[:, None, None]
    scores = [(better + rng.standard_normal((3, 2, 1))).astype(np.float32) for _ in rankings]
    found = calibrate(Evaluation("test", (0.2, 0.6), (NoiseDraw(0),), rankings, scores, {}))
    assert (found.fitted_to, found.judged_by) == (300, 300)


def test_images_without_a_score_are_no_pairs_to_fit_to():
    some = evaluation(np.random.default_rng(0), 300)
    scores = [row * np.nan if number % 2 else row for number, row in enumerate(some.scores)]
    with pytest.raises(ConfigError, match="at least 100 pairs each"):
        calibrate(dataclasses.replace(some, scores=scores))
