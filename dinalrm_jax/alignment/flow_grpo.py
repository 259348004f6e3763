"""Flow-GRPO (arXiv 2505.05470): images of one prompt are judged against each other; docs/method.md, Alignment."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from dinalrm_jax import sampling
from dinalrm_jax.alignment.policy import Policy, PromptBatch, Reward, distance, norm_ratio, of_the_first, row_randomness
from dinalrm_jax.config import FlowGRPOConfig
from dinalrm_jax.model.parameters import Params
from dinalrm_jax.noise import AnyArray, draw_noise
from dinalrm_jax.training.objectives import Objective

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


def flow_grpo_objective(
    policy: Policy, reward: Reward, config: FlowGRPOConfig, reference_weight: float
) -> Objective[PromptBatch]:
    """One update a rollout: `-A exp(log p - log p at the rollout)` of the window's steps, and the KL's estimate.

    The policy that samples is the one that is updated, so ratios are 1 and no clip of theirs would ever act.
    A group's images are neighbours in the batch; "global" scale is that of all devices along `data`.
    """
    sigmas = jnp.asarray(policy.schedule(config.steps))

    def objective(params: Params, batch: PromptBatch, keys: jax.Array):
        rows = len(keys)
        noise_keys, window_keys, step_keys, reward_keys = row_randomness(keys, 4)
        begin = of_the_first(jax.random.randint(window_keys[0], (), config.first, config.last - config.window + 1))
        still = policy.velocity(jax.lax.stop_gradient(params))
        rolled = sampling.rollout(
            sampling.guided(still, batch.prompt, batch.negative, config.guidance),
            draw_noise(noise_keys, (rows, *policy.shape)),
            sigmas,
            kind=config.kind,
            noise_level=config.noise_level,
            keys=step_keys,
            window=begin,
            length=config.window,
        )
        raw = jax.lax.stop_gradient(reward(params, rolled.latents, batch.reward_prompt, reward_keys))
        advantages = _of_all_devices(raw, config)
        tuned, plain = policy.velocity(params), policy.reference(params)
        guided = sampling.guided(tuned, batch.prompt, batch.negative, config.guidance)
        reference_of = sampling.guided(plain, batch.prompt, batch.negative, config.guidance)

        def step(number: jax.Array):
            x, after = rolled.window[number], rolled.window[number + 1]
            sigma, following = sigmas[begin + number], sigmas[begin + number + 1]
            level = jnp.broadcast_to(sigma, rows)
            velocity, reference = guided(x, level), reference_of(x, level)
            mean, wanted = (
                sampling.transition(config.kind, x, v, sigma, following, config.noise_level, sigmas[1])
                for v in (velocity, reference)
            )
            log_ratio = sampling.log_prob(config.kind, mean, after) - rolled.log_prob[number]
            # The KL divergence is divided by what the released code divides it by: without the step's length.
            spread = mean.std if config.kind == "cps" else mean.std / jnp.sqrt(sigma - following)
            kl = distance(mean.mean, wanted.mean) / (2 * spread**2)
            return log_ratio, kl, norm_ratio(velocity, reference)

        log_ratio, kl, ratio = (found.mean(axis=0) for found in jax.lax.map(step, jnp.arange(config.window)))
        losses = -advantages * jnp.exp(log_ratio) + reference_weight * kl
        metrics = {
            "reward": raw, "advantage": advantages, "log_ratio": jnp.abs(log_ratio), "kl": kl, "velocity_ratio": ratio,
        }  # fmt: skip
        return losses, metrics

    return objective


def _of_all_devices(rewards: jax.Array, config: FlowGRPOConfig) -> jax.Array:
    """This device's advantages, clipped; rewards of others count for the deviation."""
    axes = jax.sharding.get_abstract_mesh().manual_axes
    everywhere, first = rewards, jnp.zeros((), jnp.int32)
    if "data" in axes:
        everywhere = jax.lax.all_gather(rewards, "data", tiled=True)
        first = jax.lax.axis_index("data") * len(rewards)
    groups = jnp.arange(len(everywhere)) // config.group
    advantages = group_advantages(everywhere, groups, config.scale)
    own = jax.lax.dynamic_slice_in_dim(advantages, first, len(rewards))
    return jnp.clip(own, -config.advantage_clip, config.advantage_clip)
