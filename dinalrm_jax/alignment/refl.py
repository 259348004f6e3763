"""ReFL (arXiv 2304.05977) with a reward of latents: its own gradient, through one denoising step."""

import jax
import jax.numpy as jnp

from dinalrm_jax import sampling
from dinalrm_jax.alignment.policy import Policy, PromptBatch, distance, norm_ratio, of_the_first, row_randomness
from dinalrm_jax.alignment.rewards import Rewards
from dinalrm_jax.config import ReFLConfig
from dinalrm_jax.model.parameters import Params
from dinalrm_jax.noise import draw_noise
from dinalrm_jax.training.objectives import Objective


def refl(policy: Policy, rewards: Rewards, config: ReFLConfig, reference_weight: float) -> Objective[PromptBatch]:
    """`-scale reward(x - sigma v) + reference_weight |v - v_ref|^2` at one step of a rollout.

    The rollout up to there has no gradient. Which step it is, the first row's key says, one for all devices: they run
    one loop.
    """
    sigmas = jnp.asarray(policy.schedule(config.steps))

    def objective(params: Params, batch: PromptBatch, keys: jax.Array):
        noise_keys, stop_keys, reward_keys = row_randomness(keys, 3)
        stop = of_the_first(jax.random.randint(stop_keys[0], (), config.first, config.last + 1))
        noise = draw_noise(noise_keys, (len(keys), *policy.shape))
        still = policy.velocity(jax.lax.stop_gradient(params))
        guided = sampling.guided(still, batch.prompt, batch.negative, config.guidance)
        latents = sampling.rollout(guided, noise, sigmas, 0, stop).latents
        sigma = jnp.broadcast_to(sigmas[stop], len(keys))
        velocity = policy.velocity(params)(latents, sigma, batch.prompt)
        raw = rewards(params, sampling.clean(latents, velocity, sigma), batch, reward_keys)
        reference = policy.reference(params)(latents, sigma, batch.prompt)
        away = distance(velocity, reference)
        metrics = rewards.metrics(raw, batch) | {
            "reference_distance": away,
            "velocity_ratio": norm_ratio(velocity, reference),
        }
        return -config.scale * rewards.total(raw) + reference_weight * rewards.doubt(raw) * away, metrics

    return objective
