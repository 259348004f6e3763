"""Trains a reward model.

    python -m dinalrm_jax.train --config configs/quickstart.py [--workdir runs/quickstart] [--config.seed=1]

A run reads its records (the quickstart draws them first), takes or trains a backbone, freezes it,
trains LoRA and head on preference pairs, saves the model with its averaged weights to
WORKDIR/model, and reports. Started again on the same workdir it continues where it was. SIGTERM and
Ctrl-C save, then stop.
"""

import contextlib
import dataclasses
import json
import pathlib
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from absl import app, flags, logging
from jax.sharding import Mesh
from ml_collections import config_flags
from tqdm import tqdm

from dinalrm_jax import noise
from dinalrm_jax.compilation_cache import enable_compilation_cache
from dinalrm_jax.config import ConfigError, StageConfig, SweepConfig, TrainConfig, from_mapping, to_mapping
from dinalrm_jax.data.batch import validate_latents
from dinalrm_jax.data.loader import training_batches
from dinalrm_jax.data.records import Records, RecordsError
from dinalrm_jax.data.scene_records import write_scene_records
from dinalrm_jax.parameters import Params
from dinalrm_jax.reward_model import RewardModel, is_trainable, reward_functional, store
from dinalrm_jax.training.checkpoint import CheckpointError, Checkpoints
from dinalrm_jax.training.evaluation import Evaluator, PairScores
from dinalrm_jax.training.metrics import MetricsLog, NonFiniteLoss, read_metrics
from dinalrm_jax.training.objectives import Objective, flow_matching_objective, reward_objective
from dinalrm_jax.training.optimizer import learning_rate_schedule, make_optimizer
from dinalrm_jax.training.report import level_name, write_report
from dinalrm_jax.training.sharding import check_batch_size, make_mesh, put_batch, replicate
from dinalrm_jax.training.step import TrainState, make_step
from dinalrm_jax.weights.pretrained import (
    load_backbone,
    save_backbone,
    save_reward_model,
    transformer_functional,
    truncate,
)
from dinalrm_jax.weights.rules import WeightsError

REPORT_SIGMAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


class Stopped(Exception):
    """A signal asked to stop, and the state is saved; `number` is the signal's."""

    def __init__(self, number: int, stage: str, step: int):
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} after {stage} step {step}; the same command continues from there")
        self.number = number


def run(config: TrainConfig, workdir: pathlib.Path) -> PairScores:
    """A whole training run; returns the held-out scores that its report shows.

    Raises:
        ConfigError, RecordsError, WeightsError: before anything is computed.
        Stopped: on SIGTERM or Ctrl-C, after saving.
        NonFiniteLoss: with the step; the last good checkpoint is kept.
    """
    mesh = make_mesh(config.mesh)
    check_stages(config, mesh)
    check_workdir(workdir, config)
    data = workdir / "data" if config.data is None else pathlib.Path(config.data)
    if config.scenes is not None and not data.exists():
        write_scene_records(data, config.scenes)
    records = Records(data)
    check_records(records, config)
    module = reward_functional(config.model, config.execution)
    evaluator = Evaluator(module, records, "eval", config.evaluation)
    claim_workdir(workdir, config)

    # The backbone: loaded, or random; then, where asked for, trained as a flow-matching generator.
    backbone = make_backbone(config, records, workdir, mesh)

    # LoRA and head learn the reward on the frozen backbone's features.
    initial = store(module.init(config.seed), config.execution)
    trainable = {name: array for name, array in initial.items() if is_trainable(name)}
    frozen = replicate(store(truncate(backbone, config.model), config.execution), mesh)
    sigma = config.evaluation.sigma

    def held_out_accuracy(state: TrainState) -> dict[str, float]:
        accuracy = evaluator.run({**frozen, **state.ema}, [sigma]).accuracy(sigma)
        return {"eval_accuracy": accuracy, "eval_sigma": sigma}

    state = fit(
        "reward",
        config.reward,
        reward_objective(module, config.loss, config.reward.sigma),
        trainable,
        frozen,
        records,
        workdir=workdir,
        mesh=mesh,
        seed=config.seed,
        evaluate=held_out_accuracy,
    )
    model = RewardModel(config.model, {**frozen, **state.ema}, config.execution)
    if not (workdir / "model").exists():
        save_reward_model(model, workdir / "model")

    levels = (*sorted({*REPORT_SIGMAS, sigma}), config.evaluation.ensemble)
    with tqdm(total=len(levels) * evaluator.row_count(), desc="held-out pairs", unit="image") as bar:
        scores = evaluator.run(model.params, levels, bar.update)
    print("\n" + write_report(workdir / "report", records, scores, read_metrics(workdir, "reward")))
    print(f"model: {workdir / 'model'}   report and plots: {workdir / 'report'}")
    return scores


