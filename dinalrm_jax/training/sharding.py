"""The device mesh and which part of every array lies where.

Three axes. Rows of a batch are split over `data` and `fsdp`; parameters over `fsdp`, which gathers
each where it is used, and `tensor`, which splits the matrix products themselves.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dinalrm_jax.config import ConfigError, MeshConfig
from dinalrm_jax.layers import ROW_AXES
from dinalrm_jax.parameters import Params

T = TypeVar("T")
P = PartitionSpec
BY_ROW = P(ROW_AXES)
WHOLE = P()

# A matrix is (out, in). Into a split computation: heads and hidden units over `tensor`; out of it:
# the contracted axis over `tensor`. The first pattern that matches a whole name decides.
INTO = r"to_[qkv]|to_[kv]_(?:vis|text)|add_[qkv]_proj|net\.0\.proj|ff\.0"
OUT_OF = r"to_out\.0|to_add_out|net\.2|ff\.2"
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (rf".*\.(?:{INTO})\.weight", P("tensor", "fsdp")),
    (rf".*\.(?:{INTO})\.bias", P("tensor")),
    (rf".*\.(?:{INTO})\.lora_A", P(None, "fsdp")),
    (rf".*\.(?:{INTO})\.lora_B", P("tensor", None)),
    (rf".*\.(?:{OUT_OF})\.weight", P("fsdp", "tensor")),
    (rf".*\.(?:{OUT_OF})\.lora_A", P(None, "tensor")),
    (rf".*\.(?:{OUT_OF})\.lora_B", P("fsdp", None)),
    # Modulations, embedders, FiLM adapters and the head's projections are used whole by every device.
    (r"(?:.*\.)?(?:linear|linear_[12]|context_embedder|proj_in|proj|proj_out|cond_mlp\.[02]|agg_visual|agg_text)\.weight",
     P("fsdp", None)),
    (r".*\.gate_(?:vis|text)\.[02]\.weight", WHOLE),
    (r"(?:.*\.)?head\.head\.weight", WHOLE),
    (r".*\.bias", WHOLE),
    (r".*\.norm_\w+\.weight|.*\.layer_embed|.*\.query_tokens|.*\.pos_embed", WHOLE),
    (r"eta[34]", WHOLE),
)  # fmt: skip


def make_mesh(config: MeshConfig) -> Mesh:
    """A mesh with data, fsdp and tensor axes over the devices of all processes.

    Raises:
        ConfigError: the axes do not fit the devices.
    """
    devices = jax.devices()
    sizes = dataclasses.asdict(config)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % fixed == 0 and -1 in sizes.values():
        sizes = {name: len(devices) // fixed if size == -1 else size for name, size in sizes.items()}
    count = math.prod(sizes.values())
    if -1 in sizes.values() or count > len(devices) or (count < len(devices) and jax.process_count() > 1):
        raise ConfigError(
            f"mesh {dataclasses.asdict(config)} does not fit {len(devices)} devices of {jax.process_count()} "
            "processes; let one axis be -1 for what the others leave, or make their product the number of devices"
        )
    shape = tuple(sizes.values())
    return jax.make_mesh(shape, tuple(sizes), axis_types=(AxisType.Auto,) * len(shape), devices=devices[:count])


def row_devices(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return math.prod(mesh.shape[axis] for axis in ROW_AXES)


def check_batch_size(name: str, batch_size: int, micro_batches: int, mesh: Mesh) -> None:
    """Raises ConfigError, naming the value, unless a batch splits evenly into parts and each part over the mesh."""
    unit = micro_batches * row_devices(mesh)
    if batch_size % unit:
        raise ConfigError(
            f"{name} {batch_size} must be a multiple of micro_batches x mesh.data x mesh.fsdp = "
            f"{micro_batches} x {mesh.shape['data']} x {mesh.shape['fsdp']}"
        )


def parameter_shardings(shapes: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh) -> dict[str, NamedSharding]:
    """Where each parameter lies, by `RULES`.

    Raises:
        ConfigError: a parameter that no rule matches, or whose axes the mesh does not divide; all of
            them are listed.
    """
    shardings, problems = {}, []
    for name, shape in shapes.items():
        spec = next((spec for pattern, spec in RULES if re.fullmatch(pattern, name)), None)
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


def like_parameters(tree: T, shardings: Mapping[str, NamedSharding], mesh: Mesh) -> T:
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


def gather(params: Params) -> dict[str, np.ndarray]:
    """Whole arrays on the host of every process, one at a time."""
    return {
        name: np.asarray(array if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True))
        for name, array in params.items()
    }
