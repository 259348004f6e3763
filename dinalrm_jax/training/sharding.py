"""The device mesh, and how batches lie on it."""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dinalrm_jax.config import ConfigError, MeshConfig
from dinalrm_jax.data.batch import PreferenceBatch


def make_mesh(config: MeshConfig) -> Mesh:
    """A mesh with a data axis over the devices; one device is a mesh of one.

    Raises:
        ConfigError: more devices asked for than there are.
    """
    devices = jax.devices()
    data = len(devices) if config.data == -1 else config.data
    if not 1 <= data <= len(devices):
        raise ConfigError(f"mesh.data is {config.data}, but there are {len(devices)} devices; use -1 for all of them")
    return jax.make_mesh((data,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:data])


def check_batch_size(batch_size: int, accumulation_steps: int, mesh: Mesh) -> None:
    """Raises ConfigError unless a batch splits evenly into parts and each part over the data axis."""
    unit = accumulation_steps * mesh.shape["data"]
    if batch_size % unit:
        raise ConfigError(
            f"batch_size {batch_size} must be a multiple of accumulation_steps x mesh.data = "
            f"{accumulation_steps} x {mesh.shape['data']}"
        )


def put_batch(batch: PreferenceBatch, mesh: Mesh) -> PreferenceBatch:
    """Places a host batch on the mesh, rows along the data axis."""
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))


def replicate(tree, mesh: Mesh):
    """Places a whole tree on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
