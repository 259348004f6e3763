"""What a training stage minimises: pure functions of parameters, a batch and a key.

An objective takes a key for every row of the batch and returns a loss for every row, and named metrics for every
row; the step averages them, once. A row's randomness is its key's, whatever rows stand beside it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dinalrm_jax import noise, preference
from dinalrm_jax.backbone.sd3 import SD3Transformer
from dinalrm_jax.config import LossConfig, SigmaConfig
from dinalrm_jax.data.batch import PreferenceBatch
from dinalrm_jax.parameters import Functional, Params
from dinalrm_jax.reward_model import RewardModule

SIGMA_BINS = 10  # of equal width, for metrics by noise level

Objective = Callable[[Params, PreferenceBatch, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def reward_objective(module: Functional[RewardModule], loss: LossConfig, sigma: SigmaConfig) -> Objective:
    """`reward_losses`, each pair noised with one sigma and one eps of its own (method: training)."""
    draw = _drawer(sigma)

    def objective(params: Params, batch: PreferenceBatch, keys: jax.Array):
        return reward_losses(module, loss, params, batch, *draw(keys, batch.chosen.shape))

    return objective


def reward_losses(
    module: Functional[RewardModule],
    loss: LossConfig,
    params: Params,
    batch: PreferenceBatch,
    levels: jax.Array,
    eps: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The preference loss of every pair, both of whose images are noised alike, and its metrics.

    Both images of all pairs run as one batch, a pair's one after the other: devices that split the batch have
    nothing to exchange for it. A metric named `*_by_sigma` has one number a bin of
    the noise level: `share_by_sigma` says how many rows fell into it, the others are zero outside of it.

    Args:
        levels: (B,) noise levels.
        eps: (B, H, W, C) standard normal noise.
    """

    def paired(first, second):
        return jnp.stack([first, second], axis=1).reshape(-1, *first.shape[1:])

    def twice(tree):
        return jax.tree.map(lambda x: paired(x, x), tree)

    latents = paired(batch.chosen, batch.rejected)
    scores = module.bind(params)(latents, twice(batch.prompt), twice(levels), twice(eps))
    chosen, rejected = scores.reshape(-1, 2).T
    correct, margin = (chosen > rejected).astype(jnp.float32), chosen - rejected
    in_bin = jax.nn.one_hot(jnp.minimum(levels * SIGMA_BINS, SIGMA_BINS - 1).astype(jnp.int32), SIGMA_BINS)
    metrics = {
        "accuracy": correct,
        "margin": margin,
        "score_chosen": chosen,
        "score_rejected": rejected,
        "share_by_sigma": in_bin,
        "accuracy_by_sigma": in_bin * correct[:, None],
        "margin_by_sigma": in_bin * margin[:, None],
    }
    return preference.pair_loss(chosen, rejected, levels, loss), metrics


def flow_matching_objective(module: Functional[SD3Transformer], sigma: SigmaConfig) -> Objective:
    """Rectified-flow loss `|v(x_sigma, sigma) - (eps - x0)|^2`, averaged over a latent, of the chosen images."""
    draw = _drawer(sigma)

    def objective(params: Params, batch: PreferenceBatch, keys: jax.Array):
        latents = batch.chosen.astype(jnp.float32)
        levels, eps = draw(keys, latents.shape)
        noisy = noise.add_noise(latents, levels, eps)
        velocity = module.bind(params).velocity(noisy, noise.timestep(levels), batch.prompt)
        error = velocity.astype(jnp.float32) - (eps - latents)
        return jnp.mean(jnp.square(error), axis=(1, 2, 3)), {}

    return objective


def _drawer(config: SigmaConfig) -> Callable[[jax.Array, tuple[int, ...]], tuple[jax.Array, jax.Array]]:
    """(keys (B,), shape (B, ...)) -> levels (B,) and eps of that shape, each row's from its own key."""
    sample_sigma = noise.sampler(config)

    def draw(keys: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        sigma_keys, eps_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        return jax.vmap(lambda key: sample_sigma(key, ()))(sigma_keys), noise.draw_noise(eps_keys, shape)

    return draw
