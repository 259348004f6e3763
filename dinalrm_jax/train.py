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
import json
import logging as python_logging
import pathlib
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping

import jax
import numpy as np
from absl import app, flags, logging
from jax.sharding import Mesh
from ml_collections import config_flags

from dinalrm_jax import distributed
from dinalrm_jax.compilation import enable_compilation_cache
from dinalrm_jax.config import (
    ConfigError,
    ExecutionConfig,
    ProfileConfig,
    RehearsalConfig,
    StageConfig,
    SweepConfig,
    TrainConfig,
    from_mapping,
    known_keys,
    to_mapping,
)
from dinalrm_jax.data import rehearsal
from dinalrm_jax.data.datasets import preprocess
from dinalrm_jax.data.loader import Schedule, TrainingBatches
from dinalrm_jax.data.mixture import Mixture
from dinalrm_jax.data.records import Records, RecordsError
from dinalrm_jax.data.scene_records import write_scene_records
from dinalrm_jax.disk import lock
from dinalrm_jax.encoders import ImageCodec, load_image_codec
from dinalrm_jax.parameters import Params, draw
from dinalrm_jax.placement import place
from dinalrm_jax.reward_model import RewardModel, is_trainable, reward_functional
from dinalrm_jax.scoring import level_name
from dinalrm_jax.training.ahead import batch_shapes, compile_ahead, on_device
from dinalrm_jax.training.checkpoint import BestCheckpoint, CheckpointError, Checkpoints
from dinalrm_jax.training.evaluation import Evaluator, HeldOut, PairScores
from dinalrm_jax.training.metrics import MetricsLog, NonFiniteLoss, read_metrics
from dinalrm_jax.training.objectives import Objective, flow_matching_objective, reward_objective
from dinalrm_jax.training.optimizer import learning_rate_schedule, make_optimizer
from dinalrm_jax.training.preflight import check_records, check_stages
from dinalrm_jax.training.profiling import ProfileWindow
from dinalrm_jax.training.report import sweep_table, write_report
from dinalrm_jax.training.sharding import (
    gather,
    like_parameters,
    local_rows,
    make_mesh,
    parameter_shardings,
)
from dinalrm_jax.training.step import TrainState, make_step, model_flops
from dinalrm_jax.training.stopping import Stopped, StopSignals
from dinalrm_jax.weights.checkpoint import base_model_of, frozen_arrays, open_base, open_start
from dinalrm_jax.weights.files import fingerprint, read_json
from dinalrm_jax.weights.pretrained import save_backbone, save_reward_model, transformer_functional
from dinalrm_jax.weights.rules import WeightsError
from dinalrm_jax.workdir import check_workdir, claim_workdir

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
    with lock(workdir) if distributed.is_first() else contextlib.nullcontext():
        return _run(config, workdir)


def _run(given: TrainConfig, workdir: pathlib.Path) -> PairScores:
    mesh = make_mesh(given.mesh)
    check_stages(given, mesh)
    check_workdir(workdir, given, {})
    start = None if given.init_from is None else open_start(given, workdir)
    data = make_inputs(given, workdir)
    records = Mixture(given.mixture) if given.mixture else Records(data)
    config = in_steps(given, records)
    base_model = base_model_of(config, workdir)
    check_records(records, config, base_model)
    module = reward_functional(config.model, config.execution)
    shardings = parameter_shardings(module.shapes, mesh)
    evaluator = Evaluator(module, records, "eval", config.evaluation, mesh)
    inputs = {"data": records.fingerprint}
    if config.base_model is not None:
        inputs["base_model"] = fingerprint(open_base(config.base_model, config))
    if start is not None:
        inputs["init_from"] = fingerprint(start.arrays)
    run_name = claim_workdir(workdir, given, inputs)
    log = functools.partial(MetricsLog, workdir, project=config.wandb_project, run=run_name, config=to_mapping(config))

    # The backbone: loaded or random; then, where asked for, trained as a flow-matching generator.
    if config.generator is not None and not (workdir / "generator" / "backbone").exists():
        train_generator(config, base_model, records, workdir, mesh, log)
    frozen = place(frozen_arrays(config, workdir, inputs), config.execution.dtype, shardings)

    # LoRA and head learn the reward on the frozen backbone's features.
    first = draw(module, config.seed) if start is None else start.arrays
    trainable = {name: first[name] for name in module.shapes if is_trainable(name)}
    levels = tuple(dict.fromkeys((config.evaluation.sigma, *config.evaluation.levels)))
    if config.evaluation.levels:
        levels += (config.evaluation.ensemble,)
    plain = reward_functional(config.model, plain_execution(config))
    state, best = fit(
        "reward",
        config.reward,
        reward_objective(module, config.loss, config.reward.sigma, config.ensemble_term),
        reward_objective(plain, config.loss, config.reward.sigma, config.ensemble_term),
        trainable,
        frozen,
        records,
        config,
        workdir=workdir,
        mesh=mesh,
        log=log,
        held_out=HeldOut(evaluator, frozen, levels),
        profile=config.profile,
    )
    params = {**frozen, **state.result}
    save_model(config, params, workdir / "model", config.reward.steps)

    singles = sorted({*REPORT_SIGMAS, config.evaluation.sigma, *config.evaluation.levels})
    report_levels = (*singles, config.evaluation.ensemble)
    evaluator.compile(params, report_levels)
    total = 2 * len(report_levels) * evaluator.row_count()
    with distributed.progress(total=total, desc="held-out pairs", unit="image") as bar:
        scores = evaluator.run(params, report_levels, bar.update)
        shared = evaluator.run(params, report_levels, bar.update, shared=True)
    if distributed.is_first():
        history = read_metrics(workdir, "reward")
        codec = report_codec(records, base_model)
        weights = read_json(workdir / "model" / "config.json")["weights"]
        text = write_report(workdir / "report", records, scores, shared, history, codec, weights, best)
        print(f"\n{text}\nmodel: {workdir / 'model'}   report and plots: {workdir / 'report'}")
    distributed.barrier("report")
    return scores


