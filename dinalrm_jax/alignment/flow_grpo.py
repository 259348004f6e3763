"""Flow-GRPO (arXiv 2505.05470): images of one prompt are judged against each other; docs/method.md, Alignment."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from dinalrm_jax.noise import AnyArray

EPSILON = 1e-4  # beside the deviation, so that equal rewards give no advantage instead of a division by 0


def group_advantages(
    rewards: Float[AnyArray, " n"], groups: Int[AnyArray, " n"], scale: Literal["global", "group"] = "global"
) -> Float[Array, " n"]:
    """`(reward - mean of its group) / (standard deviation + 1e-4)`.

    Args:
        rewards: (N,).
        groups: (N,) integers; images of one prompt have the same one.
        scale: whose deviation (with n - 1 in its denominator): of all rewards, or of the group's own. A group of one
            has no advantage.
    """
    rewards, groups = jnp.asarray(rewards, jnp.float32), jnp.asarray(groups)
    same = (groups[:, None] == groups).astype(jnp.float32)
    count = same.sum(axis=1)
    centred = rewards - same @ rewards / count
    if scale == "global":
        return centred / (jnp.std(rewards, ddof=1) + EPSILON)
    if scale != "group":
        raise ValueError(f'scale must be "global" or "group", got {scale!r}')
    return centred / (jnp.sqrt(same @ jnp.square(centred) / jnp.maximum(count - 1, 1)) + EPSILON)


def policy_loss(
    log_prob: Float[AnyArray, " b"],
    old_log_prob: Float[AnyArray, " b"],
    advantages: Float[AnyArray, " b"],
    clip_range: float,
    advantage_clip: float = 5.0,
) -> Float[Array, ""]:
    """PPO's clipped loss: the mean of `max(-A r, -A clip(r, 1 - clip_range, 1 + clip_range))`, `r` the ratio.

    Log-probabilities are means over a latent's elements, so that ratios stay within 1e-3 of 1, and so does clip_range.
    """
    return _clipped(jnp.exp(jnp.asarray(log_prob) - jnp.asarray(old_log_prob)), advantages, clip_range, advantage_clip)


def guarded_policy_loss(
    log_prob: Float[AnyArray, " b"],
    old_log_prob: Float[AnyArray, " b"],
    advantages: Float[AnyArray, " b"],
    mean: Float[AnyArray, "b ..."],
    old_mean: Float[AnyArray, "b ..."],
    std: Float[AnyArray, "*s"] | float,
    sqrt_dt: Float[AnyArray, "*s"] | float,
    clip_range: float,
    advantage_clip: float = 5.0,
) -> Float[Array, ""]:
    """GRPO-Guard's loss (arXiv 2510.22319): ratios freed of their bias, and brought to one scale for all steps.

    The drift of the transition's mean makes log-ratios negative on average. It is added back, the sum is multiplied by
    the step's `std * sqrt_dt`, and the loss divided by its time step.

    Args:
        log_prob, old_log_prob, advantages: (B,).
        mean, old_mean: (B, ...) of the transition, now and at the rollout.
        std: the diffusion coefficient: `transition(..).std / sqrt_dt` of "sde" and "dance".
        sqrt_dt: the square root of the step in sigma.
    """
    std, sqrt_dt = jnp.mean(jnp.asarray(std)), jnp.mean(jnp.asarray(sqrt_dt))
    scale = std * sqrt_dt
    drift = jnp.square(jnp.asarray(mean) - jnp.asarray(old_mean))
    bias = drift.mean(axis=tuple(range(1, drift.ndim))) / (2 * scale**2)
    ratio = jnp.exp((jnp.asarray(log_prob) - jnp.asarray(old_log_prob) + bias) * scale)
    return _clipped(ratio, advantages, clip_range, advantage_clip) / sqrt_dt**2


def _clipped(ratio: jax.Array, advantages, clip_range: float, advantage_clip: float) -> jax.Array:
    advantages = jnp.clip(jnp.asarray(advantages), -advantage_clip, advantage_clip)
    return jnp.maximum(-advantages * ratio, -advantages * jnp.clip(ratio, 1 - clip_range, 1 + clip_range)).mean()
