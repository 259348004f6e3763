"""The device mesh: axes `data`, `fsdp` and `tensor` over the devices of all processes."""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec

from dinalrm_jax.mapping import ConfigError

ROW_AXES = ("data", "fsdp")  # mesh axes that split the rows of a batch


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 takes what the others leave.

    data: rows of a batch are split, parameters repeated.
    fsdp: rows are split and parameters too; each is gathered where it is used.
    tensor: heads and hidden units are split, within a block's matrix products.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = (self.data, self.fsdp, self.tensor)
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise ConfigError(f"mesh axes must be positive, at most one of them -1 (the rest), got {sizes}")


def platform() -> str:
    """What is compiled for: the devices of the mesh around it, which need not be here, else this process's own."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return getattr(device, "platform", None) or jax.default_backend()


def split_rows(x: jax.Array) -> jax.Array:
    """`x`, its rows split over the mesh that training runs under, or as it is where there is none.

    Where parameters are split too, XLA could as well leave rows whole and add up partial products;
    saying it between blocks makes it gather the parameters instead, which is what saves memory.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not set(ROW_AXES) <= set(mesh.axis_names):
        return x
    # Within a shard_map an axis of its own is split already.
    return lax.with_sharding_constraint(x, PartitionSpec(tuple(a for a in ROW_AXES if a not in mesh.manual_axes)))


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with data, fsdp and tensor axes over the devices of all processes, or over these, which need not be here.

    Which device stands where is JAX's choice by how they are linked, the same here and there: a program compiled ahead
    is that of the devices themselves.

    Raises:
        ConfigError: the axes do not fit the devices.
    """
    devices = jax.devices() if devices is None else devices
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
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices[:count]
    )


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
