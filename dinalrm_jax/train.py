"""Trains a reward model.

    python -m dinalrm_jax.train --config configs/quickstart.py [--workdir runs/quickstart] [--config.seed=1]

A run reads its records (the quickstart draws them first), takes or trains a backbone, freezes it,
trains LoRA and head on preference pairs, saves the model with its averaged weights to
WORKDIR/model, and reports. Started again on the same workdir it continues where it was. SIGTERM and
Ctrl-C save, then stop. With --distributed the processes of a job train together; all of them see
one file system.
"""

from dinalrm_jax.cli.command import answer_help, quieten_writers, run_command, tell
from dinalrm_jax.cli.options import TrainOptions

answer_help(__name__, __doc__, TrainOptions)  # before the imports that take a second

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding

from dinalrm_jax.cli.configs import load_run
from dinalrm_jax.config import ProfileConfig, StageConfig, SweepConfig, TrainConfig
from dinalrm_jax.data.config import MixedConfig
from dinalrm_jax.data.mixture import Mixture
from dinalrm_jax.data.records import Records, RecordsError
from dinalrm_jax.devices import processes
from dinalrm_jax.devices.compilation import disable_compilation_cache, enable_compilation_cache
from dinalrm_jax.devices.host_memory import keep_freed_memory
from dinalrm_jax.devices.placement import place
from dinalrm_jax.devices.sharding import gather
from dinalrm_jax.disk import AnyPath, as_path, is_whole
from dinalrm_jax.evaluation.pairs import HeldOutPairs, PairScorer, PairScores
from dinalrm_jax.evaluation.scoring import Level, NonFiniteScores
from dinalrm_jax.generator import Generator
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.backbone.family import transformer_functional
from dinalrm_jax.model.execution import ExecutionConfig
from dinalrm_jax.model.parameters import Functional, Params, draw, split
from dinalrm_jax.model.reward import is_trainable, reward_functional
from dinalrm_jax.model.tables import WeightsError
from dinalrm_jax.noise import NoiseDraw
from dinalrm_jax.scenes.config import SamplesConfig
from dinalrm_jax.scenes.samples import sample_captions, write_sample_records
from dinalrm_jax.timing.forecast import check_memory
from dinalrm_jax.training.checkpoint import BestCheckpoint, CheckpointError
from dinalrm_jax.training.finish import report, save_model
from dinalrm_jax.training.loop import fit
from dinalrm_jax.training.metrics import NonFiniteLoss
from dinalrm_jax.training.objectives import Objective, flow_matching_objective, reward_objective
from dinalrm_jax.training.run_weights import empty_prompt, frozen_arrays, open_base
from dinalrm_jax.training.setup import Setup, alone, set_up
from dinalrm_jax.training.step import TrainState, assemble
from dinalrm_jax.training.stopping import Stopped
from dinalrm_jax.training.stream import PairStream
from dinalrm_jax.training.sweep import sweep_runs
from dinalrm_jax.weights.pretrained import Origin, save_backbone


def run(config: TrainConfig, workdir: AnyPath) -> PairScores:
    """A whole training run; returns the held-out scores that its report shows.

    Raises:
        ConfigError, RecordsError, WeightsError: before anything is computed.
        Locked: another process is at work in the directory.
        Stopped: on SIGTERM or Ctrl-C, after saving.
        NonFiniteLoss, NonFiniteScores: the last good checkpoint is kept.
        CheckpointError, OSError: a full disk, above all; the last whole checkpoint is kept.
    """
    with alone(workdir):
        if config.samples is not None:  # there may not be so many
            captions = sample_captions(config.samples, config.scenes.two_groups)
        setup = set_up(config, workdir)
        config, mesh = setup.config, setup.mesh
        unconditional = empty_prompt(config, setup.base_model, workdir)  # before anything else is on the devices
        module = reward_functional(config.model, config.execution)

        # The backbone: loaded or random; then, where asked for, trained as a flow-matching generator.
        if config.generator is not None and not is_whole(workdir / "generator" / "backbone"):
            train_generator(setup)
        if config.samples is not None:
            setup = with_samples(setup, config.samples, captions)
        judged = config.evaluation
        scorer = PairScorer(
            module, setup.records, "eval", mesh, batch_size=judged.batch_size, max_pairs=judged.max_pairs
        )
        shardings = module.shardings(mesh)
        frozen = place(frozen_arrays(config, workdir, setup.inputs), config.execution.dtype, shardings)

        # LoRA and head learn the reward on the frozen backbone's features.
        if setup.start is None:
            first = draw(module, config.seed, is_trainable) | unconditional
        else:
            first, _ = split(setup.start, is_trainable)
        levels: tuple[Level, ...] = tuple(dict.fromkeys((judged.sigma, *judged.levels)))
        if judged.levels:
            levels += (judged.ensemble,)

        def objective(execution: ExecutionConfig) -> Objective:
            module = reward_functional(config.model, execution)
            return reward_objective(module, config.loss, config.reward.sigma, config.ensemble_term)

        state, best = train_stage(
            "reward",
            config.reward,
            objective,
            first,
            shardings,
            frozen,
            setup,
            held_out=HeldOutPairs(scorer, frozen, levels, NoiseDraw(judged.seed)),
            by_prompt=config.prompt_weights,
            profile=config.profile,
        )
        params = {**frozen, **state.result}
        save_model(setup, params, config.reward.steps)
        return report(setup, scorer, params, best)


