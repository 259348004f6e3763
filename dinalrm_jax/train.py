"""Trains a reward model.

    python -m dinalrm_jax.train --config configs/quickstart.py [--workdir runs/quickstart] [--config.seed=1]

A run reads its records (the quickstart draws them first), takes or trains a backbone, freezes it,
trains LoRA and head on preference pairs, saves the model with its averaged weights to
WORKDIR/model, and reports. Started again on the same workdir it continues where it was. SIGTERM and
Ctrl-C save, then stop. With --distributed the processes of a job train together; all of them see
one file system.
"""

import contextlib
import dataclasses
import difflib
import functools
import logging as python_logging
import pathlib
import re
import sys
import threading
from collections.abc import Callable, Mapping

import jax
import numpy as np
from absl import app, flags, logging
from jax.sharding import NamedSharding
from ml_collections import config_flags

from dinalrm_jax.config import ProfileConfig, StageConfig, SweepConfig, TrainConfig
from dinalrm_jax.data.records import RecordsError
from dinalrm_jax.devices import processes
from dinalrm_jax.devices.compilation import enable_compilation_cache
from dinalrm_jax.devices.placement import place
from dinalrm_jax.devices.sharding import gather
from dinalrm_jax.disk import lock
from dinalrm_jax.encoders.load import load_image_codec
from dinalrm_jax.evaluation.pairs import HeldOutPairs, PairScorer, PairScores
from dinalrm_jax.evaluation.run_report import write_report
from dinalrm_jax.mapping import ConfigError, from_mapping, keys_below
from dinalrm_jax.model.backbone.family import transformer_functional
from dinalrm_jax.model.execution import ExecutionConfig
from dinalrm_jax.model.parameters import Functional, Params, draw, split
from dinalrm_jax.model.reward import is_trainable, reward_functional
from dinalrm_jax.model.tables import WeightsError
from dinalrm_jax.noise import NoiseDraw
from dinalrm_jax.training.checkpoint import BestCheckpoint, CheckpointError
from dinalrm_jax.training.loop import fit
from dinalrm_jax.training.metrics import NonFiniteLoss, read_metrics
from dinalrm_jax.training.objectives import Objective, flow_matching_objective, reward_objective
from dinalrm_jax.training.run_weights import frozen_arrays, open_base
from dinalrm_jax.training.setup import Setup, set_up
from dinalrm_jax.training.step import TrainState, assemble
from dinalrm_jax.training.stopping import Stopped
from dinalrm_jax.training.stream import PairStream
from dinalrm_jax.training.sweep import sweep_runs
from dinalrm_jax.weights.files import read_json
from dinalrm_jax.weights.pretrained import save_backbone, save_reward_model

REPORT_SIGMAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


def run(config: TrainConfig, workdir: pathlib.Path) -> PairScores:
    """A whole training run; returns the held-out scores that its report shows.

    Raises:
        ConfigError, RecordsError, WeightsError: before anything is computed.
        Locked: another process is at work in the directory.
        Stopped: on SIGTERM or Ctrl-C, after saving.
        NonFiniteLoss: with the step; the last good checkpoint is kept.
        CheckpointError, OSError: a full disk, above all; the last whole checkpoint is kept.
    """
    with alone(workdir):
        setup = set_up(config, workdir)
        config, mesh = setup.config, setup.mesh
        module = reward_functional(config.model, config.execution)
        judged = config.evaluation
        scorer = PairScorer(
            module, setup.records, "eval", mesh, batch_size=judged.batch_size, max_pairs=judged.max_pairs
        )

        # The backbone: loaded or random; then, where asked for, trained as a flow-matching generator.
        if config.generator is not None and not (workdir / "generator" / "backbone").exists():
            train_generator(setup)
        shardings = module.shardings(mesh)
        frozen = place(frozen_arrays(config, workdir, setup.inputs), config.execution.dtype, shardings)

        # LoRA and head learn the reward on the frozen backbone's features.
        first = draw(module, config.seed) if setup.start is None else setup.start
        trainable, _ = split(first, is_trainable)
        levels = tuple(dict.fromkeys((judged.sigma, *judged.levels)))
        if judged.levels:
            levels += (judged.ensemble,)

        def objective(execution: ExecutionConfig) -> Objective:
            module = reward_functional(config.model, execution)
            return reward_objective(module, config.loss, config.reward.sigma, config.ensemble_term)

        state, best = train_stage(
            "reward",
            config.reward,
            objective,
            trainable,
            shardings,
            frozen,
            setup,
            held_out=HeldOutPairs(scorer, frozen, levels, NoiseDraw(judged.seed)),
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
        save_backbone(transformer, whole, setup.workdir / "generator" / "backbone")
    processes.barrier("generator")


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
    profile: ProfileConfig = ProfileConfig(),
) -> tuple[TrainState, BestCheckpoint | None]:
    """One stage on the run's pairs, from the parameters `first` on the host; see `fit`."""
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
        PairStream(name, setup.records, stage.batch_size, config.seed, mesh),
        workdir=setup.workdir,
        open_log=setup.log,
        plain=None if config.execution == plain else objective(plain),
        held_out=held_out,
        profile=profile,
    )


def save_model(setup: Setup, params: Params, step: int) -> None:
    """Writes the model of a finished run, unless it is there; that of a shorter run keeps its step in its name."""
    directory = setup.workdir / "model"
    found = read_json(directory / "config.json").get("step") if (directory / "config.json").exists() else None
    processes.barrier("model looked for")  # before the first process moves it
    if found == step:
        return
    if found is not None:
        if processes.is_first():
            directory.rename(directory.with_name(f"{directory.name}_step_{found}"))
        processes.barrier("shorter model renamed")
    whole = gather(params)
    if processes.is_first():
        save_reward_model(directory, setup.config.model, whole, setup.config.loss, setup.image_sizes, step)


