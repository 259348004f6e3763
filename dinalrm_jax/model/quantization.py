"""Frozen matrices in int8, for inference: half of what they take in bfloat16.

A matrix (out, in) becomes int8 with one float32 scale for each output, by qwix; it is multiplied out where it is used,
so products are in the compute dtype and only one matrix at a time has its full size.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dinalrm_jax.mapping import ConfigError

INSTALL = "int8 weights need the package qwix: pip install -e '.[int8]'"


def is_quantized(array: Any) -> bool:
    """Whether it is qwix's array of int8 and scales, without importing it."""
    return hasattr(array, "qvalue")


def holds_int8(params: Mapping[str, Any]) -> bool:
    """Whether some of the parameters are in int8."""
    return any(map(is_quantized, params.values()))


def quantized(params: dict[str, Any], frozen: Callable[[str], bool]) -> dict[str, Any]:
    """The parameters with their frozen matrices in int8; `frozen` says yes to a frozen one's name.

    They are taken out of `params` one by one, so that never two of all are held.

    Raises:
        ConfigError: qwix is not installed.
    """
    try:
        import qwix
    except ImportError:
        raise ConfigError(INSTALL) from None

    @jax.jit
    def of_one(matrix: jax.Array):
        return qwix.quantize(matrix.astype(jnp.float32), jnp.int8, channelwise_axes=(0,))

    found = {}
    for name in list(params):
        array = params.pop(name)
        matrix = frozen(name) and name.endswith(".weight") and array.ndim == 2
        found[name] = of_one(array) if matrix else array
    return found


def whole(array: Any) -> jax.Array:
    """An array as it is, or, of int8, multiplied out in float32."""
    if not is_quantized(array):
        return array
    import qwix

    return qwix.dequantize(array)