def in_steps(config: TrainConfig, records: Records | Mixture) -> TrainConfig:
    """The configuration with every stage's length in steps, which is said."""
    lasting = {}
    pairs = Schedule(records.buckets("train"), 1, config.seed, records.weights("train")).epoch_pairs
    for name in ("generator", "reward"):
        stage = getattr(config, name)
        if stage is not None and stage.epochs is not None and pairs:
            lasting[name] = stage.lasting(pairs)
            distributed.say(
                f"{name}: {stage.epochs:g} epochs of {pairs:,.0f} pairs are {lasting[name].steps:,} steps of "
                f"{stage.batch_size}"
            )
    return dataclasses.replace(config, **lasting)


def save_model(config: TrainConfig, params: Params, directory: pathlib.Path, step: int) -> None:
    """Writes the model of a finished run, unless it is there; that of a shorter run keeps its step in its name."""
    found = read_json(directory / "config.json").get("step") if (directory / "config.json").exists() else None
    distributed.barrier("model looked for")  # before the first process moves it
    if found == step:
        return
    if found is not None:
        if distributed.is_first():
            directory.rename(directory.with_name(f"{directory.name}_step_{found}"))
        distributed.barrier("shorter model renamed")
    whole = gather(params)
    if distributed.is_first():
        model = RewardModel(config.model, whole, config.execution, likelihood=config.loss)
        save_reward_model(model, directory, step=step)


def make_inputs(config: TrainConfig, workdir: pathlib.Path) -> pathlib.Path:
    """The directory of the run's records; scenes and rehearsals are made where they are not there yet."""
    data = workdir / "data" if config.data is None else pathlib.Path(config.data)
    if config.rehearsal is not None:
        make_rehearsal(config, config.rehearsal, workdir)
    if config.scenes is not None and not data.exists() and distributed.is_first():
        write_scene_records(data, config.scenes, config.model.encoders)
    distributed.barrier("scenes")
    return data


def make_rehearsal(config: TrainConfig, wanted: RehearsalConfig, workdir: pathlib.Path) -> None:
    """Pipeline, source and records from nothing; see `RehearsalConfig`."""
    source, base_model = workdir / "source", workdir / "base_model"
    if distributed.is_first() and not base_model.exists():
        rehearsal.write_pipeline(base_model, wanted.seed, config.model.transformer)
    if distributed.is_first() and not source.exists():
        rehearsal.write_hpdv3(source, wanted.train_pairs, wanted.eval_pairs, wanted.seed)
    distributed.barrier("rehearsal")
    missing = not (workdir / "data").exists()
    distributed.barrier("records looked for")  # before any process makes them
    if missing:
        preprocess(source, workdir / "data", wanted.preparation, base_model)


def train_generator(
    config: TrainConfig,
    base_model: str | None,
    records: Records | Mixture,
    workdir: pathlib.Path,
    mesh: Mesh,
    log: Callable[[str], MetricsLog],
) -> None:
    """Trains the whole transformer by flow matching and saves it as WORKDIR/generator/backbone."""
    transformer = config.model.transformer
    # Blocks that are trained start as the identity; frozen random ones would teach LoRA nothing that way.
    module = transformer_functional(transformer, config.execution, zero_init=True)
    plain = transformer_functional(transformer, plain_execution(config), zero_init=True)
    state, _ = fit(
        "generator",
        config.generator,
        flow_matching_objective(module, config.generator.sigma),
        flow_matching_objective(plain, config.generator.sigma),
        draw(module, config.seed) if base_model is None else open_base(base_model, config),
        {},
        records,
        config,
        workdir=workdir,
        mesh=mesh,
        log=log,
    )
    whole = gather(state.result)
    if distributed.is_first():
        save_backbone(transformer, whole, workdir / "generator" / "backbone")
    distributed.barrier("generator")


