"""What a run stands on: records, mesh, base model, checked and claimed before anything is computed."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Mapping

import numpy as np
from jax.sharding import Mesh

from dinalrm_jax.config import TrainConfig
from dinalrm_jax.data.buckets import Size
from dinalrm_jax.data.loader import Schedule
from dinalrm_jax.data.mixture import AnyRecords, Mixture
from dinalrm_jax.data.records import Records
from dinalrm_jax.data.sources.datasets import preprocess
from dinalrm_jax.devices import processes
from dinalrm_jax.devices.mesh import make_mesh
from dinalrm_jax.disk import AnyPath, lock, mounted
from dinalrm_jax.mapping import ConfigError, to_mapping
from dinalrm_jax.scenes import rehearsal
from dinalrm_jax.scenes.config import RehearsalConfig
from dinalrm_jax.scenes.records import write_scene_records
from dinalrm_jax.training.metrics import MetricsLog
from dinalrm_jax.training.preflight import check_records, check_stages
from dinalrm_jax.training.run_weights import base_model_of, open_base, open_start
from dinalrm_jax.training.workdir import check_workdir, claim_workdir
from dinalrm_jax.weights.files import fingerprint


@dataclasses.dataclass(frozen=True)
class Setup:
    """A run that may begin, made by `set_up`.

    Attributes:
        config: with every stage's length in steps.
        workdir: which is this run's.
        mesh: over all devices.
        records: to train and be judged on.
        base_model: directory of the backbone it starts from; None: there is none.
        start: the model's arrays that `config.init_from` names; None: it names none.
        inputs: fingerprints of what is read.
        run: the workdir's own name.
        image_sizes: (height, width) in pixels of the images trained on.
    """

    config: TrainConfig
    workdir: AnyPath
    mesh: Mesh
    records: AnyRecords
    base_model: str | None
    start: Mapping[str, np.ndarray] | None
    inputs: Mapping[str, str]
    run: str
    image_sizes: tuple[Size, ...]

    def log(self, stage: str) -> MetricsLog:
        """The log of a stage."""
        config = self.config
        return MetricsLog(self.workdir, stage, project=config.wandb_project, run=self.run, config=to_mapping(config))


def set_up(given: TrainConfig, workdir: AnyPath) -> Setup:
    """Finds or makes a run's inputs, checks that they fit each other, and claims its directory.

    Raises:
        ConfigError, RecordsError, WeightsError: whatever would stop the run later.
    """
    mesh = make_mesh(given.mesh)
    check_stages(given, mesh)
    check_workdir(workdir, given, {})
    start = None if given.init_from is None else open_start(given, workdir).arrays
    if given.samples is not None:
        mounted(workdir / "samples")  # which are drawn later
    records = Mixture(given.mixture) if given.mixture else Records(make_inputs(given, workdir))
    config = in_steps(given, records)
    base_model = base_model_of(config, workdir)
    check_records(records, config, base_model)
    inputs = {"data": records.fingerprint}
    if config.base_model is not None:
        inputs["base_model"] = fingerprint(open_base(config.base_model, config))
    if start is not None:
        inputs["init_from"] = fingerprint(start)
    sizes = trained_sizes(records, config)
    run = claim_workdir(workdir, given, inputs, sizes)
    return Setup(config, workdir, mesh, records, base_model, start, inputs, run, sizes)


def trained_sizes(records: AnyRecords, config: TrainConfig) -> tuple[Size, ...]:
    """(height, width) in pixels of the images in the training split."""
    pairs, unit = records.pairs("train"), config.model.transformer.latents.downsampling
    firsts = [pairs[rows.start] for rows in records.buckets("train").values()]
    shapes = [records.images[pair.chosen].latents.shape for pair in firsts]
    return tuple(sorted({(unit * height, unit * width) for height, width, _ in shapes}))


def alone(workdir: AnyPath) -> contextlib.AbstractContextManager:
    """The workdir's lock, of all processes of this run together."""
    return lock(workdir, processes.say) if processes.is_first() else contextlib.nullcontext()


def in_steps(config: TrainConfig, records: AnyRecords) -> TrainConfig:
    """The configuration with every stage's length in steps, which is said."""
    lasting = {}
    pairs = Schedule(records.buckets("train"), 1, config.seed, records.weights("train")).epoch_pairs
    for name in ("generator", "reward"):
        stage = getattr(config, name)
        if stage is not None and stage.epochs is not None and pairs:
            lasting[name] = stage.lasting(pairs)
            processes.say(
                f"{name}: {stage.epochs:g} epochs of {pairs:,.0f} pairs are {lasting[name].steps:,} steps of "
                f"{stage.batch_size}"
            )
    return dataclasses.replace(config, **lasting)


def make_inputs(config: TrainConfig, workdir: AnyPath) -> pathlib.Path:
    """The directory of the run's records; scenes and rehearsals are made where they are not there yet."""
    data = mounted(workdir / "data" if config.data is None else config.data)
    if config.data is config.scenes is config.rehearsal is None and not data.exists():
        raise ConfigError(
            f"data is not set and {data} is not there; name the directory of records with --config.data DIR "
            "(python -m dinalrm_jax.preprocess makes one)"
        )
    if config.rehearsal is not None:
        make_rehearsal(config, config.rehearsal, workdir)
    if config.scenes is not None and not data.exists() and processes.is_first():
        write_scene_records(data, config.scenes, config.model.encoders)
    processes.barrier("scenes")
    return data


def make_rehearsal(config: TrainConfig, wanted: RehearsalConfig, workdir: AnyPath) -> None:
    """Pipeline, source and records from nothing; see `RehearsalConfig`."""
    source, base_model = workdir / "source", workdir / "base_model"
    if processes.is_first() and not base_model.exists():
        rehearsal.write_pipeline(base_model, wanted.seed, config.model.transformer)
    if processes.is_first() and not source.exists():
        rehearsal.write_hpdv3(source, wanted.train_pairs, wanted.eval_pairs, wanted.seed)
    processes.barrier("rehearsal")
    missing = not (workdir / "data").exists()
    processes.barrier("records looked for")  # before any process makes them
    if missing:
        preprocess(source, workdir / "data", wanted.preparation, base_model)
