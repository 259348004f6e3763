"""Samplers of flow-matching models: pure functions from noise to clean latents."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float


def euler(
    velocity: Callable[[jax.Array, jax.Array], jax.Array],
    noise: Float[ArrayLike, "b h w c"],
    sigmas: Float[ArrayLike, " levels"],
) -> Float[Array, "b h w c"]:
    """Euler's method along a table of noise levels, `x <- x + (sigma' - sigma) v(x, sigma)`, in float32.

    It is diffusers' FlowMatchEuler without its schedule: SD3.5's levels are `noise.sampling_sigmas`.

    Args:
        velocity: of latents (B, H, W, C) and their levels (B,): `eps - x0`.
        noise: (B, H, W, C) standard normal, the latents at the first level where that is 1.
        sigmas: (steps + 1,) levels from noisy to clean.

    Returns:
        (B, H, W, C) float32 latents at the last level.
    """

    def step(latents: jax.Array, levels: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        sigma, following = levels
        found = velocity(latents, jnp.broadcast_to(sigma, latents.shape[0])).astype(jnp.float32)
        return latents + (following - sigma) * found, None

    sigmas = jnp.asarray(sigmas, jnp.float32)
    return jax.lax.scan(step, jnp.asarray(noise, jnp.float32), (sigmas[:-1], sigmas[1:]))[0]