def make_backbone(config: TrainConfig, records: Records, workdir: pathlib.Path, mesh: Mesh) -> Params:
    """A whole transformer's parameters: a finished generator stage's, else loaded or random, then trained."""
    finished = workdir / "generator" / "backbone"
    if finished.exists():
        return load_backbone(finished)[1]
    transformer = config.model.transformer
    # Blocks that will be trained start as the identity; frozen random ones would teach LoRA nothing that way.
    module = transformer_functional(transformer, config.execution, zero_init=config.generator is not None)
    if config.base_model is None:
        params = module.init(config.seed)
    else:
        found, params = load_backbone(config.base_model)
        if found != transformer:
            raise ConfigError(f"base_model {config.base_model} has geometry {found}, the config says {transformer}")
    if config.generator is None:
        return params
    objective = flow_matching_objective(module, config.generator.sigma)
    state = fit(
        "generator", config.generator, objective, params, {}, records, workdir=workdir, mesh=mesh, seed=config.seed
    )
    save_backbone(transformer, state.ema, finished)
    return state.ema


def fit(
    name: str,
    stage: StageConfig,
    objective: Objective,
    params: Params,
    frozen: Params,
    records: Records,
    *,
    workdir: pathlib.Path,
    mesh: Mesh,
    seed: int,
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
) -> TrainState:
    """Trains one stage to its last step, continuing from its latest checkpoint."""
    optimizer = make_optimizer(stage.optimizer, stage.steps)
    learning_rate = learning_rate_schedule(stage.optimizer, stage.steps)
    step_fn = make_step(objective, optimizer, stage.optimizer, mesh, seed)
    state = replicate(TrainState.create(params, optimizer), mesh)
    batches = training_batches(records, stage.batch_size, seed)
    checkpoints = Checkpoints(workdir / name / "checkpoints")
    if (restored := checkpoints.restore_latest(state, mesh)) is not None:
        state, loader_state = restored
        batches.set_state(loader_state)
        print(f"{name}: continuing from the checkpoint of step {int(state.step)}")

    log = MetricsLog(workdir, name)
    first = int(state.step)
    trained = sum(array.size for array in params.values())
    print(f"{name}: {trained:,} trainable parameters, {stage.steps - first} steps; the first compiles")
    with (
        contextlib.closing(checkpoints),  # whatever happens, a save that was started is finished
        contextlib.closing(log),
        StopSignals() as stop,
        tqdm(total=stage.steps, initial=first, desc=name, unit="step") as bar,
    ):
        for step in range(first + 1, stage.steps + 1):
            batch = put_batch(next(batches), mesh)
            jax.block_until_ready(state.step)  # at most one step in flight: the next batch overlaps with it
            state, metrics = step_fn(state, frozen, batch)
            log.add(step, metrics, stage.batch_size)
            bar.update()
            stopping, last = stop.number is not None, step == stage.steps
            if step % stage.log_every == 0 or last:
                values = log.write(step, {"learning_rate": float(learning_rate(step - 1))})
                bar.set_postfix({key: f"{values[key]:.3f}" for key in ("loss", "accuracy") if key in values})
            if step % stage.checkpoint_every == 0 or last or stopping:
                log.check_finite()
                checkpoints.save(state, batches.get_state())
            if stopping:
                raise Stopped(stop.number, name, step)
            if evaluate is not None and (step % stage.evaluate_every == 0 or last):
                log.write_values(step, evaluate(state))
    return state


class StopSignals:
    """While open, the first SIGTERM or Ctrl-C only sets `number`; a second one acts as ever."""

    def __enter__(self) -> "StopSignals":
        self.number: int | None = None
        self._previous = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _receive(self, number, frame) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __exit__(self, *exception) -> None:
        self._restore()


# --------------------------------------------------------------------------- before work starts


def check_stages(config: TrainConfig, mesh: Mesh) -> None:
    """Raises ConfigError for a stage that cannot run on this mesh or samples levels that do not exist."""
    for stage in (config.generator, config.reward):
        if stage is not None:
            check_batch_size(stage.batch_size, stage.optimizer.accumulation_steps, mesh)
            noise.sampler(stage.sigma)


def check_records(records: Records, config: TrainConfig) -> None:
    """Raises RecordsError unless the records were made for a model of this geometry."""
    scenes = records.manifest.get("source", {}).get("scenes")
    if config.scenes is not None and scenes != to_mapping(config.scenes):
        raise RecordsError(
            f"{records.directory} holds other scenes than the config asks for: {scenes} there, "
            f"{to_mapping(config.scenes)} here; remove it, or choose another `data`"
        )
    for name, stage in (("generator", config.generator), ("reward", config.reward)):
        if stage is not None and len(records.pairs("train")) < stage.batch_size:
            raise RecordsError(
                f"{records.directory} has {len(records.pairs('train'))} training pairs, a batch of the {name} stage "
                f"takes {stage.batch_size}"
            )
    transformer = config.model.transformer
    prompt, latents = records.prompts[0], records.images[0].latents
    found = (latents.shape[-1], prompt.prompt_embeds.shape[-1], prompt.pooled_prompt_embeds.shape[-1])
    expected = (transformer.in_channels, transformer.joint_attention_dim, transformer.pooled_projection_dim)
    if found != expected:
        raise RecordsError(
            f"{records.directory} was made by other encoders than this model's: latent channels, prompt and pooled "
            f"widths are {found}, the model takes {expected}; its manifest says {records.manifest.get('codec')} and "
            f"{records.manifest.get('text')}"
        )
    try:
        validate_latents(latents[None], latents.shape[-1], transformer.patch_size, transformer.pos_embed_max_size)
    except ValueError as error:
        raise RecordsError(f"{records.directory}: {error}") from None


