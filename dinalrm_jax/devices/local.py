"""Encoders on all devices of this process: weights on each, rows split between them."""

from collections.abc import Mapping
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dinalrm_jax.devices.placement import place

T = TypeVar("T")


def _mesh() -> Mesh:
    return Mesh(np.array(jax.local_devices()), ("rows",), axis_types=(AxisType.Auto,))


def on_local_devices(params: Mapping[str, np.ndarray], dtype) -> dict[str, jax.Array]:
    """Weights in `dtype`, whole on every device of this process."""
    return place(params, dtype, dict.fromkeys(params, NamedSharding(_mesh(), PartitionSpec())))


def on_every_device(params: T) -> T:
    """A tree of arrays, whole on every device of this process."""
    return jax.device_put(params, NamedSharding(_mesh(), PartitionSpec()))


def split_locally(batch: T) -> T:
    """A tree of arrays with rows, split over this process's devices; whole on each where that does not divide."""
    mesh = _mesh()

    def put(array):
        spec = PartitionSpec("rows") if len(array) % mesh.size == 0 else PartitionSpec()
        return jax.device_put(array, NamedSharding(mesh, spec))

    return jax.tree.map(put, batch)
