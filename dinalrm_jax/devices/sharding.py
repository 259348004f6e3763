"""Which part of every array lies where on the mesh.

Rows of a batch are split over `data` and `fsdp`; parameters over `fsdp`, which gathers
each where it is used, and `tensor`, which splits the matrix products themselves.
"""

import re
from collections.abc import Mapping
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from dinalrm_jax.devices.mesh import ROW_AXES
from dinalrm_jax.mapping import ConfigError

T = TypeVar("T")
BY_ROW = PartitionSpec(ROW_AXES)
WHOLE = PartitionSpec()

# Patterns of whole names, and how a parameter is split; the first that matches decides.
Rules = tuple[tuple[str, PartitionSpec], ...]


def under(name: str, rules: Rules) -> Rules:
    """The rules of a part, for a whole in which the part has this name."""
    return tuple((rf"{name}\.(?:{pattern})", spec) for pattern, spec in rules)


def parameter_shardings(
    shapes: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh, rules: Rules
) -> dict[str, NamedSharding]:
    """Where each parameter lies.

    Raises:
        ConfigError: a parameter that no rule matches, or whose axes the mesh does not divide; all of
            them are listed.
    """
    shardings, problems = {}, []
    for name, shape in shapes.items():
        spec = next((spec for pattern, spec in rules if re.fullmatch(pattern, name)), None)
        if spec is None:
            problems.append(f"{name} {shape.shape}: no rule matches")
            continue
        for axis, (size, mesh_axis) in enumerate(zip(shape.shape, spec)):
            if mesh_axis is not None and size % mesh.shape[mesh_axis]:
                problems.append(
                    f"{name} {shape.shape}: axis {axis} is not divisible by mesh.{mesh_axis} = {mesh.shape[mesh_axis]}"
                )
        shardings[name] = NamedSharding(mesh, spec)
    if problems:
        raise ConfigError("parameters that this mesh cannot hold:\n  " + "\n  ".join(problems))
    return shardings


def like_parameters(tree: T, shardings: Mapping[str, Sharding], mesh: Mesh) -> T:
    """Shardings of a tree that holds dicts of parameters: a leaf under a parameter's name lies as it does.

    So do the moments of an optimizer; whatever else there is, a step count, is on every device.
    """
    replicated = NamedSharding(mesh, WHOLE)

    def sharding(path, _):
        name = next((key.key for key in reversed(path) if isinstance(key, jax.tree_util.DictKey)), None)
        return shardings.get(name, replicated)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def local_rows(batch_size: int, mesh: Mesh) -> list[int]:
    """The rows of a batch that this process's devices hold, in order."""
    indices = NamedSharding(mesh, BY_ROW).addressable_devices_indices_map((batch_size,))
    return sorted({row for (rows,) in indices.values() for row in range(*rows.indices(batch_size))})


def put_rows(rows: T, batch_size: int, mesh: Mesh) -> T:
    """This process's rows of a batch, given in the order of `local_rows`, as arrays of the whole batch."""
    sharding = NamedSharding(mesh, BY_ROW)
    return jax.tree.map(
        lambda array: jax.make_array_from_process_local_data(sharding, array, (batch_size, *array.shape[1:])), rows
    )


def row_sharded(shape: tuple[int, ...], dtype, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """An abstract array whose rows are split as those of a batch."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, BY_ROW))


def gather(params: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    """Whole arrays on the host of every process, one at a time."""
    return {
        name: np.asarray(array if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True))
        for name, array in params.items()
    }
