"""A name for weights: two models with one digest score alike."""

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import ml_dtypes
import numpy as np

from dinalrm_jax.model.quantization import whole

THREADS = 4  # hashing leaves Python's lock; each holds one array beside the model
PART = 2**22  # values that are converted at a time


def digest(params: Mapping[str, jax.Array | np.ndarray], is_trainable: Callable[[str], bool]) -> str:
    """16 hex digits of names, shapes and values.

    Trained arrays count in float32 and frozen ones in bfloat16, in which a model holds them at least: so
    the digest is the same in whichever layout and compute dtype the weights came.

    Args:
        params: named arrays, on a device or not.
        is_trainable: whether a name is of a trained array.
    """

    def of_one(name: str) -> bytes:
        array = np.asarray(whole(params[name]))
        found = hashlib.sha256(f"{name} {array.shape} ".encode())
        dtype, values = np.float32 if is_trainable(name) else ml_dtypes.bfloat16, np.ravel(array)
        for start in range(0, values.size, PART):
            found.update(values[start : start + PART].astype(dtype, copy=False).view(np.uint8).data)
        return found.digest()

    with ThreadPoolExecutor(THREADS, "digest") as pool:
        return hashlib.sha256(b"".join(pool.map(of_one, sorted(params)))).hexdigest()[:16]
