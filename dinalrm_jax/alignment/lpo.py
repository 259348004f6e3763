"""LPO (arXiv 2502.01051): candidates of one sampling step are compared by a reward of noisy latents."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from dinalrm_jax.noise import AnyArray


def lpo_threshold(stds: Float[AnyArray, " steps"], low: float, high: float) -> Float[Array, " steps"]:
    """What a pair's probabilities must differ by: `low` at the step of least noise, `high` at that of most, affine."""
    stds = jnp.asarray(stds)
    return low + (stds - stds.min()) / (stds.max() - stds.min()) * (high - low)


def lpo_pairs(
    scores: Float[AnyArray, "k b"], threshold: Float[AnyArray, " b"]
) -> tuple[Int[Array, " b"], Int[Array, " b"], Bool[Array, " b"]]:
    """The best and the worst of K candidates, and whether they differ enough to be a pair.

    Args:
        scores: (K, B).
        threshold: (B,) of the difference of the two's softmax, `tanh((best - worst) / 2)`.

    Returns:
        (winner, loser, kept): (B,) indices of candidates, and booleans.
    """
    scores = jnp.asarray(scores)
    gap = jnp.tanh((scores.max(axis=0) - scores.min(axis=0)) / 2)
    return scores.argmax(axis=0), scores.argmin(axis=0), gap > jnp.asarray(threshold)


def lpo_loss(
    log_ratio_winner: Float[AnyArray, " b"],
    log_ratio_loser: Float[AnyArray, " b"],
    beta: float = 500.0,
    epsilon: float = 0.1,
) -> Float[Array, ""]:
    """`-log sigmoid(beta (log r_winner - log r_loser))`, ratios clipped to `1 +- epsilon` each; a mean.

    Args:
        log_ratio_winner, log_ratio_loser: (B,) log-probabilities of the step under the policy less those under the
            reference. One beyond the clip has no gradient.
    """
    winner, loser = (
        jnp.log(jnp.clip(jnp.exp(jnp.asarray(ratio)), 1 - epsilon, 1 + epsilon))
        for ratio in (log_ratio_winner, log_ratio_loser)
    )
    return -jax.nn.log_sigmoid(beta * (winner - loser)).mean()
