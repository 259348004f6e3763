"""DiffusionNFT (arXiv 2509.16117): the forward process alone, towards what was judged well and away from the rest."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from dinalrm_jax import sampling
from dinalrm_jax.alignment.policy import Policy, PromptBatch, distance, norm_ratio, row_randomness
from dinalrm_jax.alignment.rewards import Rewards
from dinalrm_jax.config import NFTConfig
from dinalrm_jax.model.parameters import Params
from dinalrm_jax.noise import AnyArray, SigmaConfig, add_noise, draw_noise, sampler
from dinalrm_jax.training.objectives import Objective
from dinalrm_jax.training.step import Collection

LEAST = 1e-5  # of the error that a row's loss is divided by


def nft_weight(advantages: Float[AnyArray, " b"], advantage_clip: float = 5.0) -> Float[Array, " b"]:
    """Advantages as probabilities that an image is a good one: clipped, then from [-clip, clip] to [0, 1]."""
    return jnp.clip(jnp.asarray(advantages), -advantage_clip, advantage_clip) / (2 * advantage_clip) + 0.5


def nft_loss(
    velocity: Float[AnyArray, "b ..."],
    old_velocity: Float[AnyArray, "b ..."],
    ref_velocity: Float[AnyArray, "b ..."],
    x0: Float[AnyArray, "b ..."],
    x_sigma: Float[AnyArray, "b ..."],
    sigma: Float[AnyArray, " b"],
    weight: Float[AnyArray, " b"],
    beta: float,
    kl: float,
    advantage_clip: float = 5.0,
) -> Float[Array, ""]:
    """The loss of the two mixtures `(1 -+ beta) v_old +- beta v`, the positive one by a row's weight.

    Each mixture's clean latents are compared with the image's, relative to their own mean error (without a gradient).

    Args:
        velocity, old_velocity, ref_velocity: (B, ...) of the policy, of the one that sampled, and of the reference.
        x0, x_sigma: (B, ...) sampled latents, clean and noised.
        sigma: (B,) their levels.
        weight: (B,) of `nft_weight`.
        beta: how far the mixtures go from the old policy.
        kl: of the squared distance to the reference.
    """
    losses = nft_losses(velocity, old_velocity, x0, x_sigma, sigma, weight, beta, advantage_clip)
    return (losses + kl * distance(jnp.asarray(velocity), jax.lax.stop_gradient(jnp.asarray(ref_velocity)))).mean()


def nft_losses(velocity, old_velocity, x0, x_sigma, sigma, weight, beta: float, advantage_clip: float) -> jax.Array:
    """(B,) of `nft_loss` without its reference."""
    v, x0, x_sigma = jnp.asarray(velocity), jnp.asarray(x0), jnp.asarray(x_sigma)
    old = jax.lax.stop_gradient(jnp.asarray(old_velocity))
    axes = tuple(range(1, v.ndim))
    level = jnp.asarray(sigma).reshape((-1,) + (1,) * len(axes))

    def relative_error(mixture):
        gap = x_sigma - level * mixture - x0
        size = jax.lax.stop_gradient(jnp.maximum(jnp.abs(gap).mean(axis=axes, keepdims=True), LEAST))
        return (jnp.square(gap) / size).mean(axis=axes)

    towards = relative_error(beta * v + (1 - beta) * old)
    away = relative_error((1 + beta) * old - beta * v)
    weight = jnp.asarray(weight)
    return advantage_clip * (weight * towards + (1 - weight) * away) / beta


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Judged:
    """What DiffusionNFT learns from: B sampled images, each noised at several levels.

    Attributes:
        batch: their prompts.
        x0: (B, H, W, C).
        levels: (B, n).
        noise, old_velocity: (B, n, H, W, C); what the sampling policy says there.
        rewards: (B,) raw, by name.
        weight: (B,) of `nft_weight`.
    """

    batch: PromptBatch
    x0: jax.Array
    levels: jax.Array
    noise: jax.Array
    old_velocity: jax.Array
    rewards: dict[str, jax.Array]
    weight: jax.Array


def nft(
    policy: Policy, rewards: Rewards, config: NFTConfig, reference_weight: float, sigma: SigmaConfig
) -> tuple[Collection, Objective[Judged]]:
    """Images of every prompt by the averaged policy, and `nft_loss` towards and away from them."""
    sigmas, sample_sigma = jnp.asarray(policy.schedule(config.steps)), sampler(sigma)

    def rows(params: Params, batch: PromptBatch, keys: jax.Array) -> Judged:
        noise_keys, level_keys, eps_keys, reward_keys = row_randomness(keys, 4)
        velocity = policy.velocity(params)
        guided = sampling.guided(velocity, batch.prompt, batch.negative, config.guidance)
        x0 = sampling.rollout(guided, draw_noise(noise_keys, (len(keys), *policy.shape)), sigmas).latents
        raw = rewards(params, x0, batch, reward_keys)

        def at_a_level(number: jax.Array):
            def of(keys):
                return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)

            level = jax.vmap(lambda key: sample_sigma(key, ()))(of(level_keys))
            noise = draw_noise(of(eps_keys), x0.shape)
            return level, noise, velocity(add_noise(x0, level, noise), level, batch.prompt)

        found = jax.lax.map(at_a_level, jnp.arange(config.levels))
        levels, noise, old = (array.swapaxes(0, 1) for array in found)
        return Judged(batch, x0, levels, noise, old, raw, jnp.zeros(len(keys)))

    def together(judged: Judged) -> Judged:
        advantages = rewards.advantages(judged.rewards, config.group, "global")
        return dataclasses.replace(judged, weight=nft_weight(advantages, config.advantage_clip))

    def objective(params: Params, judged: Judged, keys: jax.Array):
        def at_a_level(number: jax.Array):
            level, noise = judged.levels[:, number], judged.noise[:, number]
            x = add_noise(judged.x0, level, noise)
            velocity = policy.velocity(params)(x, level, judged.batch.prompt)
            reference = policy.reference(params)(x, level, judged.batch.prompt)
            losses = nft_losses(
                velocity, judged.old_velocity[:, number], judged.x0, x, level, judged.weight, config.beta,
                config.advantage_clip,
            )  # fmt: skip
            return losses, distance(velocity, reference), norm_ratio(velocity, reference)

        losses, away, ratio = (x.mean(axis=0) for x in jax.lax.map(at_a_level, jnp.arange(config.levels)))
        losses += reference_weight * rewards.doubt(judged.rewards) * away
        metrics = rewards.metrics(judged.rewards, judged.batch)
        return losses, metrics | {"reference_distance": away, "velocity_ratio": ratio}

    return Collection(rows, together, config.updates, averaged=True), objective
