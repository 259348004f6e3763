"""The weights of a training run: what it starts from, what its checkpoints hold; and every kind of checkpoint by its
directory.

    WORKDIR/reward/checkpoints/STEP    of a run, while it trains and after it
    WORKDIR/reward/best                the one with the highest held-out accuracy

They hold what trains; the frozen rest is where the run has it from.
"""

import dataclasses
import pathlib
from collections.abc import Mapping

import jax
import numpy as np
from absl import logging

from dinalrm_jax.config import TrainConfig
from dinalrm_jax.devices import processes
from dinalrm_jax.disk import AnyPath, is_whole, resolved, whole_directory
from dinalrm_jax.encoders.load import load_prompt_encoder
from dinalrm_jax.mapping import ConfigError, to_mapping
from dinalrm_jax.model.backbone.family import transformer_functional
from dinalrm_jax.model.config import RewardModelConfig
from dinalrm_jax.model.execution import ExecutionConfig
from dinalrm_jax.model.lrm import LRMHeadConfig
from dinalrm_jax.model.parameters import Params, draw, split
from dinalrm_jax.model.reward import is_trainable, reward_functional
from dinalrm_jax.model.tables import WeightsError
from dinalrm_jax.training.workdir import read_claim
from dinalrm_jax.weights.files import SafetensorsDirectory, fingerprint, read_json, resolve, save_safetensors
from dinalrm_jax.weights.pretrained import PretrainedModel, open_backbone, open_reward_model, share, truncate


def open_checkpoint(
    checkpoint: str | AnyPath,
    base_model: str | pathlib.Path | None,
    execution: ExecutionConfig,
    backbone: Params | None = None,
    revision: str | None = None,
) -> PretrainedModel:
    """What `RewardModel.from_pretrained` loads, with its arguments and errors."""
    directory = resolved(checkpoint)
    if revision is None and directory.is_dir() and (step := _training_step(directory)) is not None:
        return _open_training(step, base_model, execution, backbone)
    return open_reward_model(checkpoint, base_model, execution, backbone, revision)


def is_training_checkpoint(path: str) -> bool:
    """Whether a path is that of a training run's checkpoint."""
    directory = resolved(path)
    return directory.is_dir() and _training_step(directory) is not None


def _training_step(directory: AnyPath) -> AnyPath | None:
    """The checkpoint of one step that a directory is, or, of a run's `best`, holds; None where it is no run's.

    Raises:
        ConfigError: the directory of a whole run, or of several steps.
    """
    if (directory / "config.json").is_file() and "run" in read_json(directory / "config.json"):
        raise ConfigError(
            f"{directory} is the directory of a training run; its model, once it is through, is {directory / 'model'}, "
            f"its checkpoints are {directory}/reward/checkpoints/STEP and {directory}/reward/best"
        )
    steps = sorted(
        (path.name for path in directory.iterdir() if (path / "state").is_dir()), key=lambda name: (len(name), name)
    )
    if steps and directory.name in ("best", "checkpoints"):
        if len(steps) > 1:
            raise ConfigError(f"{directory} holds checkpoints of several steps; name one of them: {', '.join(steps)}")
        directory = directory / steps[0]
    return directory if (directory / "state").is_dir() and (directory.parents[2] / "config.json").is_file() else None


def _open_training(directory: AnyPath, base_model, execution: ExecutionConfig, backbone) -> PretrainedModel:
    workdir = directory.parents[2]
    claim = read_claim(workdir)
    if not isinstance(claim.config, TrainConfig) or directory.parents[1].name != "reward":
        raise ConfigError(f"{directory} is not the checkpoint of a reward model, but of another stage")
    config = claim.config
    if base_model is not None and config.base_model is not None:
        config = dataclasses.replace(config, base_model=str(base_model))
    shapes = reward_functional(config.model, execution).shapes
    trained = _trained(directory, split(shapes, is_trainable)[0])
    base_model = base_model or base_model_of(config, workdir)
    if backbone is not None:
        shared = share(backbone, config.model, execution)
        return PretrainedModel(config.model, execution, base_model, trained, shared, config.loss, claim.image_sizes)
    arrays = {**frozen_arrays(config, workdir, claim.inputs), **trained}
    return PretrainedModel(config.model, execution, base_model, arrays, {}, config.loss, claim.image_sizes)