def check_workdir(workdir: pathlib.Path, config: TrainConfig | SweepConfig) -> None:
    """Raises ConfigError if the directory holds a run of another configuration."""
    path = workdir / "config.json"
    if path.exists():
        current = json.loads(json.dumps(to_mapping(config)))
        changed = ", ".join(_differences(json.loads(path.read_text()), current))
        if changed:
            raise ConfigError(
                f"{workdir} holds a run of another configuration; changed: {changed}. Choose another --workdir, or "
                "restore these values to continue that run"
            )


def claim_workdir(workdir: pathlib.Path, config: TrainConfig | SweepConfig) -> None:
    """Makes the run's directory and writes its configuration there; see `check_workdir`."""
    check_workdir(workdir, config)
    workdir.mkdir(parents=True, exist_ok=True)
    partial = workdir / "config.partial"
    partial.write_text(json.dumps(to_mapping(config), indent=1) + "\n")
    partial.replace(workdir / "config.json")


def _differences(old, new, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [d for key in keys for d in _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)]
    return [] if old == new else [f"{path} ({old!r} -> {new!r})"]


# ------------------------------------------------------------------------------------- sweeps


def run_sweep(sweep: SweepConfig, workdir: pathlib.Path) -> None:
    """Runs every configuration with every seed and prints the held-out accuracies with their spread."""
    claim_workdir(workdir, sweep)
    accuracies = {config.name: [] for config in sweep.runs}
    for seed in sweep.seeds:
        for config in sweep.runs:
            config = dataclasses.replace(config, seed=seed, data=config.data or str(workdir / "data"))
            if config.generator is not None:
                shared = workdir / f"seed{seed}" / "generator_run"
                config = with_shared_generator(config, shared)
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
        if config.scenes is not None and not pathlib.Path(config.data).exists():
            write_scene_records(config.data, config.scenes)
        records = Records(config.data)
        check_records(records, config)
        make_backbone(config, records, shared, mesh)
    return dataclasses.replace(config, generator=None, base_model=str(backbone))


def sweep_table(accuracies: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """A Markdown table of run -> one {level: accuracy} a seed: mean and standard deviation, in per cent."""
    levels, seeds = list(next(iter(accuracies.values()))[0]), len(next(iter(accuracies.values())))
    lines = [
        f"Held-out pair accuracy, %, mean ± standard deviation over {seeds} seeds",
        "",
        "| trained | " + " | ".join(f"at {level}" for level in levels) + " |",
        "|---" * (len(levels) + 1) + "|",
    ]
    for name, rows in accuracies.items():
        columns = [100 * np.array([row[level] for row in rows]) for level in levels]
        cells = [f"{column.mean():.1f} ± {column.std(ddof=min(1, seeds - 1)):.1f}" for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, with one message instead of a traceback for an override that ml_collections refuses."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        meant = re.search(r'Did you mean "(\w+)" instead of "(\w+)"', str(error))
        print(
            f"error: unknown key {meant[2]!r}; did you mean {meant[1]!r}?" if meant else f"error: {error}",
            file=sys.stderr,
        )
        sys.exit(2)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    logging.set_verbosity(logging.WARNING)  # orbax and tfds tell every file they touch
    enable_compilation_cache()
    try:
        file = config_flags.get_config_filename(flags.FLAGS["config"])
        if not pathlib.Path(file.split(":")[0]).is_file():
            raise FileNotFoundError(f"no config file {file}")
        values = flags.FLAGS.config
        config = from_mapping(SweepConfig if "runs" in values else TrainConfig, values)
        workdir = pathlib.Path(flags.FLAGS.workdir or f"runs/{config.name}")
        devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        print(f"{config.name}: jax {jax.__version__} on {devices}, writing to {workdir}")
        (run_sweep if isinstance(config, SweepConfig) else run)(config, workdir)
    except Stopped as stop:
        print(stop, file=sys.stderr)
        sys.exit(128 + stop.number)
    except (ConfigError, RecordsError, WeightsError, CheckpointError, NonFiniteLoss, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "The experiment, e.g. configs/quickstart.py.")
    flags.DEFINE_string("workdir", None, "Everything the run writes; runs/<config name> if not given.")
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse_flags)
