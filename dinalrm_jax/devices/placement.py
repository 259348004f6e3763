"""The way of weights from the host, from mapped files above all, to devices."""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jax.sharding import Sharding
from jax.typing import DTypeLike

WORKERS = min(8, os.cpu_count() or 1)
ALIGNMENT = 64  # bytes; the CPU backend takes an array that lies so as it is, and copies any other


def place(
    arrays: Mapping[str, np.ndarray | jax.Array], dtype: DTypeLike, shardings: Mapping[str, Sharding] | None = None
) -> dict[str, jax.Array]:
    """Arrays on devices in `dtype`, several at a time, each read and converted once.

    The host holds what is on its way and nothing else of an array of a mapped file, so loading takes
    little more memory than the result.

    Args:
        arrays: by name; on several processes the same on each.
        dtype: of the result.
        shardings: by name; every device takes its part only. None: the default device, to which
            JAX does not bind them.
    """
    dtype = np.dtype(dtype)
    default = jax.config.jax_default_device  # type: ignore[attr-defined]  # of this thread

    def put(name: str) -> jax.Array:
        array = np.asarray(arrays[name])
        if shardings is None:
            with jax.default_device(default):
                return jax.device_put(_converted(array, dtype))
        parts: dict[str, np.ndarray] = {}  # by where they lie: devices that hold the same share it

        def part(index) -> np.ndarray:
            if (key := str(index)) not in parts:
                parts[key] = _converted(array[index], dtype)
            return parts[key]

        return jax.make_array_from_callback(array.shape, shardings[name], part, dtype=dtype)

    with ThreadPoolExecutor(WORKERS) as pool:
        return dict(zip(arrays, pool.map(put, arrays)))


def _converted(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A copy in `dtype` that a device of the CPU backend can use as its own memory."""
    size = array.size * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    converted = memory[start : start + size].view(dtype).reshape(array.shape)
    np.copyto(converted, array, casting="unsafe")
    return converted