def fit(
    name: str,
    stage: StageConfig,
    objective: Objective,
    plain_objective: Objective,
    params: Mapping[str, np.ndarray],
    frozen: Params,
    records: Records | Mixture,
    config: TrainConfig,
    *,
    workdir: pathlib.Path,
    mesh: Mesh,
    log: Callable[[str], MetricsLog],
    held_out: HeldOut | None = None,
    profile: ProfileConfig = ProfileConfig(),
) -> tuple[TrainState, BestCheckpoint | None]:
    """Trains one stage to its last step, continuing from its latest checkpoint.

    `plain_objective` is the objective by `plain_execution`: its FLOPs are the model's. Where `held_out` evaluates, the
    state of the highest accuracy is kept too.
    """
    optimizer = make_optimizer(stage.optimizer, stage.steps)
    learning_rate = learning_rate_schedule(stage.optimizer, stage.steps)
    shardings = parameter_shardings(params, mesh)
    averaged = stage.optimizer.ema_decay > 0
    create = lambda params: TrainState.create(params, optimizer, averaged)  # noqa: E731
    state_shardings = like_parameters(jax.eval_shape(create, params), shardings, mesh)
    state = jax.jit(create, out_shardings=state_shardings)(place(params, np.float32, shardings))
    frozen_shardings = {key: array.sharding for key, array in frozen.items()}
    step_fn = make_step(objective, optimizer, stage, mesh, config.seed, state_shardings, frozen_shardings)
    batches = TrainingBatches(records, stage.batch_size, config.seed, local_rows(stage.batch_size, mesh))
    checkpoints = Checkpoints(workdir / name / "checkpoints")
    best = None if held_out is None else BestCheckpoint(workdir / name / "best")
    if (restored := checkpoints.restore_latest(state)) is not None:
        state, loader_state = restored
        batches.set_state(loader_state)
        distributed.say(f"{name}: continuing from the checkpoint of step {int(state.step)}")

    first = int(state.step)
    if first > stage.steps:
        raise ConfigError(f"{name}: {workdir} is at step {first} already, beyond the {stage.steps} asked for")
    trained = sum(array.size for array in params.values())
    distributed.say(
        f"{name}: {trained:,} trainable parameters, {stage.steps - first} steps of {stage.batch_size} pairs"
    )
    for bucket, rows in batches.schedule.buckets.items():
        if len(rows) < stage.batch_size:
            distributed.say(
                f"{name}: bucket {bucket} has {len(rows)} pairs, fewer than a batch, which will repeat them"
            )
    compiled = flops = {}
    with (
        contextlib.closing(checkpoints),  # whatever happens, a save that was started is finished
        contextlib.closing(best) if best else contextlib.nullcontext(),
        contextlib.closing(log(name)) as log,
        contextlib.closing(ProfileWindow(workdir / "profile", profile)) as window,
        StopSignals() as stop,
    ):
        if first < stage.steps:
            shapes = batch_shapes(records, stage.batch_size, mesh)
            compiled, flops = compile_ahead(step_fn, state, frozen, shapes, mesh)
            if config.execution != plain_execution(config):
                flops = {
                    shape: model_flops(plain_objective, state.params, frozen, batch) for shape, batch in shapes.items()
                }
        if asked := stop.asked():
            raise Stopped(asked, name, first)

        def evaluate(step: int, state: TrainState) -> None:
            if held_out is None or not step or (step % stage.evaluate_every and step != stage.steps):
                return
            log.check_finite()
            started = time.perf_counter()
            values = held_out(state)
            best.offer(state, values["eval_accuracy"])
            log.write_values(step, values)
            log.pause(time.perf_counter() - started)

        if held_out is not None:
            held_out.compile(state)
        logged = any(row["step"] == first and "eval_accuracy" in row for row in read_metrics(workdir, name))
        if first and not distributed.all_agree(logged):
            evaluate(first, state)  # which a run that was killed after the save of this step did not get to
        queue = on_device(batches, stage.batch_size, mesh)
        log.start()
        with distributed.progress(total=stage.steps, initial=first, desc=name, unit="step") as bar:
            for step in range(first + 1, stage.steps + 1):
                started = time.perf_counter()
                batch, loader_state = next(queue)
                waited = time.perf_counter() - started
                jax.block_until_ready(state.step)  # at most one step in flight
                window.before(step)
                shape = batch.chosen.shape
                state, metrics = compiled[shape](state, frozen, batch)
                log.add(step, metrics, stage.batch_size, waited=waited, flops=flops[shape] / mesh.size)
                window.after(step, state)
                bar.update()
                asked, last = stop.asked(), step == stage.steps
                if step % stage.log_every == 0 or last:
                    values = log.write(step, {"learning_rate": float(learning_rate(step - 1))})
                    bar.set_postfix({key: f"{values[key]:.3f}" for key in ("loss", "accuracy") if key in values})
                if step % stage.checkpoint_every == 0 or last or asked:
                    log.check_finite()
                    checkpoints.save(state, loader_state)
                if asked:
                    raise Stopped(asked, name, step)
                evaluate(step, state)
    return state, best


