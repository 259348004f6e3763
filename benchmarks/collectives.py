"""What devices tell each other in one train step, read from the compiled program.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m benchmarks.collectives
    pip install libtpu; python -m benchmarks.collectives --topology v5e:2x4

Compiles the step of configs/hpdv3.py (full size, one pair a device that takes rows) for eight virtual CPU devices,
or ahead of time for a TPU slice that need not be there, on four meshes, and prints the collectives by kind and
dtype: how many, their results' bytes, and the bytes that a device sends where they run as rings.
"""

import collections
import dataclasses
import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import numpy as np
from absl import app, flags
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

import configs.hpdv3 as hpdv3
from dinalrm_jax.config import TrainConfig
from dinalrm_jax.devices.mesh import row_devices
from dinalrm_jax.mapping import from_mapping
from dinalrm_jax.timing.collectives import KINDS, Collective, collectives
from dinalrm_jax.timing.forecast import abstract_batch, abstract_step

TOKENS = 205  # 77 of CLIP and 128 of T5
MESHES = ({"data": 8}, {"fsdp": 8}, {"tensor": 8}, {"data": 2, "fsdp": 2, "tensor": 2})


def mesh_name(mesh: dict[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in mesh.items())


def as_table(found: list[Collective]) -> str:
    """Lines of a Markdown table by kind and dtype."""
    by_kind = collections.defaultdict(list)
    for one in found:
        by_kind[one.kind, " ".join(one.dtypes)].append(one)
    lines = []
    for kind, dtypes in sorted(by_kind, key=lambda key: (KINDS.index(key[0]), key[1])):
        members = by_kind[kind, dtypes]
        results, sent = (sum(getattr(one, name) for one in members) for name in ("result_bytes", "sent_bytes"))
        lines.append(f"| {kind} | {dtypes} | {len(members)} | {results / 2**20:,.1f} | {sent / 2**20:,.1f} |")
    return "\n".join(lines)


def main(_) -> None:
    values = flags.FLAGS
    config = from_mapping(TrainConfig, hpdv3.get_config())
    # A loop's body would count once; what is computed again is gathered again.
    # Grouped attention is the CPU's own; what is read here is meant for other devices.
    execution = dataclasses.replace(config.execution, layers="loop", attention="xla")
    config = dataclasses.replace(config, execution=execution)
    wanted = values.topology and topologies.get_topology_desc(values.topology, "tpu").devices
    devices = np.array(wanted or jax.devices())
    if len(devices) != 8:
        raise app.UsageError(
            f"eight devices are needed, found {len(devices)}; set "
            "XLA_FLAGS=--xla_force_host_platform_device_count=8, or name a --topology"
        )
    print(
        f"jax {jax.__version__}, {len(devices)} x {devices[0].device_kind}, {values.resolution} x {values.resolution}, "
        f"one pair a device, {execution.dtype}, remat {execution.remat}"
    )
    for sizes in MESHES:
        if values.mesh not in (None, mesh_name(sizes)):
            continue
        shape = [sizes.get(axis, 1) for axis in ("data", "fsdp", "tensor")]
        mesh = Mesh(devices.reshape(shape), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
        compiled = (
            abstract_step(config, mesh)
            .lower(abstract_batch(config, mesh, 2 * (values.resolution,), row_devices(mesh), TOKENS))
            .compile()
        )
        print(f"\n{mesh_name(sizes)}")
        print("| collective | of | number | results, MiB | sent by a device, MiB |\n|---|---|---|---|---|")
        print(as_table(collectives(compiled.as_text(), len(devices))), flush=True)


if __name__ == "__main__":
    flags.DEFINE_string("topology", None, "A TPU slice of eight chips, as jax.experimental.topologies names it.")
    flags.DEFINE_integer("resolution", 1024, "Image side in pixels.")
    flags.DEFINE_enum("mesh", None, list(map(mesh_name, MESHES)), "One of the meshes; all if not given.")
    app.run(main)