def _trained(directory: AnyPath, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
    """The averaged parameters of a checkpoint, or where no average was taken, the parameters; optimizer unread."""
    import orbax.checkpoint as ocp  # here, as it takes long to import and most models come from elsewhere

    checkpointer = ocp.PyTreeCheckpointer()
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # orbax misses a file that a checkpoint of several parts does not have
    try:
        saved = checkpointer.metadata(directory / "state").item_metadata.tree
        which = "params" if saved.get("ema") is None else "ema"
        found = {name: array.shape for name, array in saved[which].items()}
        if found != {name: shape.shape for name, shape in shapes.items()}:
            raise WeightsError(f"{directory} holds parameters of another model than the run's configuration describes")
        item = {which: dict(shapes)}
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        arguments = ocp.args.PyTreeRestore(item=item, restore_args=as_numpy, partial_restore=True)
        return checkpointer.restore(directory / "state", args=arguments)[which]
    except WeightsError:
        raise
    except Exception as error:  # orbax raises many kinds for a damaged directory
        raise WeightsError(f"checkpoint {directory} cannot be read: {error}") from error
    finally:
        logging.set_verbosity(verbosity)


def frozen_arrays(config: TrainConfig, workdir: AnyPath, inputs: Mapping[str, str]) -> Mapping[str, np.ndarray]:
    """The frozen part of the reward model that a run trains: its generator's, its base model's, that of the model
    it goes on from, or a random one.

    Args:
        inputs: fingerprints of what the run reads.

    Raises:
        ConfigError: a base model of another geometry.
        WeightsError: other weights than the run began with.
    """
    if config.generator is not None:
        return truncate(open_backbone(workdir / "generator" / "backbone")[1], config.model)
    base_model = base_model_of(config, workdir)
    if base_model is not None:
        arrays = open_base(base_model, config)
        if config.base_model is not None:
            _check_same("base_model", base_model, arrays, inputs)
        return truncate(arrays, config.model)
    if config.init_from is not None:
        arrays = open_start(config, workdir).arrays
        _check_same("init_from", config.init_from, arrays, inputs)
        return split(arrays, is_trainable)[1]
    module = transformer_functional(config.model.transformer, config.execution)
    frozen = truncate(module.shapes, config.model)
    return truncate(draw(module, config.seed, lambda name: f"backbone.{name}" in frozen), config.model)


def empty_prompt(config: TrainConfig, base_model: str | None, workdir: AnyPath) -> dict[str, np.ndarray]:
    """What the LRM head's unconditional prompt begins as: the empty prompt, by the text encoders.

    Of another head, or where the run goes on from a model that has one: {}.

    Encoded once a run and kept in WORKDIR/empty_prompt, so that a run that goes on does not load the encoders again.

    Raises:
        ConfigError, WeightsError, FileNotFoundError: as for `encoders.load.load_prompt_encoder`.
    """
    head = config.model.head
    if not isinstance(head, LRMHeadConfig) or head.guidance == 1 or config.init_from is not None:
        return {}
    directory = workdir / "empty_prompt"
    if not is_whole(directory) and processes.is_first():
        encoded = load_prompt_encoder(config.model.encoders, base_model, config.execution.dtype)([""])
        arrays = {"embeds": encoded.prompt_embeds, "pooled": encoded.pooled_prompt_embeds}
        with whole_directory(directory) as partial:
            save_safetensors(partial / "prompt.safetensors", {name: np.asarray(x) for name, x in arrays.items()})
    processes.barrier("empty prompt")
    found = SafetensorsDirectory(resolve(directory, ("*",)), "prompt")
    return {f"head.unconditional_{name}": np.array(found[name], np.float32) for name in ("embeds", "pooled")}


def _check_same(what: str, path: str, arrays: Mapping[str, np.ndarray], inputs: Mapping[str, str]) -> None:
    if inputs.get(what) != fingerprint(arrays):
        raise WeightsError(f"{what} {path} holds other weights than the run began with; give the directory that it had")


def base_model_of(config: TrainConfig, workdir: AnyPath) -> str | None:
    """The base model that a run is on; a rehearsal's is its own."""
    return str(workdir / "base_model") if config.rehearsal is not None else config.base_model


def open_base(base_model: str, config: TrainConfig) -> Mapping[str, np.ndarray]:
    """A whole transformer's arrays; raises ConfigError for one of another geometry than the configuration's."""
    found, arrays = open_backbone(base_model)
    if found != config.model.transformer:
        raise ConfigError(f"base_model {base_model} has geometry {found}, the config says {config.model.transformer}")
    return arrays


def open_start(config: TrainConfig, workdir: AnyPath) -> PretrainedModel:
    """The model that `config.init_from` names.

    Raises:
        ConfigError: one of another shape than the run's, or a checkpoint that its own run may remove.
    """
    if is_training_checkpoint(config.init_from):
        raise ConfigError(
            f"init_from {config.init_from} is a checkpoint of a training run, which removes it in time; make a "
            f"model of it first: python -m dinalrm_jax.convert native --checkpoint {config.init_from} --output DIR"
        )
    model = open_checkpoint(config.init_from, base_model_of(config, workdir), ExecutionConfig())
    if model.config != config.model:
        raise ConfigError(
            f"init_from {config.init_from} is another model than the config's: "
            f"{_difference(model.config, config.model)}"
        )
    return model


def _difference(found: RewardModelConfig, wanted: RewardModelConfig) -> str:
    pairs = zip(to_mapping(found).items(), to_mapping(wanted).values())
    return "; ".join(f"{name} is {one!r}, in the config {other!r}" for (name, one), other in pairs if one != other)
