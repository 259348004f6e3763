import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dinalrm_jax import preference
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.preference import LossConfig

LOSSES = {
    "fidelity, paper": LossConfig(),
    "fidelity, released": LossConfig(sigma_0=0.05**0.5, epsilon=1e-6),
    "fidelity, constant variance": LossConfig(variance="constant"),
    "nll": LossConfig(name="nll"),
    "bradley_terry": LossConfig(name="bradley_terry"),
    "bradley_terry with margin": LossConfig(name="bradley_terry", margin=1.0),
}


@pytest.mark.parametrize("config", LOSSES.values(), ids=LOSSES.keys())
def test_finite_and_monotone_everywhere(config):
    """Loss and gradient for |r+ - r-| up to 1e4 and sigma from 0 to 1, in float32."""
    differences = np.array([-1e4, -300.0, -1.0, 0.0, 1.0, 300.0, 1e4], np.float32)
    grid = np.array(list(itertools.product([0.0, 1e-3, 0.4, 1.0], differences)), np.float32)

    def total(chosen):
        return preference.pair_loss(chosen, jnp.zeros(len(grid)), grid[:, 0], config).sum()

    losses = preference.pair_loss(grid[:, 1], jnp.zeros(len(grid)), grid[:, 0], config).reshape(4, -1)
    gradient = jax.grad(total)(jnp.asarray(grid[:, 1])).reshape(4, -1)
    assert np.isfinite(losses).all()
    assert np.isfinite(gradient).all()
    assert (np.diff(losses, axis=1) <= 0).all(), "a larger margin must never cost more"
    assert (gradient <= 0).all()
    assert (gradient[:, 3] < -1e-3).all(), "an undecided pair must be pushed"


def test_paper_values_by_hand():
    # sigma 0.4: sigma_u^2 = 2 * 0.16 + 0.01 = 0.33; z = 0.5 / sqrt(0.66) = 0.61546; Phi(z) = 0.73087.
    assert preference.calibrated_variance(0.4) == pytest.approx(0.33)
    assert preference.probability(0.5, 0.0, preference.calibrated_variance(0.4)) == pytest.approx(0.73087, abs=1e-5)
    loss = preference.pair_loss(jnp.array([0.5]), jnp.array([0.0]), jnp.array([0.4]), LossConfig())
    np.testing.assert_allclose(loss, 1 - np.sqrt(0.73087), atol=1e-5)
    nll = preference.pair_loss(jnp.array([0.5]), jnp.array([0.0]), jnp.array([0.4]), LossConfig(name="nll"))
    np.testing.assert_allclose(nll, -np.log(0.73087), atol=1e-5)


def test_noise_softens_the_preference():
    probabilities = preference.probability(1.0, 0.0, preference.calibrated_variance(np.array([0.0, 0.3, 0.9])))
    assert np.all(np.diff(probabilities) < 0)
    assert probabilities[0] > 0.999999


@pytest.mark.parametrize("epsilon", [0.0, 1e-6])
def test_soft_labels(epsilon):
    z = jnp.array([-1.2, 0.0, 0.7])
    hard = preference.fidelity_loss(z, 1.0, epsilon)
    np.testing.assert_allclose(preference.fidelity_loss(-z, 0.0, epsilon), hard, atol=1e-6)
    # The loss of a soft label is zero exactly where the model says that probability.
    label = jax.scipy.special.ndtr(z)
    np.testing.assert_allclose(preference.fidelity_loss(z, label, epsilon), 0, atol=1e-5)
    assert (preference.fidelity_loss(z + 0.5, label, epsilon) > 1e-3).all()


def test_constants_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="sigma_0 > 0"):
        LossConfig(sigma_0=0.0)
    with pytest.raises(ConfigError, match="constant_variance must be positive"):
        LossConfig(variance="constant", constant_variance=0.0)


def test_probabilities_are_those_of_the_likelihood():
    chosen, rejected, sigma = np.array([0.5, -1.0]), np.array([0.0, 0.2]), np.array([0.4, 0.1])
    difference = chosen - rejected

    def found(**values):
        return np.asarray(preference.preferred(chosen, rejected, sigma, LossConfig(**values)))

    np.testing.assert_allclose(found()[0], 0.73087, atol=1e-5)
    np.testing.assert_allclose(
        found(variance="constant", constant_variance=2.0), stats.norm.cdf(difference / 2), atol=1e-6
    )
    for margin in (0.0, 1.0):
        probabilities = found(name="bradley_terry", margin=margin)
        np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-difference)), atol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"margin": 1.0}, "margin = 1.0 would have no effect: the fidelity loss has none"),
        ({"constant_variance": 9.0}, r"constant_variance = 9.0 would have no effect: the variance is k sigma\^2"),
        ({"margin": 1.0, "constant_variance": 9.0}, "would have no effect"),
        ({"variance": "constant", "k": 1.0, "sigma_0": 0.5}, "k = 1.0, sigma_0 = 0.5 would have no effect"),
        ({"name": "bradley_terry", "variance": "constant"}, "variance = 'constant' would have no effect: the Bradley"),
        ({"name": "bradley_terry", "epsilon": 1e-6}, "epsilon = 1e-06 would have no effect"),
        ({"name": "nll", "epsilon": 1e-6}, "epsilon is 1e-06, but it belongs to the fidelity loss"),
    ],
)
def test_values_without_effect_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        LossConfig(**values)
