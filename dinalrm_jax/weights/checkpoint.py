"""Every kind of reward model checkpoint by its directory, those of a training run among them.

    WORKDIR/reward/checkpoints/STEP    of a run, while it trains and after it
    WORKDIR/reward/best/STEP           the one with the highest held-out accuracy

They hold what trains; the frozen rest is where the run has it from.
"""

import pathlib
from collections.abc import Mapping

import jax
import numpy as np
import orbax.checkpoint as ocp

from dinalrm_jax.config import ConfigError, ExecutionConfig, RewardModelConfig, SweepConfig, TrainConfig, to_mapping
from dinalrm_jax.parameters import Params, draw
from dinalrm_jax.reward_model import is_trainable, reward_functional
from dinalrm_jax.training.workdir import read_claim
from dinalrm_jax.weights.pretrained import (
    PretrainedModel,
    open_backbone,
    open_reward_model,
    share,
    transformer_functional,
    truncate,
)
from dinalrm_jax.weights.rules import WeightsError


def open_checkpoint(
    checkpoint: str | pathlib.Path,
    base_model: str | pathlib.Path | None,
    execution: ExecutionConfig,
    backbone: Params | None = None,
) -> PretrainedModel:
    """What `RewardModel.from_pretrained` loads, with its arguments and errors."""
    directory = pathlib.Path(checkpoint)
    if (directory / "state").is_dir() and (directory.absolute().parents[2] / "config.json").is_file():
        return _open_training(directory.absolute(), base_model, execution, backbone)
    return open_reward_model(checkpoint, base_model, execution, backbone)


def _open_training(directory: pathlib.Path, base_model, execution: ExecutionConfig, backbone) -> PretrainedModel:
    workdir = directory.parents[2]
    claim = read_claim(workdir)
    if isinstance(claim.config, SweepConfig) or directory.parents[1].name != "reward":
        raise ConfigError(f"{directory} is not the checkpoint of a reward model, but of another stage")
    config = claim.config
    shapes = reward_functional(config.model, execution).shapes
    trained = _trained(directory, {name: shape for name, shape in shapes.items() if is_trainable(name)})
    base_model = base_model or base_model_of(config, workdir)
    if backbone is not None:
        shared = share(backbone, config.model, execution)
        return PretrainedModel(config.model, execution, base_model, trained, shared, config.loss)
    arrays = {**frozen_arrays(config, workdir), **trained}
    return PretrainedModel(config.model, execution, base_model, arrays, {}, config.loss)


def _trained(directory: pathlib.Path, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
    """The averaged parameters of a checkpoint, or where no average was taken, the parameters; optimizer unread."""
    checkpointer = ocp.PyTreeCheckpointer()
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


def frozen_arrays(config: TrainConfig, workdir: pathlib.Path) -> Mapping[str, np.ndarray]:
    """The frozen part of the reward model that a run trains: its generator's, its base model's, that of the model
    it goes on from, or a random one.

    Raises:
        ConfigError: a base model of another geometry.
    """
    finished, base_model = workdir / "generator" / "backbone", base_model_of(config, workdir)
    if config.generator is not None:
        return truncate(open_backbone(finished)[1], config.model)
    if base_model is not None:
        return truncate(open_base(base_model, config), config.model)
    if config.init_from is not None:
        arrays = open_start(config, workdir).arrays
        return {name: array for name, array in arrays.items() if not is_trainable(name)}
    return truncate(draw(transformer_functional(config.model.transformer, config.execution), config.seed), config.model)


def base_model_of(config: TrainConfig, workdir: pathlib.Path) -> str | None:
    """The base model that a run is on; a rehearsal's is its own."""
    return str(workdir / "base_model") if config.rehearsal is not None else config.base_model


def open_base(base_model: str, config: TrainConfig) -> Mapping[str, np.ndarray]:
    """A whole transformer's arrays; raises ConfigError for one of another geometry than the configuration's."""
    found, arrays = open_backbone(base_model)
    if found != config.model.transformer:
        raise ConfigError(f"base_model {base_model} has geometry {found}, the config says {config.model.transformer}")
    return arrays


def open_start(config: TrainConfig, workdir: pathlib.Path) -> PretrainedModel:
    """The model that `config.init_from` names; raises ConfigError for one of another shape than the run's."""
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