def report(setup: Setup, scorer: PairScorer, params: Params, best: BestCheckpoint) -> PairScores:
    """Scores the held-out pairs at many levels, and writes what the run leaves for people."""
    config, workdir = setup.config, setup.workdir
    singles = sorted({*REPORT_SIGMAS, config.evaluation.sigma, *config.evaluation.levels})
    levels = (*singles, config.evaluation.ensemble)
    scorer.compile(params, levels)
    with processes.progress(total=2 * len(levels) * scorer.row_count(), desc="held-out pairs", unit="image") as bar:
        own, same = (NoiseDraw(config.evaluation.seed, shared) for shared in (False, True))
        scores = scorer.run(params, levels, own, bar.update)
        shared = scorer.run(params, levels, same, bar.update)
    if processes.is_first():
        encoders, pipeline = setup.records.encoders, setup.base_model
        # An SD3 VAE draws the records' images; without one there is no contact sheet.
        drawn = encoders.kind != "sd3" or (pipeline is not None and (pathlib.Path(pipeline) / "vae").is_dir())
        text = write_report(
            workdir / "report",
            setup.records,
            scores,
            shared,
            history=read_metrics(workdir, "reward"),
            codec=load_image_codec(encoders, pipeline) if drawn else None,
            weights=read_json(workdir / "model" / "config.json")["weights"],
            best=(best.step, best.accuracy),
            note="rehearsal: the base model's weights are noise, its VAE's too" if config.rehearsal else None,
        )
        print(f"\n{text}\nmodel: {workdir / 'model'}   report and plots: {workdir / 'report'}")
    processes.barrier("report")
    return scores


def run_sweep(sweep: SweepConfig, workdir: pathlib.Path) -> None:
    """Runs every configuration with every seed, errors as for `run`; see `training.sweep`."""

    def generate(config: TrainConfig, shared: pathlib.Path) -> pathlib.Path:
        backbone = shared / "generator" / "backbone"
        if not backbone.exists():
            train_generator(set_up(config, shared))
        return backbone

    with alone(workdir):
        sweep_runs(sweep, workdir, run, generate)


def alone(workdir: pathlib.Path) -> contextlib.AbstractContextManager:
    """The workdir's lock, of all processes of this run together."""
    return lock(workdir) if processes.is_first() else contextlib.nullcontext()


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, with one message instead of a traceback for an override that ml_collections refuses.

    `--config.generator=None` is taken for any value that may be None, a section among them.
    """
    nothing = [argument for argument in argv if re.fullmatch(r"--config\.[\w.]+=None", argument)]
    try:
        rest = app.parse_flags_with_usage([argument for argument in argv if argument not in nothing])
        for argument in nothing:
            *parents, key = argument.removeprefix("--config.").removesuffix("=None").split(".")
            section = functools.reduce(lambda node, name: node[name], parents, flags.FLAGS.config)
            section[key]  # raises KeyError for an unknown one
            with section.ignore_type():
                section[key] = None
        return rest
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        refused = re.search(r'instead of "(\w+)"', str(error))
        key = refused[1] if refused else str(error).strip("\"'")
        if re.fullmatch(r"\w+", key):
            near = difflib.get_close_matches(key, keys_below(TrainConfig) | keys_below(SweepConfig), n=1)
            hint = f"did you mean {near[0]!r}?" if near else "dinalrm_jax/config.py has them all"
            print(f"error: unknown key {key!r}; {hint}", file=sys.stderr)
        else:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def quieten_writers() -> None:
    """Of what orbax and TensorBoard do in threads, failures are told once: in the main thread, which raises them too.

    (A full disk is a thousand lines otherwise; and orbax and tfds tell every file they touch.)
    """
    logging.set_verbosity(logging.FATAL)
    for name in ("asyncio", "concurrent.futures"):
        python_logging.getLogger(name).setLevel(python_logging.CRITICAL)
    threading.excepthook = sys.unraisablehook = lambda failure: None
    told = sys.excepthook  # which tensorstore calls from threads of its own

    def of_the_main_thread(*failure):
        if threading.current_thread() is threading.main_thread():
            told(*failure)

    sys.excepthook = of_the_main_thread


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    quieten_writers()
    enable_compilation_cache()
    try:
        file = config_flags.get_config_filename(flags.FLAGS["config"])
        if not pathlib.Path(file.split(":")[0]).is_file():
            raise FileNotFoundError(f"no config file {file}")
        values = flags.FLAGS.config
        config = from_mapping(SweepConfig if "runs" in values else TrainConfig, values)
        workdir = pathlib.Path(flags.FLAGS.workdir or f"runs/{config.name}")
        processes.initialize(flags.FLAGS.distributed)
        devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        several = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
        processes.say(f"{config.name}: jax {jax.__version__} on {devices}{several}, writing to {workdir}")
        (run_sweep if isinstance(config, SweepConfig) else run)(config, workdir)
    except Stopped as stop:
        if processes.is_first():
            print(stop, file=sys.stderr)
        sys.exit(128 + stop.number)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is saved", file=sys.stderr)
        processes.leave(130)
    except (ConfigError, RecordsError, WeightsError, CheckpointError, NonFiniteLoss, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        processes.leave(2)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "The experiment, e.g. configs/quickstart.py.")
    flags.DEFINE_string("workdir", None, "Everything the run writes; runs/<config name> if not given.")
    flags.DEFINE_bool("distributed", False, processes.HELP)
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse_flags)
