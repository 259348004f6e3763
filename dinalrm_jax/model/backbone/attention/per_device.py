"""A kernel that no compiler partitions, over the devices of a mesh."""

import math
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

from dinalrm_jax.devices.mesh import ROW_AXES
from dinalrm_jax.mapping import ConfigError

HEAD_AXIS = "tensor"
SAVED = "attention"  # the name of what `remat="attention"` keeps


def per_device(kernel: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`kernel` of (query, key, value), on each device for its rows (data, fsdp) and its heads (tensor).

    Rows that the mesh does not divide are computed by all devices. Within a caller's `shard_map` the axes that are
    his already are left to him.

    Raises:
        ConfigError: heads that the mesh does not divide.
    """

    def mapped(query, key, value):
        mesh = jax.sharding.get_abstract_mesh()
        free = [axis for axis in mesh.axis_names if axis not in mesh.manual_axes]
        # (On one device; or within a shard_map of all axes. One of some axes is not enough, be the others of size 1.)
        if mesh.size == 1 or not free:
            return kernel(query, key, value)
        batch, _, heads, _ = query.shape
        if HEAD_AXIS in free and heads % mesh.shape[HEAD_AXIS]:
            raise ConfigError(
                f"{heads} heads do not divide over mesh.tensor = {mesh.shape[HEAD_AXIS]}; choose a divisor of {heads}"
            )
        rows = tuple(axis for axis in ROW_AXES if axis in free)
        if batch % math.prod(mesh.shape[axis] for axis in rows):
            rows = ()
        spec = PartitionSpec(rows or None, None, HEAD_AXIS if HEAD_AXIS in free else None)
        # The kernels say nothing of how their results vary over devices, so that cannot be checked.
        return jax.shard_map(
            kernel, in_specs=(spec, spec, spec), out_specs=spec, axis_names=set(free), check_vma=False
        )(query, key, value)

    return mapped