def plain_execution(config: TrainConfig) -> ExecutionConfig:
    """Without rematerialisation, whose work is done twice, or loops, whose body XLA counts once."""
    return dataclasses.replace(config.execution, layers="loop", remat="none", attention="xla")


def report_codec(records: Records | Mixture, base_model: str | None) -> ImageCodec | None:
    """What can draw the records' images; None where that needs a pipeline and the run has none."""
    if records.encoders.kind == "sd3" and not (base_model and (pathlib.Path(base_model) / "vae").is_dir()):
        return None
    return load_image_codec(records.encoders, base_model)


# ------------------------------------------------------------------------------------- sweeps


def run_sweep(sweep: SweepConfig, workdir: pathlib.Path) -> None:
    """Runs every configuration with every seed and prints the held-out accuracies with their spread."""
    with lock(workdir) if distributed.is_first() else contextlib.nullcontext():
        _run_sweep(sweep, workdir)


def _run_sweep(sweep: SweepConfig, workdir: pathlib.Path) -> None:
    claim_workdir(workdir, sweep, {})
    accuracies = {config.name: [] for config in sweep.runs}
    for seed in sweep.seeds:
        for config in sweep.runs:
            config = dataclasses.replace(config, seed=seed)
            if not config.mixture:
                config = dataclasses.replace(config, data=config.data or str(workdir / "data"))
            if config.generator is not None:
                config = with_shared_generator(config, workdir / f"seed{seed}" / "generator_run")
            scores = run(config, workdir / f"seed{seed}" / config.name)
            levels = (0.0, config.evaluation.sigma, config.evaluation.ensemble)
            accuracies[config.name].append({level_name(level): scores.accuracy(level) for level in levels})
    table = sweep_table(accuracies)
    (workdir / "results.json").write_text(json.dumps(accuracies, indent=1) + "\n")
    (workdir / "report.md").write_text(table)
    print("\n" + table)


def with_shared_generator(config: TrainConfig, shared: pathlib.Path) -> TrainConfig:
    """The configuration with its generator stage replaced by that stage's result, trained in `shared`."""
    backbone = shared / "generator" / "backbone"
    if not backbone.exists():
        mesh = make_mesh(config.mesh)
        check_stages(config, mesh)
        records = Mixture(config.mixture) if config.mixture else Records(make_inputs(config, shared))
        config_in_steps = in_steps(config, records)
        base_model = base_model_of(config, shared)
        check_records(records, config_in_steps, base_model)
        inputs = {"data": records.fingerprint}
        if config.base_model is not None:
            inputs["base_model"] = fingerprint(open_base(config.base_model, config))
        run_name = claim_workdir(shared, config, inputs)
        log = functools.partial(MetricsLog, shared, project=config.wandb_project, run=run_name)
        train_generator(config_in_steps, base_model, records, shared, mesh, log)
    return dataclasses.replace(config, generator=None, base_model=str(backbone))


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
            near = difflib.get_close_matches(key, known_keys(), n=1)
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
        distributed.initialize(flags.FLAGS.distributed)
        devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
        distributed.say(f"{config.name}: jax {jax.__version__} on {devices}{processes}, writing to {workdir}")
        (run_sweep if isinstance(config, SweepConfig) else run)(config, workdir)
    except Stopped as stop:
        if distributed.is_first():
            print(stop, file=sys.stderr)
        sys.exit(128 + stop.number)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is saved", file=sys.stderr)
        distributed.leave(130)
    except (ConfigError, RecordsError, WeightsError, CheckpointError, NonFiniteLoss, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        distributed.leave(2)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "The experiment, e.g. configs/quickstart.py.")
    flags.DEFINE_string("workdir", None, "Everything the run writes; runs/<config name> if not given.")
    flags.DEFINE_bool("distributed", False, distributed.HELP)
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse_flags)
