"""Which kernel computes an attention."""

import functools
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from dinalrm_jax.devices.mesh import platform
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.backbone.attention import chunked, cudnn, grouped, splash
from dinalrm_jax.model.execution import AttentionImplementation

log = logging.getLogger(__name__)

KERNELS: dict[str, Callable[..., jax.Array]] = {
    "xla": functools.partial(jax.nn.dot_product_attention, implementation="xla"),
    "grouped": grouped.attend,
    "chunked": chunked.attend,
    "splash": splash.attend,
    "cudnn": cudnn.attend,
}


def attend(
    query: Float[Array, "b n heads e"],
    key: Float[Array, "b m heads e"],
    value: Float[Array, "b m heads e"],
    implementation: AttentionImplementation,
) -> Float[Array, "b n heads e"]:
    """`softmax(q k^T / sqrt(d)) v` over all tokens.

    Args:
        query, key, value: (B, N, heads, d); keys and values may be of another number of tokens.
        implementation: "xla" materialises the logits. "grouped" takes a few heads at a time, whose logits fit a CPU's
            cache; "chunked" a few queries, on any platform. "splash" is JAX's Pallas kernel for TPUs, "cudnn" that of
            NVIDIA GPUs for 16-bit numbers. All but "xla" have no forward-mode differentiation. "auto": `kernel_for`.

    Returns:
        (B, N, heads, d), in the values' dtype.

    Raises:
        ConfigError: a kernel that the platform or the dtype does not have, or a mesh that the heads do not divide.
    """
    if implementation == "auto":
        implementation = kernel_for(platform(), query.dtype)
        _say(implementation, platform(), str(query.dtype))
    check_kernel(implementation, platform(), query.dtype)
    return KERNELS[implementation](query, key, value)


def kernel_for(on: str, dtype: DTypeLike) -> AttentionImplementation:
    """What "auto" is on a platform ("cpu", "gpu", "tpu")."""
    if on == "tpu":
        return "splash"
    if on == "gpu" and jnp.dtype(dtype) in cudnn.DTYPES:
        return "cudnn"
    return "grouped" if on == "cpu" else "chunked"


def check_kernel(implementation: AttentionImplementation, on: str, dtype: DTypeLike) -> None:
    """Raises ConfigError where a platform or a dtype has no such kernel."""
    for kernel, home in (("splash", "tpu"), ("cudnn", "gpu")):
        if implementation == kernel and on != home:
            raise ConfigError(
                f'attention "{kernel}" runs on {home.upper()}s, this is compiled for a {on.upper()}; '
                f'use "auto" (here "{kernel_for(on, dtype)}")'
            )
    if implementation == "cudnn" and jnp.dtype(dtype) not in cudnn.DTYPES:
        raise ConfigError(f'attention "cudnn" computes in 16 bits, not in {jnp.dtype(dtype)}; use "auto" or "chunked"')


@functools.cache
def _say(implementation: str, on: str, dtype: str) -> None:
    log.info('attention "auto" is "%s" (%s, %s)', implementation, on, dtype)
