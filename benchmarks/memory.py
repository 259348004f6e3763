"""Memory of the full-size train step, by the compiler's own account, on accelerators that need not be there.

    pip install libtpu
    python -m benchmarks.memory [--topology v5e:2x4] [--resolution 1024] [--pairs 4]

Compiles the step of configs/hpdv3.py ahead of time for a TPU topology, without a TPU: on one device
and with the state split over all devices of the slice (fsdp), `--pairs` on each device. Prints what XLA's
memory analysis says of each device: arguments (weights, optimizer, EMA, batch), temporaries, and their
sum against the device's memory.
"""

import os
import time

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import numpy as np
from absl import app, flags
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

import configs.hpdv3 as hpdv3
from benchmarks.abstract_step import compile_step
from dinalrm_jax.config import TrainConfig
from dinalrm_jax.mapping import from_mapping

MEMORY = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}  # GiB of one chip, as its maker states it
GIB = 2**30


def analyse(config: TrainConfig, mesh: Mesh, resolution: int, pairs: int) -> tuple[float, float, float]:
    """(arguments, temporaries, seconds to compile) of the step on each device, GiB."""
    start = time.perf_counter()
    analysis = compile_step(config, mesh, resolution=resolution, pairs=pairs).memory_analysis()
    seconds = time.perf_counter() - start
    return analysis.argument_size_in_bytes / GIB, analysis.temp_size_in_bytes / GIB, seconds


def main(_) -> None:
    values = flags.FLAGS
    generation = values.topology.split(":")[0]
    limit = MEMORY[generation]
    devices = np.array(topologies.get_topology_desc(values.topology, "tpu").devices)
    config = from_mapping(TrainConfig, hpdv3.get_config())
    print(
        f"jax {jax.__version__}, {len(devices)} x {devices[0].device_kind}, 12 blocks, {values.resolution} x "
        f"{values.resolution}, {values.pairs} pairs a device, {config.execution.dtype}, remat "
        f"{config.execution.remat}, {config.execution.layers}"
    )
    print("| mesh | arguments, GiB | temporaries, GiB | of device memory | compile, s |\n|---|---|---|---|---|")
    for fsdp in (1, len(devices)):
        mesh = Mesh(devices[:fsdp].reshape(1, fsdp, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
        arguments, temporaries, seconds = analyse(config, mesh, values.resolution, values.pairs)
        share = (arguments + temporaries) / limit
        print(f"| fsdp={fsdp} | {arguments:.2f} | {temporaries:.2f} | {share:.0%} of {limit} GiB | {seconds:.0f} |")


if __name__ == "__main__":
    flags.DEFINE_string("topology", "v5p:2x2x2", "A TPU slice, as jax.experimental.topologies names it.")
    flags.DEFINE_integer("resolution", 1024, "Image side in pixels.")
    flags.DEFINE_integer("pairs", 4, "Pairs on each device.")
    app.run(main)
