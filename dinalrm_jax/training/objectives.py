"""What a training stage minimises: pure functions of parameters, a batch and a key.

An objective takes a key for every row of the batch and returns a loss for every row, and named metrics for every
row; the step averages them, once. A row's randomness is its key's, whatever rows stand beside it.
"""

from collections.abc import Callable
from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp

from dinalrm_jax import noise, preference
from dinalrm_jax.config import EnsembleTermConfig
from dinalrm_jax.model.batch import PreferenceBatch
from dinalrm_jax.model.parameters import Functional, Params
from dinalrm_jax.model.reward import RewardModule
from dinalrm_jax.noise import SigmaConfig
from dinalrm_jax.preference import LossConfig

SIGMA_BINS = 10  # of equal width, for metrics by noise level

B = TypeVar("B", contravariant=True)


class Objective(Protocol[B]):
    """What a stage minimises."""

    def __call__(self, params: Params, batch: B, keys: jax.Array, /) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Losses and named metrics of all rows: (B,), and arrays (B, ...); `keys` (B,)."""
        ...


def reward_objective(
    module: Functional[RewardModule], loss: LossConfig, sigma: SigmaConfig, ensemble: EnsembleTermConfig | None = None
) -> Objective[PreferenceBatch]:
    """`reward_losses`, each pair noised with one sigma and one eps of its own (docs/method.md, training).

    With an `ensemble` term the loss is a weighted mean of that and of the loss of the ensemble's scores, at further
    levels with the same eps.
    """
    draw, sample_sigma = _drawer(sigma), noise.sampler(sigma)

    def objective(params: Params, batch: PreferenceBatch, keys: jax.Array):
        levels, eps = draw(keys, batch.chosen.shape)
        losses, metrics = reward_losses(module, loss, params, batch, levels, eps)
        if ensemble is None:
            return losses, metrics
        more_keys = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, 2), ensemble.count - 1))(keys)
        more = jax.vmap(jax.vmap(lambda key: sample_sigma(key, ())), out_axes=1)(more_keys)
        levels = jnp.concatenate([levels[None], more])
        chosen, rejected = _score_pairs(module.bind(params).ensemble, batch, levels, eps)
        metrics |= {"ensemble_accuracy": as_answered(chosen > rejected, batch)}
        together = _weighed(preference.pair_loss(chosen, rejected, levels, loss, batch.certainty), batch)
        return (1 - ensemble.weight) * losses + ensemble.weight * together, metrics

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

    A metric named `*_by_sigma` has one number a bin of
    the noise level: `share_by_sigma` says how many rows fell into it, the others are zero outside of it.

    Args:
        levels: (B,) noise levels.
        eps: (B, H, W, C) standard normal noise.
    """
    chosen, rejected = _score_pairs(module.bind(params), batch, levels, eps)
    correct, margin = as_answered(chosen > rejected, batch), chosen - rejected
    in_bin = sigma_bins(levels)
    metrics = {
        "accuracy": correct,
        "margin": margin,
        "score_chosen": chosen,
        "score_rejected": rejected,
        "share_by_sigma": in_bin,
        "accuracy_by_sigma": in_bin * correct[:, None],
        "margin_by_sigma": in_bin * margin[:, None],
    }
    return _weighed(preference.pair_loss(chosen, rejected, levels, loss, batch.certainty), batch), metrics


def sigma_bins(levels: jax.Array) -> jax.Array:
    """(N,) levels -> (N, SIGMA_BINS), 1 in the bin that each falls into."""
    return jax.nn.one_hot(jnp.minimum(levels * SIGMA_BINS, SIGMA_BINS - 1).astype(jnp.int32), SIGMA_BINS)


def as_answered(right: jax.Array, batch: PreferenceBatch) -> jax.Array:
    """(B,) how far pairs that were ordered right or not agree with people: to have ordered a tie is half right."""
    return jnp.where(right, batch.certainty, 1.0 - batch.certainty).astype(jnp.float32)


def _weighed(losses: jax.Array, batch: PreferenceBatch) -> jax.Array:
    return losses if batch.weight is None else losses * batch.weight


def _score_pairs(score: Callable, batch: PreferenceBatch, levels: jax.Array, eps: jax.Array):
    """Scores of the chosen and of the rejected images at levels (B,), or those of an ensemble (K, B).

    All images run as one batch, a pair's one after the other: devices that split the batch have nothing to exchange
    for it.
    """

    def paired(first, second, axis=0):
        return jnp.stack([first, second], axis + 1).reshape(*first.shape[:axis], -1, *first.shape[axis + 1 :])

    prompt = jax.tree.map(lambda x: paired(x, x), batch.prompt)
    levels = paired(levels, levels, axis=levels.ndim - 1)
    return score(paired(batch.chosen, batch.rejected), prompt, levels, paired(eps, eps)).reshape(-1, 2).T


def flow_matching_objective(module: Functional, sigma: SigmaConfig) -> Objective[PreferenceBatch]:
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
