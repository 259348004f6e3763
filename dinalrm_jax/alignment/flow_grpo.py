"""Flow-GRPO (arXiv 2505.05470): images of one prompt are judged against each other; docs/method.md, Alignment."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from dinalrm_jax import sampling
from dinalrm_jax.alignment.policy import Policy, PromptBatch, distance, like, norm_ratio, row_randomness
from dinalrm_jax.alignment.rewards import Rewards
from dinalrm_jax.config import FlowGRPOConfig
from dinalrm_jax.model.parameters import Params
from dinalrm_jax.noise import AnyArray, draw_noise
from dinalrm_jax.training.objectives import Objective
from dinalrm_jax.training.step import Collection


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
    ratio = jnp.exp(jnp.asarray(log_prob) - jnp.asarray(old_log_prob))
    return _clipped(ratio, advantages, clip_range, advantage_clip).mean()


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
    log_ratio = _freed(jnp.asarray(log_prob) - jnp.asarray(old_log_prob), mean, old_mean, std, sqrt_dt)
    return (_clipped(jnp.exp(log_ratio), advantages, clip_range, advantage_clip) / sqrt_dt**2).mean()


def _freed(log_ratio: jax.Array, mean, old_mean, std, sqrt_dt) -> jax.Array:
    """(B,) log-ratios of `guarded_policy_loss`; std and sqrt_dt may be of each row."""
    scale = std * sqrt_dt
    drift = jnp.square(jnp.asarray(mean) - jnp.asarray(old_mean))
    bias = drift.mean(axis=tuple(range(1, drift.ndim))) / (2 * scale**2)
    return (log_ratio + bias) * scale


def _clipped(ratio: jax.Array, advantages, clip_range: float, advantage_clip: float) -> jax.Array:
    """(B,) of `policy_loss`."""
    advantages = jnp.clip(jnp.asarray(advantages), -advantage_clip, advantage_clip)
    return jnp.maximum(-advantages * ratio, -advantages * jnp.clip(ratio, 1 - clip_range, 1 + clip_range))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rolled:
    """What Flow-GRPO learns from: B sampled images, w steps of each.

    Attributes:
        batch: their prompts.
        first: (B,) the window's first step.
        window: (B, w + 1, H, W, C) latents before every step of it, and after the last.
        old_mean: (B, w, H, W, C) of the steps' transitions when they were sampled.
        rewards: (B,) raw, by name.
        advantage: (B,).
        fresh: (B,) whether the policy that is updated is still the one that sampled.
    """

    batch: PromptBatch
    first: jax.Array
    window: jax.Array
    old_mean: jax.Array
    rewards: dict[str, jax.Array]
    advantage: jax.Array
    fresh: jax.Array


def flow_grpo(
    policy: Policy, rewards: Rewards, config: FlowGRPOConfig, reference_weight: float
) -> tuple[Collection, Objective[Rolled]]:
    """Images of every prompt by a rollout, and the clipped loss of its steps with noise beside their KL divergence.

    A group's images are neighbours in the batch; "global" scale is that of all devices along `data`.
    """
    sigmas = jnp.asarray(policy.schedule(config.steps))

    def rows(params: Params, batch: PromptBatch, keys: jax.Array) -> Rolled:
        noise_keys, window_keys, step_keys, reward_keys = row_randomness(keys, 4)
        latest = config.last - config.window
        first = jax.vmap(lambda key: jax.random.randint(key, (), config.first, latest + 1))(window_keys)
        rolled = sampling.rollout(
            sampling.guided(policy.velocity(params), batch.prompt, batch.negative, config.guidance),
            draw_noise(noise_keys, (len(keys), *policy.shape)),
            sigmas,
            kind=config.kind,
            noise_level=config.noise_level,
            keys=step_keys,
            window=first,
            length=config.window,
        )
        raw = rewards(params, rolled.latents, batch, reward_keys)
        window, mean = (array.swapaxes(0, 1) for array in (rolled.window, rolled.mean))
        empty = jnp.zeros(len(keys))
        return Rolled(batch, first, window, mean, raw, empty, empty)

    def together(rolled: Rolled) -> Rolled:
        advantage = rewards.advantages(rolled.rewards, config.group, config.scale)
        advantage = jnp.clip(advantage, -config.advantage_clip, config.advantage_clip)
        # Along `data` and `fsdp` every device's rows begin at a multiple of the updates.
        fresh = jnp.arange(len(advantage)) % config.updates == 0
        return dataclasses.replace(rolled, advantage=advantage, fresh=fresh)

    def objective(params: Params, rolled: Rolled, keys: jax.Array):
        batch = rolled.batch
        guided = sampling.guided(policy.velocity(params), batch.prompt, batch.negative, config.guidance)
        reference_of = sampling.guided(policy.reference(params), batch.prompt, batch.negative, config.guidance)

        def step(number: jax.Array):
            x, after, old = rolled.window[:, number], rolled.window[:, number + 1], rolled.old_mean[:, number]
            sigma, following = sigmas[rolled.first + number], sigmas[rolled.first + number + 1]
            velocity, reference = guided(x, sigma), reference_of(x, sigma)
            t, wanted = (
                sampling.transition(config.kind, x, v, sigma, following, config.noise_level, sigmas[1])
                for v in (velocity, reference)
            )
            # A ratio to itself is 1 by definition, and not up to how two programs round.
            old = jnp.where(like(rolled.fresh, x), jax.lax.stop_gradient(t.mean), old)
            log_ratio = sampling.log_ratio(config.kind, t, old, after)
            sqrt_dt = jnp.sqrt(sigma - following)
            if config.guard:
                log_ratio = _freed(log_ratio, t.mean, old, t.std / sqrt_dt, sqrt_dt)
            loss = _clipped(jnp.exp(log_ratio), rolled.advantage, config.clip_range, config.advantage_clip)
            if config.guard:
                loss /= sigma - following
            # The KL divergence is divided by what the released code divides it by: without the step's length.
            spread = t.std if config.kind == "cps" else t.std / sqrt_dt
            kl = distance(t.mean, wanted.mean) / (2 * spread**2)
            return loss, log_ratio, kl, norm_ratio(velocity, reference)

        found = jax.lax.map(step, jnp.arange(config.window))
        loss, _, kl, velocity_ratio = (array.mean(axis=0) for array in found)
        log_ratio = found[1]
        metrics = rewards.metrics(rolled.rewards, batch) | {
            "advantage": jnp.abs(rolled.advantage),
            "log_ratio": jnp.abs(log_ratio).mean(axis=0),
            "clipped": (jnp.abs(jnp.expm1(log_ratio)) > config.clip_range).mean(axis=0),
            "kl": kl,
            "velocity_ratio": velocity_ratio,
        }
        return loss + reference_weight * rewards.doubt(rolled.rewards) * kl, metrics

    return Collection(rows, together, config.updates), objective
