"""Preference likelihoods and losses: pure functions of scores and noise levels, one value a pair.

Thurstone's model with the paper's noise-calibrated uncertainty (arXiv 2602.11146):
`p = Phi((r+ - r-) / sqrt(2 sigma_u^2))` with `sigma_u^2 = k sigma^2 + sigma_0^2`. Everything is
computed in float32 and stays finite, gradients included, for |r+ - r-| up to 1e4.
"""

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr

from dinalrm_jax.config import LossConfig


def calibrated_variance(sigma: jax.Array, k: float = 2.0, sigma_0: float = 0.1) -> jax.Array:
    """`sigma_u^2 = k sigma^2 + sigma_0^2`, the score's variance at noise level `sigma`.

    Paper: k = 2, sigma_0 = 0.1. Released code: k = 2, sigma_0^2 = 0.05.
    """
    return k * jnp.square(jnp.asarray(sigma, jnp.float32)) + sigma_0**2


def standardized_margin(chosen: jax.Array, rejected: jax.Array, variance: jax.Array, epsilon: float = 0.0) -> jax.Array:
    """`z = (r+ - r-) / sqrt(2 sigma_u^2 + epsilon)`, float32; inputs broadcast."""
    difference = jnp.asarray(chosen, jnp.float32) - jnp.asarray(rejected, jnp.float32)
    return difference / jnp.sqrt(2 * jnp.asarray(variance, jnp.float32) + epsilon)


def probability(chosen: jax.Array, rejected: jax.Array, variance: jax.Array) -> jax.Array:
    """Thurstone's probability that `chosen` is preferred, `Phi(z)`."""
    return jax.scipy.special.ndtr(standardized_margin(chosen, rejected, variance))


def preferred(chosen: jax.Array, rejected: jax.Array, sigma: jax.Array, config: LossConfig) -> jax.Array:
    """The probability that `chosen` is preferred, by the likelihood that a model was trained with, (B,) float32.

    Thurstone's with the configured variance (without the released code's epsilon), or Bradley and Terry's,
    `sigmoid(r+ - r-)`, whose margin is part of the loss only.
    """
    if config.name == "bradley_terry":
        return jax.nn.sigmoid(jnp.asarray(chosen, jnp.float32) - jnp.asarray(rejected, jnp.float32))
    return probability(chosen, rejected, score_variance(sigma, config))


def score_variance(sigma: jax.Array, config: LossConfig) -> jax.Array:
    """The configured `sigma_u^2` at noise levels `sigma`."""
    if config.variance == "constant":
        return jnp.full(jnp.shape(sigma), config.constant_variance, jnp.float32)
    return calibrated_variance(sigma, config.k, config.sigma_0)


def fidelity_loss(z: jax.Array, label: jax.Array | float = 1.0, epsilon: float = 0.0) -> jax.Array:
    """FRank's fidelity loss `1 - sqrt(y p) - sqrt((1 - y)(1 - p))` with `p = Phi(z)`.

    Args:
        z: standardized margins.
        label: y in [0, 1], the probability that the first item is preferred; 1 gives `1 - sqrt(p)`.
        epsilon: added inside the square roots, `sqrt(y p + epsilon)`, as the released code does.
    """
    if epsilon:
        p = jax.scipy.special.ndtr(z)
        y = jnp.asarray(label)
        # A term that the label rules out is left out, epsilon and all: the released loss has one term.
        first = jnp.where(y == 0, 0.0, jnp.sqrt(y * p + epsilon))
        second = jnp.where(y == 1, 0.0, jnp.sqrt((1 - y) * (1 - p) + epsilon))
        return 1 - first - second
    # sqrt(Phi(z)) through its logarithm: sqrt's own derivative is infinite where Phi underflows.
    first, second = jnp.exp(0.5 * log_ndtr(z)), jnp.exp(0.5 * log_ndtr(-z))
    return 1 - jnp.sqrt(label) * first - jnp.sqrt(1 - jnp.asarray(label)) * second


def nll_loss(z: jax.Array) -> jax.Array:
    """`-log Phi(z)`."""
    return -log_ndtr(z)


def bradley_terry_loss(chosen: jax.Array, rejected: jax.Array, margin: float = 0.0) -> jax.Array:
    """`-log sigmoid(r+ - r- - margin)`."""
    return jax.nn.softplus(margin - (jnp.asarray(chosen, jnp.float32) - jnp.asarray(rejected, jnp.float32)))


def pair_loss(chosen: jax.Array, rejected: jax.Array, sigma: jax.Array, config: LossConfig) -> jax.Array:
    """The configured loss of each pair.

    Args:
        chosen, rejected: (B,) scores of the preferred and the other image.
        sigma: (B,) the noise level both were scored at; (K, B) of an ensemble, whose variance is the levels' mean.
        config: which loss, with its constants.

    Returns:
        (B,) float32.
    """
    if config.name == "bradley_terry":
        return bradley_terry_loss(chosen, rejected, config.margin)
    variance = score_variance(sigma, config)
    if variance.ndim > 1:
        variance = variance.mean(axis=0)
    z = standardized_margin(chosen, rejected, variance, config.epsilon)
    return nll_loss(z) if config.name == "nll" else fidelity_loss(z, epsilon=config.epsilon)
