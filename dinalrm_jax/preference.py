"""Preference likelihoods and losses: pure functions of scores and noise levels, one value a pair.

Thurstone's model with the paper's noise-calibrated uncertainty (arXiv 2602.11146):
`p = Phi((r+ - r-) / sqrt(2 sigma_u^2))` with `sigma_u^2 = k sigma^2 + sigma_0^2`. Everything is
computed in float32 and stays finite, gradients included, for |r+ - r-| up to 1e4.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.special import log_ndtr
from jax.typing import ArrayLike
from jaxtyping import Float

from dinalrm_jax.mapping import ConfigError, refuse_ignored
from dinalrm_jax.noise import AnyArray


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """A pair loss of `dinalrm_jax.preference`; the defaults are the paper's constants.

    variance: "calibrated" is `k sigma^2 + sigma_0^2`, "constant" is `constant_variance` at every level.
    epsilon: added inside both square roots by the released code (1e-6); 0 is the paper's formula.
    margin: of the Bradley-Terry loss only, which has neither variance nor epsilon.
    """

    name: Literal["fidelity", "nll", "bradley_terry"] = "fidelity"
    variance: Literal["calibrated", "constant"] = "calibrated"
    k: float = 2.0
    sigma_0: float = 0.1
    constant_variance: float = 0.5
    epsilon: float = 0.0
    margin: float = 0.0

    def __post_init__(self):
        if self.variance == "calibrated" and not (self.k >= 0 and self.sigma_0 > 0):
            raise ConfigError(f"calibrated variance needs k >= 0 and sigma_0 > 0, got {self.k} and {self.sigma_0}")
        if self.variance == "constant" and not self.constant_variance > 0:
            raise ConfigError(f"constant_variance must be positive, got {self.constant_variance}")
        if self.name == "bradley_terry":
            refuse_ignored(
                self, ("variance", "k", "sigma_0", "constant_variance", "epsilon"), "the Bradley-Terry loss has none"
            )
        else:
            refuse_ignored(self, ("margin",), f"the {self.name} loss has none")
            if self.variance == "constant":
                refuse_ignored(self, ("k", "sigma_0"), "the variance is constant_variance")
            else:
                refuse_ignored(self, ("constant_variance",), "the variance is k sigma^2 + sigma_0^2")
        if self.name == "nll" and self.epsilon:
            raise ConfigError(f"epsilon is {self.epsilon}, but it belongs to the fidelity loss; leave it at 0")


def calibrated_variance(sigma: Float[ArrayLike, "*k"], k: float = 2.0, sigma_0: float = 0.1) -> Float[Array, "*k"]:
    """`sigma_u^2 = k sigma^2 + sigma_0^2`, the score's variance at noise level `sigma`.

    Paper: k = 2, sigma_0 = 0.1. Released code: k = 2, sigma_0^2 = 0.05.
    """
    return k * jnp.square(jnp.asarray(sigma, jnp.float32)) + sigma_0**2


def standardized_margin(chosen: ArrayLike, rejected: ArrayLike, variance: ArrayLike, epsilon: float = 0.0) -> jax.Array:
    """`z = (r+ - r-) / sqrt(2 sigma_u^2 + epsilon)`, float32; inputs broadcast."""
    difference = jnp.asarray(chosen, jnp.float32) - jnp.asarray(rejected, jnp.float32)
    return difference / jnp.sqrt(2 * jnp.asarray(variance, jnp.float32) + epsilon)


def probability(chosen: ArrayLike, rejected: ArrayLike, variance: ArrayLike) -> jax.Array:
    """Thurstone's probability that `chosen` is preferred, `Phi(z)`."""
    return jax.scipy.special.ndtr(standardized_margin(chosen, rejected, variance))


def preferred(
    chosen: Float[ArrayLike, " b"],
    rejected: Float[ArrayLike, " b"],
    sigma: Float[ArrayLike, ""] | Float[ArrayLike, " b"],
    config: LossConfig,
) -> Float[Array, " b"]:
    """The probability that `chosen` is preferred, by the likelihood that a model was trained with, (B,) float32.

    Thurstone's with the configured variance (without the released code's epsilon), or Bradley and Terry's,
    `sigmoid(r+ - r-)`, whose margin is part of the loss only.
    """
    if config.name == "bradley_terry":
        return jax.nn.sigmoid(jnp.asarray(chosen, jnp.float32) - jnp.asarray(rejected, jnp.float32))
    return probability(chosen, rejected, score_variance(sigma, config))


