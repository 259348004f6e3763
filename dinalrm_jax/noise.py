"""The flow-matching noise schedule and the training distributions of its level.

`sigma` in [0, 1] is the noise level: `x_sigma = (1 - sigma) x0 + sigma eps` (the paper's t, the
released code's u). Everything here is a pure function of arrays.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from dinalrm_jax.mapping import ConfigError

AnyArray = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class SigmaConfig:
    """The training distribution of the noise level; `noise.DISTRIBUTIONS` names the parameters."""

    distribution: Literal["uniform", "logit_normal", "mode", "constant", "power", "beta"] = "uniform"
    parameters: tuple[float, ...] = ()


def add_noise(
    latents: Float[AnyArray, "b h w c"],
    sigma: Float[ArrayLike, " b"] | Float[ArrayLike, ""],
    noise: Float[AnyArray, "b h w c"],
) -> Float[Array, "b h w c"]:
    """`(1 - sigma) latents + sigma noise`; sigma (B,) or a scalar, the others (B, H, W, C).

    Raises:
        ValueError: shapes that differ, where broadcasting would noise a row with another's.
    """
    sigma = jnp.asarray(sigma, latents.dtype)
    if noise.shape != latents.shape or sigma.shape not in ((), latents.shape[:1]):
        raise ValueError(
            f"latents {latents.shape} take noise of their own shape and a sigma a row or one for all, got noise "
            f"{noise.shape} and sigma {sigma.shape}"
        )
    sigma = sigma.reshape(sigma.shape + (1,) * (latents.ndim - sigma.ndim)) if sigma.ndim else sigma
    return (1 - sigma) * latents + sigma * noise


def draw_noise(key: Any, shape: tuple[Any, ...]) -> jax.Array:
    """Standard normal noise of `shape` (B, H, W, C): one draw for all rows, or B keys for B draws.

    (A size may be a symbol of jax.export's.)
    """
    if not hasattr(key, "dtype"):
        raise TypeError(f"key must be a random key, got {key!r}; make one of a seed with jax.random.key(seed)")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jnp.asarray(key)  # `seed_key`'s, or an old-style jax.random.PRNGKey
        key = jax.random.wrap_key_data(key, impl="threefry2x32" if key.shape[-1] == 2 else None)
    if key.ndim == 0:
        return jnp.broadcast_to(jax.random.normal(key, shape[1:]), shape)
    return jax.vmap(lambda row_key: jax.random.normal(row_key, shape[1:]))(key)


def seed_key(seed: int | Sequence[int]) -> np.ndarray:
    """The key of a seed, a signed integer of 64 bits, as data: (2,) uint32; (B, 2) of B seeds.

    For seeds below 2^32 it is `jax.random.key`'s, which drops the higher half of larger ones where JAX
    has no 64-bit numbers.

    Raises:
        ValueError: more than 64 bits.
    """
    try:
        bits = np.asarray(seed, np.int64).view(np.uint64)
    except OverflowError:
        raise ValueError(f"a seed is an integer of 64 bits, got {seed}") from None
    return np.stack([bits >> np.uint64(32), bits & np.uint64(0xFFFFFFFF)], axis=-1).astype(np.uint32)


@dataclasses.dataclass(frozen=True)
class NoiseDraw:
    """One draw of the noise for any number of images.

    seed: an integer of 64 bits.
    shared: every image has the same noise, which cancels in comparisons; else each its own, by its name, as the
        paper evaluates (docs/method.md, noise).
    """

    seed: int
    shared: bool = False

    def keys(self, names: Sequence[str]) -> np.ndarray:
        """(N, 2) uint32: a key for each image, for `draw_noise`; of (seed, name) only, on every machine."""
        if self.shared:
            return np.broadcast_to(seed_key(self.seed), (len(names), 2))
        digests = (hashlib.sha256(f"{self.seed}\0{name}".encode("utf-8", "surrogateescape")) for name in names)
        return np.array([np.frombuffer(digest.digest()[:8], "<u4") for digest in digests], np.uint32)


def timestep(sigma: Float[ArrayLike, "*b"]) -> Float[Array, "*b"]:
    """What the transformer is fed for a level: 1000 sigma, float32."""
    return 1000.0 * jnp.asarray(sigma, jnp.float32)


def schedule_sigmas(shift: float = 3.0, num_train_timesteps: int = 1000) -> jax.Array:
    """FlowMatchEuler's training table, from 1 down: `shift t / (1 + (shift - 1) t)`, t = i / num_train_timesteps."""
    t = jnp.arange(num_train_timesteps, 0, -1, dtype=jnp.float32) / num_train_timesteps
    return shift * t / (1 + (shift - 1) * t)


def nearest_schedule_sigma(sigma: ArrayLike, shift: float = 3.0, num_train_timesteps: int = 1000) -> jax.Array:
    """The released code's level: the nearest of `schedule_sigmas`.

    It moves a level by less than 1.6e-3 and is not part of the method; it is here to reproduce
    released numbers.
    """
    schedule = schedule_sigmas(shift, num_train_timesteps)
    return schedule[jnp.argmin(jnp.abs(schedule - jnp.asarray(sigma, jnp.float32)[..., None]), axis=-1)]


# Level samplers: (key, shape, *parameters) -> float32 in [0, 1]. Formulas: the released code's
# `timestep_sampling`; logit_normal and mode are those of the SD3 paper (arXiv 2403.03206, 3.1).


def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """sigma ~ U[0, 1)."""
    return jax.random.uniform(key, shape)


def logit_normal(key: jax.Array, shape: tuple[int, ...], mean: float, std: float) -> jax.Array:
    """sigma = sigmoid(mean + std z), z ~ N(0, 1)."""
    return jax.nn.sigmoid(mean + std * jax.random.normal(key, shape))


def mode(key: jax.Array, shape: tuple[int, ...], scale: float) -> jax.Array:
    """sigma = 1 - u - scale (cos^2(pi u / 2) - 1 + u), u ~ U[0, 1)."""
    u = jax.random.uniform(key, shape)
    return 1 - u - scale * (jnp.cos(jnp.pi * u / 2) ** 2 - 1 + u)


def constant(key: jax.Array, shape: tuple[int, ...], value: float) -> jax.Array:
    """sigma = value."""
    del key
    return jnp.full(shape, value, jnp.float32)


def power(key: jax.Array, shape: tuple[int, ...], exponent: float) -> jax.Array:
    """sigma = u^exponent, u ~ U[0, 1)."""
    return jax.random.uniform(key, shape) ** exponent


def beta(key: jax.Array, shape: tuple[int, ...], a: float, b: float) -> jax.Array:
    """sigma ~ Beta(a, b)."""
    return jax.random.beta(key, a, b, shape)


# Name -> (sampler, its parameters, what they must satisfy, in words).
DISTRIBUTIONS: dict[str, tuple[Callable, tuple[str, ...], Callable, str]] = {
    "uniform": (uniform, (), lambda: True, ""),
    "logit_normal": (logit_normal, ("mean", "std"), lambda mean, std: std >= 0, "std >= 0"),
    # Beyond these bounds sigma leaves [0, 1].
    "mode": (mode, ("scale",), lambda s: -1 <= s <= 2 / (jnp.pi - 2), "scale in [-1, 1.7519]"),
    "constant": (constant, ("value",), lambda v: 0 <= v <= 1, "value in [0, 1]"),
    "power": (power, ("exponent",), lambda p: p > 0, "exponent > 0"),
    "beta": (beta, ("a", "b"), lambda a, b: a > 0 and b > 0, "a, b > 0"),
}


def sampler(config: SigmaConfig) -> Callable[[jax.Array, tuple[int, ...]], jax.Array]:
    """The configured distribution as a function of (key, shape).

    Raises:
        ConfigError: parameters that the distribution does not take, or that leave [0, 1].
    """
    sample, names, valid, condition = DISTRIBUTIONS[config.distribution]
    if len(config.parameters) != len(names):
        raise ConfigError(
            f"sigma.distribution {config.distribution!r} takes parameters ({', '.join(names)}), got {config.parameters}"
        )
    if not valid(*config.parameters):
        raise ConfigError(f"sigma.distribution {config.distribution!r} needs {condition}, got {config.parameters}")
    return lambda key, shape: sample(key, shape, *config.parameters)