def train_generator(setup: Setup) -> None:
    """Trains the whole transformer by flow matching and saves it as WORKDIR/generator/backbone."""
    config, transformer = setup.config, setup.config.model.transformer

    def module(execution: ExecutionConfig) -> Functional:
        # Blocks that are trained start as the identity; frozen random ones would teach LoRA nothing that way.
        return transformer_functional(transformer, execution, zero_init=True)

    trained = module(config.execution)
    first = draw(trained, config.seed) if setup.base_model is None else open_base(setup.base_model, config)
    state, _ = train_stage(
        "generator",
        config.generator,
        lambda execution: flow_matching_objective(module(execution), config.generator.sigma),
        first,
        trained.shardings(setup.mesh),
        {},
        setup,
    )
    whole = gather(state.result)
    if processes.is_first():
        # Evenly drawn levels ask for an even schedule, unless the transformer comes from elsewhere.
        origin = Origin(config.model.encoders, 1.0 if setup.base_model is None else 3.0)
        save_backbone(transformer, whole, setup.workdir / "generator" / "backbone", origin)
    processes.barrier("generator")


def with_samples(setup: Setup, config: SamplesConfig, captions: Mapping[str, Sequence[str]]) -> Setup:
    """The run on pairs of its generator's own pictures, WORKDIR/samples, which are drawn where they are not there.

    The pairs of drawn scenes, that the generator learned from, may stand beside them.
    """
    directory = setup.workdir / "samples"
    if not directory.exists() and processes.is_first():
        generator = Generator.from_pretrained(setup.workdir / "generator" / "backbone", dtype="float32")
        (size,) = setup.image_sizes

        def sample(captions, numbers, steps):
            return generator.sample(captions, size, steps, 1.0, config.seed, numbers=numbers, batch_size=64)

        write_sample_records(directory, config, captions, setup.config.model.encoders, sample)
    processes.barrier("samples")
    if not config.drawn:
        return dataclasses.replace(setup, records=Records(directory))
    drawn = MixedConfig(str(setup.records.directory), config.drawn)
    return dataclasses.replace(setup, records=Mixture((drawn, MixedConfig(str(directory)))))


def train_stage(
    name: str,
    stage: StageConfig,
    objective: Callable[[ExecutionConfig], Objective],
    first: Mapping[str, np.ndarray],
    shardings: Mapping[str, NamedSharding],
    frozen: Params,
    setup: Setup,
    *,
    held_out: HeldOutPairs | None = None,
    by_prompt: bool = False,
    profile: ProfileConfig = ProfileConfig(),
) -> tuple[TrainState, BestCheckpoint | None]:
    """One stage on the run's pairs, from the parameters `first` on the host; see `fit`; by_prompt: see `PairStream`."""
    config, mesh = setup.config, setup.mesh
    # Without rematerialisation, whose work is done twice, or loops, whose body XLA counts once.
    plain = dataclasses.replace(config.execution, layers="loop", remat="none", attention="xla")
    return fit(
        name,
        stage,
        # Placed here and not kept: the state has copies of its own.
        assemble(
            objective(config.execution), place(first, np.float32, shardings), frozen, stage, mesh, seed=config.seed
        ),
        PairStream(name, setup.records, stage.batch_size, config.seed, mesh, by_prompt),
        workdir=setup.workdir,
        open_log=setup.log,
        plain=None if config.execution == plain else objective(plain),
        held_out=held_out,
        profile=profile,
    )


def run_sweep(sweep: SweepConfig, workdir: AnyPath) -> None:
    """Runs every configuration with every seed, errors as for `run`; see `training.sweep`."""

    def generate(config: TrainConfig, shared: AnyPath) -> AnyPath:
        backbone = shared / "generator" / "backbone"
        if not is_whole(backbone):
            train_generator(set_up(config, shared))
        return backbone

    with alone(workdir):
        sweep_runs(sweep, workdir, run, generate)


def main(options: TrainOptions) -> int:
    """The run or the sweep that the config describes; a signal's status where one stopped it."""
    quieten_writers()
    config = load_run(options.config, options.overrides)
    workdir = as_path(options.workdir or f"runs/{config.name}")
    if options.check_memory:
        disable_compilation_cache()
        return check_memory(config, options.devices, workdir)
    keep_freed_memory()
    processes.initialize(options.distributed)
    enable_compilation_cache(workdir)
    processes.say(f"{config.name}: jax {jax.__version__} on {processes.devices()}, writing to {workdir}")
    try:
        if isinstance(config, SweepConfig):
            run_sweep(config, workdir)
        else:
            run(config, workdir)
    except Stopped as stop:
        if processes.is_first():
            tell(str(stop))
        return 128 + stop.number
    return 0


if __name__ == "__main__":
    known = (ConfigError, RecordsError, WeightsError, CheckpointError, NonFiniteLoss, NonFiniteScores, OSError)
    saved = "the same command goes on from what is saved"
    run_command(main, TrainOptions, errors=known, interrupted=saved, leave=processes.leave)
