"""What a block keeps for its backward pass and computes again: as told, and not as XLA's CPU compiler would."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from dinalrm_jax.devices.mesh import platform
from dinalrm_jax.model.backbone.attention.per_device import SAVED

UNSIGNED = {2: jnp.uint16, 4: jnp.uint32}  # by bytes


def _attention(primitive, *_, **params) -> bool:
    """What an attention gives: under its name, or, of cuDNN's whose rows JAX does not name, by its operation."""
    named = primitive.name == "name" and params["name"] == SAVED
    return named or primitive.name.startswith("dot_product_attention_fwd")


POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "block": jax.checkpoint_policies.nothing_saveable,
    "attention": _attention,
}


def rematerialised(block: Callable, remat: str) -> Callable:
    """`block` of (state, image, text, temb) to (image, text) with the memory of `ExecutionConfig.remat`.

    On CPUs it has a gradient of our making, and so no forward mode (`jax.jvp`).
    """
    if platform() == "cpu":
        block = _summed_once(block)
    if remat == "none":
        return block
    if remat == "block" and platform() == "cpu":
        return _recomputed(block)
    return jax.checkpoint(block, policy=POLICIES[remat])


def _summed_once(block: Callable) -> Callable:
    """`block` whose streams' gradients XLA's CPU compiler writes to memory.

    A stream's gradient is a sum over all later blocks. That compiler fuses such a chain of additions into each of its
    many users, which then read what every later block added, again and again (for the gradients of adapters against
    the order in memory). It does not duplicate what it holds to be costly: a square root of each number, say.
    """

    def apply(state, image, text, temb):
        return block(state, _gradient_written(image), _gradient_written(text), temb)

    return apply


@jax.custom_vjp
def _gradient_written(x: jax.Array) -> jax.Array:
    return x


def _write(_, gradient: jax.Array) -> tuple[jax.Array]:
    """The gradient, times the square root of ones that XLA does not see, which changes no bit of it."""
    one = lax.bitcast_convert_type(jnp.ones((), gradient.dtype), UNSIGNED[gradient.dtype.itemsize])
    return (gradient * jnp.sqrt(lax.bitcast_convert_type(one | _zeros(gradient), gradient.dtype)),)


_gradient_written.defvjp(lambda x: (x, None), _write)


def _recomputed(block: Callable) -> Callable:
    """`jax.checkpoint` that survives XLA's CPU compiler.

    That compiler drops the optimisation barriers of `jax.checkpoint` (its pass `cse_barrier_expander`) before it merges
    equal computations for the last time, so that the second forward pass becomes the first one again, with all its
    memory. Here the second differs: its inputs depend on the gradient, in a way that changes no bit of them.
    """

    def forward(state, image, text, temb):
        return block(state, image, text, temb), (state, image, text, temb)

    def backward(saved, gradients):
        state, image, text, temb = saved
        by_image, by_text = gradients
        image = _tied(image, by_image)
        text = text if by_text is None else _tied(text, by_text)
        return jax.vjp(block, state, image, text, temb)[1](gradients)

    recomputed = jax.custom_vjp(block)
    recomputed.defvjp(forward, backward)
    return recomputed


def _tied(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """`x`, after `gradient` is there: its bits xor zeros that are made of it."""
    bits = lax.bitcast_convert_type(x, UNSIGNED[x.dtype.itemsize])
    return lax.bitcast_convert_type(bits ^ _zeros(gradient), x.dtype)


def _zeros(x: jax.Array) -> jax.Array:
    """Unsigned zeros of `x`'s shape and width that XLA does not see: a number shifted right by all of its bits."""
    half = 4 * x.dtype.itemsize
    return (lax.bitcast_convert_type(x, UNSIGNED[x.dtype.itemsize]) >> half) >> half
