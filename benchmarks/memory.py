"""Memory of the full-size train step, by the compiler's own account, on accelerators that need not be there.

    pip install libtpu
    python -m benchmarks.memory [--topology v5e:2x4] [--resolution 1024] [--pairs 4]

Compiles the step of configs/hpdv3.py ahead of time for a TPU topology, without a TPU: on one device
and with the state split over all devices of the slice (fsdp), `--pairs` on each device. Prints what XLA's
memory analysis says of each device: arguments (weights, optimizer, EMA, batch), temporaries, and their
sum against the device's memory.
"""

import dataclasses
import os
import time

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import numpy as np
from absl import app, flags
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

import configs.hpdv3 as hpdv3
import dinalrm_jax as dina
from dinalrm_jax.config import TrainConfig, from_mapping
from dinalrm_jax.reward_model import is_trainable, reward_functional
from dinalrm_jax.training.objectives import reward_objective
from dinalrm_jax.training.optimizer import make_optimizer
from dinalrm_jax.training.sharding import like_parameters, parameter_shardings, row_sharded
from dinalrm_jax.training.step import TrainState, make_step

MEMORY = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}  # GiB of one chip, as its maker states it
GIB = 2**30


def analyse(config: TrainConfig, mesh: Mesh, resolution: int, pairs: int) -> tuple[float, float, float]:
    """(arguments, temporaries, seconds to compile) of the step on each device, GiB."""
    module = reward_functional(config.model, config.execution)
    shardings = parameter_shardings(module.shapes, mesh)
    shapes = {
        name: jax.ShapeDtypeStruct(
            shape.shape, shape.dtype if is_trainable(name) else config.execution.dtype, sharding=shardings[name]
        )
        for name, shape in module.shapes.items()
    }
    frozen = {name: shape for name, shape in shapes.items() if not is_trainable(name)}
    optimizer = make_optimizer(config.reward.optimizer, config.reward.steps)
    trainable = {name: shape for name, shape in shapes.items() if is_trainable(name)}
    state = jax.eval_shape(lambda params: TrainState.create(params, optimizer), trainable)
    state_shardings = like_parameters(state, shardings, mesh)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, state_shardings)
    objective = reward_objective(module, config.loss, config.reward.sigma)
    frozen_shardings = {name: shardings[name] for name in frozen}
    step = make_step(objective, optimizer, config.reward.optimizer, mesh, 0, state_shardings, frozen_shardings)
    rows, side, transformer = pairs * mesh.size, resolution // 8, config.model.transformer
    latents = row_sharded((rows, side, side, transformer.in_channels), np.float16, mesh)
    prompt = dina.PromptEmbeds(
        row_sharded((rows, 205, transformer.joint_attention_dim), np.float16, mesh),
        row_sharded((rows, transformer.pooled_projection_dim), np.float16, mesh),
    )
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        compiled = step.lower(state, frozen, dina.PreferenceBatch(latents, latents, prompt)).compile()
    analysis = compiled.memory_analysis()
    seconds = time.perf_counter() - start
    return analysis.argument_size_in_bytes / GIB, analysis.temp_size_in_bytes / GIB, seconds


def main(_) -> None:
    values = flags.FLAGS
    generation = values.topology.split(":")[0]
    limit = MEMORY[generation]
    devices = np.array(topologies.get_topology_desc(values.topology, "tpu").devices)
    config = from_mapping(TrainConfig, hpdv3.get_config())
    # "auto" asks which backend this process has, which is not the one that is compiled for.
    execution = dataclasses.replace(config.execution, attention="xla")
    config = dataclasses.replace(config, execution=execution)
    print(
        f"jax {jax.__version__}, {len(devices)} x {devices[0].device_kind}, 12 blocks, {values.resolution} x "
        f"{values.resolution}, {values.pairs} pairs a device, {execution.dtype}, remat {execution.remat}, "
        f"{execution.layers}"
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