def score_variance(sigma: Float[ArrayLike, "*k"], config: LossConfig) -> Float[Array, "*k"]:
    """The configured `sigma_u^2` at noise levels `sigma`."""
    if config.variance == "constant":
        return jnp.full(jnp.shape(sigma), config.constant_variance, jnp.float32)
    return calibrated_variance(sigma, config.k, config.sigma_0)


def fidelity_loss(z: ArrayLike, label: ArrayLike | float = 1.0, epsilon: float = 0.0) -> jax.Array:
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
    z = jnp.asarray(z)
    # sqrt(Phi(z)) through its logarithm: sqrt's own derivative is infinite where Phi underflows.
    first, second = jnp.exp(0.5 * log_ndtr(z)), jnp.exp(0.5 * log_ndtr(-z))
    return 1 - jnp.sqrt(label) * first - jnp.sqrt(1 - jnp.asarray(label)) * second


def nll_loss(z: Float[ArrayLike, "*b"]) -> Float[Array, "*b"]:
    """`-log Phi(z)`."""
    return -log_ndtr(z)


def bradley_terry_loss(chosen: ArrayLike, rejected: ArrayLike, margin: float = 0.0) -> jax.Array:
    """`-log sigmoid(r+ - r- - margin)`."""
    return jax.nn.softplus(margin - (jnp.asarray(chosen, jnp.float32) - jnp.asarray(rejected, jnp.float32)))


def soft_pair_loss(
    score_0: Float[ArrayLike, " b"],
    score_1: Float[ArrayLike, " b"],
    label_0: Float[ArrayLike, " b"],
    margin: float = 0.0,
) -> Float[Array, " b"]:
    """Bradley and Terry's loss under soft labels, as the LRM has it (arXiv 2502.01051).

    `-y log sigmoid(d) - (1 - y) log sigmoid(-d)`, `d` the difference of the scores, less log 2 where y is exactly 1/2:
    a tie that the scores tie too costs nothing.

    Args:
        score_0, score_1: (B,) of two images.
        label_0: (B,) y, the probability that the first is preferred.
        margin: by which the preferred image's score is to be the higher.
    """
    label = jnp.asarray(label_0, jnp.float32)
    first, second = (bradley_terry_loss(*scores, margin) for scores in ((score_0, score_1), (score_1, score_0)))
    return label * first + (1 - label) * second - jnp.where(label == 0.5, jnp.log(2.0), 0.0)


def prompt_weights(counts: Float[AnyArray, " b"]) -> Float[AnyArray, " b"]:
    """(B,) weights of pairs, of sum 1, so that a prompt with many pairs counts no more than another.

    `w_i = (1 / n_i) / sum_j (1 / n_j)`.

    Args:
        counts: (B,) how many pairs each pair's prompt has in the data set, n.
    """
    inverse = 1 / counts
    return inverse / inverse.sum()


def pair_loss(
    chosen: Float[ArrayLike, " b"],
    rejected: Float[ArrayLike, " b"],
    sigma: Float[ArrayLike, " b"] | Float[ArrayLike, "k b"],
    config: LossConfig,
    label: Float[ArrayLike, " b"] | float = 1.0,
) -> Float[Array, " b"]:
    """The configured loss of each pair.

    Args:
        chosen, rejected: (B,) scores of the preferred and the other image.
        sigma: (B,) the noise level both were scored at; (K, B) of an ensemble, whose variance is the levels' mean.
        config: which loss, with its constants.
        label: (B,) the probability that `chosen` is preferred: 1, or less where people were not sure, 1/2 of a tie.

    Returns:
        (B,) float32.

    Raises:
        ValueError: shapes that differ, where broadcasting would compare images of other pairs.
    """
    if not jnp.shape(chosen) == jnp.shape(rejected) == jnp.shape(sigma)[-1:]:
        raise ValueError(
            "chosen, rejected and sigma must have one number a pair, got "
            f"{jnp.shape(chosen)}, {jnp.shape(rejected)} and {jnp.shape(sigma)}"
        )
    if config.name == "bradley_terry":
        return soft_pair_loss(chosen, rejected, jnp.broadcast_to(label, jnp.shape(chosen)), config.margin)
    variance = score_variance(sigma, config)
    if variance.ndim > 1:
        variance = variance.mean(axis=0)
    z = standardized_margin(chosen, rejected, variance, config.epsilon)
    if config.name == "nll":
        return jnp.asarray(label * nll_loss(z) + (1 - label) * nll_loss(-z))
    return fidelity_loss(z, label, config.epsilon)
