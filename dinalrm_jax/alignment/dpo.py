"""Diffusion-DPO (arXiv 2311.12908) for flow matching: pairs of images, from records or a group's best and worst."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from dinalrm_jax import sampling
from dinalrm_jax.alignment.policy import Policy, PromptBatch, distance, norm_ratio, row_randomness
from dinalrm_jax.alignment.rewards import BROKEN, Rewards
from dinalrm_jax.config import DPOConfig
from dinalrm_jax.model.batch import PreferenceBatch
from dinalrm_jax.model.parameters import Params
from dinalrm_jax.noise import AnyArray, SigmaConfig, add_noise, draw_noise, sampler
from dinalrm_jax.training.objectives import Objective, as_answered
from dinalrm_jax.training.step import Collection


def dpo_loss(
    velocity: Float[AnyArray, "b ..."],
    ref_velocity: Float[AnyArray, "b ..."],
    latents: Float[AnyArray, "b ..."],
    noise: Float[AnyArray, "b ..."],
    beta: float,
) -> Float[Array, ""]:
    """`-log sigmoid(-beta / 2 ((e - e_ref) of the chosen - (e - e_ref) of the rejected))`, averaged over pairs.

    `e` is a row's error of flow matching, `mean |v - (noise - latents)|^2`.

    Args:
        velocity, ref_velocity: (B, ...) of the policy and of the reference; rows alternate chosen, rejected.
        latents, noise: (B, ...) clean latents and their noise, which a pair shares.
        beta: of the order of 1000.
    """
    return dpo_losses(velocity, ref_velocity, latents, noise, beta)[0].mean()


def dpo_losses(velocity, ref_velocity, latents, noise, beta: float, label=1.0) -> tuple[jax.Array, jax.Array]:
    """(B / 2,) losses of the pairs, and how much more the policy gained on the rejected than on the chosen.

    `label` is the probability that the chosen image is preferred, whose other order counts for the rest.
    """
    target = jnp.asarray(noise) - jnp.asarray(latents)

    def error(found):
        return jnp.square(jnp.asarray(found) - target).mean(axis=tuple(range(1, target.ndim)))

    gain = error(velocity) - jax.lax.stop_gradient(error(ref_velocity))
    gap = gain[0::2] - gain[1::2]
    loss, other = -jax.nn.log_sigmoid(-0.5 * beta * gap), -jax.nn.log_sigmoid(0.5 * beta * gap)
    return label * loss + (1 - label) * other, gap


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class JudgedPairs:
    """Pairs that rewards made: what `dpo` learns from, and what is logged of them, a row each."""

    pairs: PreferenceBatch
    metrics: dict[str, jax.Array]


def of_judged(objective: Objective[PreferenceBatch]) -> Objective[JudgedPairs]:
    """`dpo` of pairs that rewards made; where one was not finite, neither is the loss."""

    def judged(params: Params, batch: JudgedPairs, keys: jax.Array):
        losses, metrics = objective(params, batch.pairs, keys)
        return jnp.where(batch.metrics[BROKEN] > 0, jnp.nan, losses), metrics | batch.metrics

    return judged


def dpo(policy: Policy, config: DPOConfig, sigma: SigmaConfig) -> Objective[PreferenceBatch]:
    """`dpo_loss` of pairs, both of whose images are noised alike, at a level that `sigma` draws."""
    sample_sigma = sampler(sigma)

    def objective(params: Params, batch: PreferenceBatch, keys: jax.Array):
        level_keys, noise_keys = row_randomness(keys, 2)
        levels = jnp.repeat(jax.vmap(lambda key: sample_sigma(key, ()))(level_keys), 2)
        latents = jnp.stack([batch.chosen, batch.rejected], axis=1).reshape(-1, *batch.chosen.shape[1:])
        latents = latents.astype(jnp.float32)
        noise = jnp.repeat(draw_noise(noise_keys, batch.chosen.shape), 2, axis=0)
        prompt = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), batch.prompt)
        noisy = add_noise(latents, levels, noise)
        velocity = policy.velocity(params)(noisy, levels, prompt)
        reference = policy.reference(params)(noisy, levels, prompt)
        losses, gap = dpo_losses(velocity, reference, latents, noise, config.beta, batch.certainty)

        def of_pairs(rows):
            return rows.reshape(-1, 2).mean(axis=1)

        return losses, {
            "accuracy": as_answered(gap < 0, batch),
            "reference_distance": of_pairs(distance(velocity, reference)),
            "velocity_ratio": of_pairs(norm_ratio(velocity, reference)),
        }

    return objective


def best_against_worst(policy: Policy, rewards: Rewards, config: DPOConfig) -> Collection:
    """Pairs for `dpo`: the best and the worst of a prompt's images by their rewards; a group's are neighbours."""
    sigmas = jnp.asarray(policy.schedule(config.steps))

    def rows(params: Params, batch: PromptBatch, keys: jax.Array):
        noise_keys, reward_keys = row_randomness(keys, 2)
        guided = sampling.guided(policy.velocity(params), batch.prompt, batch.negative, config.guidance)
        latents = sampling.rollout(guided, draw_noise(noise_keys, (len(keys), *policy.shape)), sigmas).latents
        raw = rewards(params, latents, batch, reward_keys)
        return batch.prompt, latents, raw, rewards.metrics(raw, batch)

    def together(rolled) -> JudgedPairs:
        prompt, latents, raw, metrics = rolled
        worth = rewards.advantages(raw, config.group, "global").reshape(-1, config.group)
        places = jnp.arange(len(worth)) * config.group
        best, worst = (latents[places + find(worth, axis=1)] for find in (jnp.argmax, jnp.argmin))
        pairs = PreferenceBatch(best, worst, jax.tree.map(lambda x: x[places], prompt))
        grouped = {name: x.reshape(-1, config.group, *x.shape[1:]) for name, x in metrics.items()}
        return JudgedPairs(pairs, {name: x.mean(axis=1) for name, x in grouped.items()})

    return Collection(rows, together, config.updates)
