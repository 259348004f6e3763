"""Diffusion-DPO (arXiv 2311.12908) for flow matching: pairs of images, no reward while it trains."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from dinalrm_jax.noise import AnyArray


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
    target = jnp.asarray(noise) - jnp.asarray(latents)

    def error(found):
        return jnp.square(jnp.asarray(found) - target).mean(axis=tuple(range(1, target.ndim)))

    gain = error(velocity) - jax.lax.stop_gradient(error(ref_velocity))
    return -jax.nn.log_sigmoid(-0.5 * beta * (gain[0::2] - gain[1::2])).mean()
