"""Samplers of flow-matching models: pure functions from noise to clean latents, deterministic or with a density.

A velocity is a function of latents (B, H, W, C) and their levels (B,): an estimate of `noise - latents`. Levels fall
from 1, pure noise, to 0. All steps are computed in float32. Formulas and their sources: docs/method.md, Sampling.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from dinalrm_jax.noise import AnyArray

Velocity = Callable[[jax.Array, jax.Array], jax.Array]


class Transition(NamedTuple):
    """The distribution of the next latents, a Gaussian.

    mean: like the latents, float32.
    std: (B,) or (), of every element.
    """

    mean: jax.Array
    std: jax.Array


class Rollout(NamedTuple):
    """What `rollout` gives.

    latents: (B, H, W, C) at the level where it stopped.
    window: (length + 1, B, H, W, C) the latents before every step of a row's window, and after the last one.
    log_prob: (length, B) of those steps.
    mean: (length, B, H, W, C) of their transitions.
    """

    latents: jax.Array
    window: jax.Array
    log_prob: jax.Array
    mean: jax.Array


def schedule(steps: int, shift: float = 3.0) -> np.ndarray:
    """FlowMatchEuler's levels for so many steps, from 1 down to 0: (steps + 1,) float32.

    As diffusers has it: evenly spread between the ends of the shifted training table of 1000 levels, and shifted once
    more, so that the last level before 0 is the same for every number of steps.
    """
    if steps < 1:
        raise ValueError(f"a schedule has at least one step, got {steps}")
    lowest = shift / 1000 / (1 + (shift - 1) / 1000)
    t = np.linspace(1.0, lowest, steps)
    return np.append(shift * t / (1 + (shift - 1) * t), 0.0).astype(np.float32)


def transition(
    kind: str,
    latents: Float[AnyArray, "b ..."],
    velocity: Float[AnyArray, "b ..."],
    sigma: ArrayLike,
    following: ArrayLike,
    noise_level: ArrayLike = 0.0,
    second: ArrayLike | None = None,
) -> Transition:
    """One step from level `sigma` to the level `following` below it.

    Args:
        kind: "euler" is deterministic; "sde" is Flow-GRPO's (arXiv 2505.05470), "cps" keeps the coefficients of the
            deterministic step (arXiv 2509.05952), "dance" is DanceGRPO's (arXiv 2505.07818), "ddim" DDIM's with the
            noise level as its eta (arXiv 2010.02502). With a noise level of 0 all of them are Euler's.
        latents, velocity: (B, ...) at `sigma`.
        sigma, following: numbers or (B,).
        noise_level: how much noise a step adds; a number or (B,).
        second: the schedule's second level, which stands for 1 in the "sde" of a step from level 1, where its noise
            would be infinite.

    Raises:
        ValueError: another kind.
    """
    x, v = jnp.asarray(latents, jnp.float32), jnp.asarray(velocity, jnp.float32)
    sigma, following, a = (jnp.asarray(value, jnp.float32) for value in (sigma, following, noise_level))
    s, below, level = (_like(value, x) for value in (sigma, following, a))
    h = s - below
    if kind == "euler":
        return Transition(x - h * v, jnp.zeros_like(sigma - following))
    clean, noise = x - s * v, x + (1 - s) * v
    if kind == "cps":
        std = below * jnp.sin(level * (math.pi / 2))
        mean = (1 - below) * clean + jnp.sqrt(jnp.maximum(below**2 - std**2, 0.0)) * noise
        return Transition(mean, following * jnp.sin(a * (math.pi / 2)))
    if kind == "ddim":
        # In DDIM's terms, with 1 - sigma for its sqrt(alpha) and sigma for its sqrt(1 - alpha).
        share = jnp.square((1 - sigma) * following / ((1 - following) * sigma))  # of the noise that was there before
        std = a * following * jnp.sqrt(1 - share)
        rest = following * jnp.sqrt(1 - a**2 * (1 - share))  # not from std: at level 1 rounding would go below 0
        return Transition((1 - below) * clean + _like(rest, x) * noise, std)
    step = jnp.sqrt(sigma - following)
    if kind == "dance":
        score = -(x - (1 - s) * clean) / s**2
        return Transition(x - h * v + 0.5 * level**2 * h * score, a * step)
    if kind != "sde":
        raise ValueError(f"kind must be euler, sde, cps, dance or ddim, got {kind!r}")
    limit = sigma if second is None else jnp.where(sigma == 1, jnp.asarray(second, jnp.float32), sigma)
    g = a * jnp.sqrt(sigma / (1 - limit))
    spread = _like(g, x) ** 2
    mean = x * (1 - spread * h / (2 * s)) - v * (1 + spread * (1 - s) / (2 * s)) * h
    return Transition(mean, g * step)


def log_prob(kind: str, t: Transition, x: Float[AnyArray, "b ..."]) -> Float[Array, " b"]:
    """(B,) log-densities of the latents `x` under a transition, averaged over elements; no gradient flows to `x`.

    "cps" leaves out the variance and the constant, as its authors do. A step without noise has no density: 0.

    Raises:
        ValueError: the kind "euler", or one that there is not.
    """
    square = jnp.square(jax.lax.stop_gradient(jnp.asarray(x, jnp.float32)) - t.mean)
    square = square.mean(axis=tuple(range(1, square.ndim)))
    if kind == "cps":
        return -square
    if kind == "euler":
        raise ValueError("Euler's step is deterministic and has no log-probability; take sde, cps, dance or ddim")
    std = jnp.where(t.std > 0, t.std, 1.0)
    density = -square / (2 * std**2) - jnp.log(std) - 0.5 * math.log(2 * math.pi)
    return jnp.where(t.std > 0, density, 0.0)


def log_ratio(
    kind: str, t: Transition, old_mean: Float[AnyArray, "b ..."], x: Float[AnyArray, "b ..."]
) -> Float[Array, " b"]:
    """(B,) `log_prob` of the latents `x` under a transition, less that under one of another mean.

    As one product, `(m - m_old) (2 x - m - m_old)`: the difference of two log-densities would lose to rounding what a
    clip range of 1e-6 asks for. No gradient flows to `x` and the old mean.
    """
    x, old = (jax.lax.stop_gradient(jnp.asarray(array, jnp.float32)) for array in (x, old_mean))
    product = ((t.mean - old) * (2 * x - t.mean - old)).mean(axis=tuple(range(1, x.ndim)))
    return product if kind == "cps" else product / (2 * jnp.square(t.std))


def clean(latents: Float[AnyArray, "b ..."], velocity: Float[AnyArray, "b ..."], sigma: ArrayLike) -> jax.Array:
    """The jump to clean latents, `x - sigma v`, in float32."""
    x = jnp.asarray(latents, jnp.float32)
    return x - _like(jnp.asarray(sigma, jnp.float32), x) * jnp.asarray(velocity, jnp.float32)


def guided(velocity: Callable[..., jax.Array], conditions, negative, guidance: float) -> Velocity:
    """Classifier-free guidance, `v_n + guidance (v - v_n)`, both from one pass over twice the rows; none at 1.

    Args:
        velocity: of latents, levels and conditions, whose arrays have B rows.
        conditions, negative: trees of arrays of the prompts and of the negative ones.
        guidance: the scale; at most 1 takes the conditions alone, and half the work.
    """
    if guidance <= 1:
        return lambda latents, sigma: velocity(latents, sigma, conditions)
    both = jax.tree.map(lambda *rows: jnp.concatenate(rows), negative, conditions)

    def guide(latents, sigma):
        without, found = jnp.split(
            velocity(jnp.concatenate([latents, latents]), jnp.concatenate([sigma, sigma]), both).astype(jnp.float32), 2
        )
        return without + guidance * (found - without)

    return guide


def euler(
    velocity: Velocity,
    noise: Float[AnyArray, "b h w c"],
    sigmas: Float[ArrayLike, " levels"],
) -> Float[Array, "b h w c"]:
    """Euler's method along a table of noise levels, `x <- x + (sigma' - sigma) v(x, sigma)`, in float32.

    Differentiable in everything; `rollout` is for what only has to be sampled.

    Args:
        velocity: of latents and levels.
        noise: (B, H, W, C) standard normal, the latents at the first level where that is 1.
        sigmas: (steps + 1,) levels from noisy to clean.

    Returns:
        (B, H, W, C) float32 latents at the last level.
    """

    def step(latents: jax.Array, levels: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        sigma, following = levels
        found = velocity(latents, jnp.broadcast_to(sigma, latents.shape[0]))
        return transition("euler", latents, found, sigma, following).mean, None

    sigmas = jnp.asarray(sigmas, jnp.float32)
    return jax.lax.scan(step, jnp.asarray(noise, jnp.float32), (sigmas[:-1], sigmas[1:]))[0]


def rollout(
    velocity: Velocity,
    latents: Float[AnyArray, "b h w c"],
    sigmas: Float[ArrayLike, " levels"],
    start: ArrayLike = 0,
    stop: ArrayLike | None = None,
    *,
    kind: str = "euler",
    noise_level: float = 0.0,
    keys: AnyArray | None = None,
    window: ArrayLike = 0,
    length: int = 0,
) -> Rollout:
    """Samples from step `start` to before step `stop`, with noise within a window of steps; no gradient flows through.

    One loop: another start, stop or window, which may be traced, is no other program.

    Args:
        velocity: of latents and levels.
        latents: (B, H, W, C) at `sigmas[start]`.
        sigmas: (steps + 1,) levels from noisy to clean.
        start, stop: steps; without a stop the last one is taken too.
        kind: of the steps within the window; the others are Euler's.
        noise_level: of those steps.
        keys: (B,) random keys, one a row, whose noise therefore does not depend on its batch.
        window: a row's first step with noise, (B,) or one for all.
        length: how many steps those are.

    Raises:
        ValueError: a window without keys or noise, or one of Euler's steps.
    """
    if length and (kind == "euler" or not noise_level):
        raise ValueError(
            f"{length} steps of a window need noise for their log-probabilities, got kind {kind!r} with noise level "
            f"{noise_level}; use sde, cps, dance or ddim with a level above 0"
        )
    if length and keys is None:
        raise ValueError("steps with noise need keys, one a row: jax.random.split(key, rows)")
    sigmas = jnp.asarray(sigmas, jnp.float32)
    x = jnp.asarray(latents, jnp.float32)
    rows = x.shape[0]
    begin = jnp.broadcast_to(jnp.asarray(window), (rows,))
    second = sigmas[1]

    def step(index, carry):
        x, kept, log_probs, means = carry
        sigma, following = sigmas[index], sigmas[index + 1]
        found = velocity(x, jnp.broadcast_to(sigma, rows))
        if not length:
            return transition("euler", x, found, sigma, following).mean, kept, log_probs, means
        place = index - begin  # within each row's window
        inside = (place >= 0) & (place < length)
        t = transition(kind, x, found, sigma, following, jnp.where(inside, noise_level, 0.0), second)
        z = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), x.shape[1:]))(keys)
        after = t.mean + _like(jnp.where(inside, t.std, 0.0), x) * z
        here = jnp.arange(length)[:, None] == place  # (length, B)
        log_probs = jnp.where(here, log_prob(kind, t, after), log_probs)
        here, last = _wide(here, x), _wide((place == length - 1)[None], x)
        means = jnp.where(here, t.mean, means)
        kept = kept.at[:-1].set(jnp.where(here, x, kept[:-1])).at[-1:].set(jnp.where(last, after, kept[-1:]))
        return after, kept, log_probs, means

    kept, log_probs, means = (jnp.zeros(s) for s in ((length + 1, *x.shape), (length, rows), (length, *x.shape)))
    last = len(sigmas) - 1 if stop is None else stop
    return jax.lax.stop_gradient(Rollout(*jax.lax.fori_loop(start, last, step, (x, kept, log_probs, means))))


def _like(value: jax.Array, x: jax.Array) -> jax.Array:
    """(B,) or () against (B, ...)."""
    return value.reshape(value.shape + (1,) * (x.ndim - 1)) if value.ndim else value


def _wide(mask: jax.Array, x: jax.Array) -> jax.Array:
    """(n, B) against (n, B, ...)."""
    return mask.reshape(mask.shape + (1,) * (x.ndim - 1))
