"""DiffusionNFT (arXiv 2509.16117): the forward process alone, towards what was judged well and away from the rest."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from dinalrm_jax.noise import AnyArray

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
    v, x0, x_sigma = jnp.asarray(velocity), jnp.asarray(x0), jnp.asarray(x_sigma)
    old, reference = (jax.lax.stop_gradient(jnp.asarray(x)) for x in (old_velocity, ref_velocity))
    axes = tuple(range(1, v.ndim))
    level = jnp.asarray(sigma).reshape((-1,) + (1,) * len(axes))

    def relative_error(mixture):
        gap = x_sigma - level * mixture - x0
        size = jax.lax.stop_gradient(jnp.maximum(jnp.abs(gap).mean(axis=axes, keepdims=True), LEAST))
        return (jnp.square(gap) / size).mean(axis=axes)

    towards = relative_error(beta * v + (1 - beta) * old)
    away = relative_error((1 + beta) * old - beta * v)
    weight = jnp.asarray(weight)
    policy = advantage_clip * ((weight * towards + (1 - weight) * away) / beta).mean()
    return policy + kl * jnp.square(v - reference).mean()
