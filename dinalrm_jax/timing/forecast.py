"""Whether a run fits devices that are not here, before they are booked."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dinalrm_jax.config import SweepConfig, TrainConfig
from dinalrm_jax.data.buckets import Size
from dinalrm_jax.data.mixture import Mixture
from dinalrm_jax.data.records import Records
from dinalrm_jax.devices import processes
from dinalrm_jax.devices.chips import GIB, Target
from dinalrm_jax.devices.mesh import make_mesh, row_devices
from dinalrm_jax.devices.sharding import row_sharded
from dinalrm_jax.evaluation.pairs import score_step
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.batch import PreferenceBatch, PromptEmbeds
from dinalrm_jax.model.parameters import split
from dinalrm_jax.model.reward import is_trainable, reward_functional, stored_shapes
from dinalrm_jax.timing.plan import Plan, as_table, plan
from dinalrm_jax.training.objectives import reward_objective
from dinalrm_jax.training.setup import check_stages, trained_sizes
from dinalrm_jax.training.step import AssembledStep, assemble


def abstract_step(config: TrainConfig, mesh: Mesh) -> AssembledStep[PreferenceBatch]:
    """The reward stage's step over the shapes of its parameters."""
    module = reward_functional(config.model, config.execution)
    objective = reward_objective(module, config.loss, config.reward.sigma, config.ensemble_term)
    return assemble(objective, *split(_parameters(config, mesh), is_trainable), config.reward, mesh)


def abstract_batch(config: TrainConfig, mesh: Mesh, size: Size, pairs: int, tokens: int) -> PreferenceBatch:
    """The shapes of `pairs` pairs of images of (height, width) pixels, as records hold them."""
    latents, prompt = _rows(config, mesh, size, pairs, tokens)
    of_row: Any = row_sharded((pairs,), np.float32, mesh)
    return PreferenceBatch(latents, latents, prompt, of_row, of_row)


def forecast(
    config: TrainConfig, target: Target, sizes: Sequence[Size], tell: Callable[[str], None]
) -> dict[str, Plan]:
    """Compiles what a run's reward stage will, its largest images first: the step, and the evaluation beside its state.

    Args:
        config: in steps.
        target: the devices.
        sizes: (height, width) in pixels of the images.
        tell: told what is being compiled.

    Returns:
        Plans by name; an evaluation's batch is halved as the run itself would do.

    Raises:
        ConfigError: a mesh or an attention that the devices do not have.
    """
    mesh = make_mesh(config.mesh, target.devices())
    check_stages(config, mesh)
    largest = max(sizes, key=lambda size: size[0] * size[1])
    tokens = config.model.encoders.tokens
    step, batch = abstract_step(config, mesh), abstract_batch(config, mesh, largest, config.reward.batch_size, tokens)
    shown = f"{largest[0]} x {largest[1]}"
    tell(f"compiling the step of {config.reward.batch_size} pairs of {shown} for {target}")
    found = {"train step": plan(lambda: step.lower(batch), target)}
    held = sum(_local_bytes(array) for array in jax.tree.leaves(step.state)) / GIB
    known = sum(_local_bytes(array) for array in step.state.params.values()) / GIB
    levels = [np.asarray(config.evaluation.sigma, np.float32)]
    if config.evaluation.levels:
        levels.append(np.asarray(config.evaluation.ensemble, np.float32))
    for level in levels:
        rows = config.evaluation.batch_size
        while True:
            name = f"evaluation, {rows} images, {'ensemble' if level.ndim else 'a level'}"
            tell(f"compiling the {name} for {target}")
            one = plan(functools.partial(_evaluation, config, mesh, largest, rows, tokens, level), target)
            # The optimizer's moments and the average lie there beside it.
            one = dataclasses.replace(one, needed=one.needed + held - known)
            if one.fits or rows == row_devices(mesh):
                break
            rows = row_devices(mesh) * max(1, rows // row_devices(mesh) // 2)
        found[name] = one
    return found


def check_memory(config: TrainConfig | SweepConfig, devices: str, workdir: pathlib.Path) -> int:
    """Prints a table of `forecast` and what follows from it: `train --check-memory`.

    Image sizes are those of the run's records or, where there are none yet, the backbone's own.

    Returns:
        0 where all of it fits, else 1.

    Raises:
        ConfigError: a sweep, or as `forecast` and `Target` do.
    """
    if isinstance(config, SweepConfig):
        raise ConfigError("every run of a sweep has a memory of its own; check the config of one")
    data = workdir / "data" if config.data is None else pathlib.Path(config.data)
    if config.mixture or data.exists():
        records = Mixture(config.mixture) if config.mixture else Records(data)
        sizes, of = trained_sizes(records, config), f"the largest images of {records.directory}"
    else:
        spec = config.model.transformer.latents
        side = spec.downsampling * spec.trained_side
        sizes, of = ((side, side),), f"images of {side} x {side}, as there are no records yet"
    if config.reward.steps is None:  # how many they are is no matter to the program
        config = dataclasses.replace(config, reward=dataclasses.replace(config.reward, steps=1000, epochs=None))
    plans = forecast(config, Target.parse(devices), sizes, processes.say)
    print(f"{as_table(plans)}\n{of}: {advice(config, plans)}")
    return int(not all(one.fits for one in plans.values()))


def advice(config: TrainConfig, plans: dict[str, Plan]) -> str:
    """What to change so that a run fits, or that it does."""
    lacking = [name for name, one in plans.items() if not one.fits]
    if not lacking:
        return "it fits"
    changes = []
    if config.execution.remat not in ("block", "attention"):
        changes.append('execution.remat="block" keeps only the blocks\' inputs')
    if "train step" in lacking:
        changes.append(f"reward.micro_batches={2 * config.reward.micro_batches} takes half of a batch at a time")
    changes.append("mesh.fsdp splits the parameters, and more devices the rows")
    return f"{' and '.join(lacking)} does not fit; {'; '.join(changes)}"


def _evaluation(config: TrainConfig, mesh: Mesh, size: Size, rows: int, tokens: int, level) -> jax.stages.Lowered:
    module = reward_functional(config.model, config.execution)
    latents, prompt = _rows(config, mesh, size, rows, tokens)
    with jax.set_mesh(mesh):
        return score_step(module, mesh).lower(
            _parameters(config, mesh), latents, prompt, level, row_sharded((rows, 2), np.uint32, mesh)
        )


def _parameters(config: TrainConfig, mesh: Mesh) -> dict[str, Any]:
    shardings = reward_functional(config.model, config.execution).shardings(mesh)
    return {
        name: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=shardings[name])
        for name, shape in stored_shapes(config.model, config.execution).items()
    }


def _rows(config: TrainConfig, mesh: Mesh, size: Size, rows: int, tokens: int):
    spec = config.model.transformer.latents
    height, width = (side // spec.downsampling for side in size)
    shaped: Any = functools.partial(row_sharded, dtype=np.float16, mesh=mesh)
    prompt = PromptEmbeds(shaped((rows, tokens, spec.text_width)), shaped((rows, spec.pooled_width)))
    return shaped((rows, height, width, spec.channels)), prompt


def _local_bytes(array: Any) -> int:
    """What one device holds of it."""
    return int(np.prod(array.sharding.shard_shape(array.shape), initial=1)) * array.dtype.itemsize
