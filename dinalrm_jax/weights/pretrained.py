"""Whole models on disk: native directories, diffusers base models, released checkpoints.

A native directory holds `config.json` with a `format` and a `kind`, and safetensors under our own
names: a reward model's frozen part in `backbone.safetensors` and its trained part in
`trained.safetensors`, or a whole transformer in `backbone.safetensors`.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from dinalrm_jax.devices.placement import place
from dinalrm_jax.disk import AnyPath, check_writable, whole_directory, write_json
from dinalrm_jax.mapping import ConfigError, from_mapping, to_mapping
from dinalrm_jax.model import tables
from dinalrm_jax.model.backbone.family import (
    BackboneConfig,
    DiffusersLayout,
    family_in_diffusers,
    family_of,
    transformer_functional,
)
from dinalrm_jax.model.config import RewardModelConfig
from dinalrm_jax.model.encoding import EncodersConfig
from dinalrm_jax.model.execution import ExecutionConfig
from dinalrm_jax.model.parameters import Params, split
from dinalrm_jax.model.reward import is_trainable, reward_functional
from dinalrm_jax.model.tables import WeightsError
from dinalrm_jax.noise import AnyArray
from dinalrm_jax.preference import LossConfig
from dinalrm_jax.weights import released, torch_file
from dinalrm_jax.weights.digest import digest
from dinalrm_jax.weights.files import SafetensorsDirectory, read_json, resolve, save_safetensors

A = TypeVar("A")

Size = tuple[int, int]  # height, width of an image in pixels

FORMAT = "dinalrm_jax/1"
CALIBRATION = "calibration.json"  # beside config.json: a likelihood that was fitted afterwards
CHECKPOINT_FILES = ("config.json", CALIBRATION, "checkpoint/*", "backbone.safetensors", "trained.safetensors")
TRANSFORMER_FILES = ("transformer/*", "config.json", "backbone.safetensors")


@dataclasses.dataclass(frozen=True)
class PretrainedModel:
    """A checkpoint whose files are open and fit the model they describe; weights are read when `params` is used.

    (Of the released layout, `rm_head.pt` and the position table, which is checked, are read at once.)

    Attributes:
        config, execution, base_model, likelihood, image_sizes: as of the `RewardModel`.
        arrays: parameters, of safetensors as views of the mapped files, in their dtype.
        shared: parameters that are on the device already.
    """

    config: RewardModelConfig
    execution: ExecutionConfig
    base_model: str | AnyPath | None
    arrays: dict[str, np.ndarray] = dataclasses.field(repr=False)
    shared: Params = dataclasses.field(repr=False)
    likelihood: LossConfig | None = None
    image_sizes: tuple[Size, ...] = ()

    @functools.cached_property
    def params(self) -> Params:
        trained, frozen = split(self.arrays, is_trainable)
        return self.shared | place(frozen, self.execution.dtype) | place(trained, np.float32)


def open_reward_model(
    checkpoint: str | AnyPath,
    base_model: str | AnyPath | None,
    execution: ExecutionConfig,
    backbone: Params | None = None,
    revision: str | None = None,
) -> PretrainedModel:
    """What `RewardModel.from_pretrained` loads, with its arguments and errors."""
    directory = resolve(checkpoint, CHECKPOINT_FILES, revision)
    config = read_json(directory / "config.json")
    if "format" in config:
        return _open_native(directory, config, base_model, execution, backbone)
    if base_model is None:
        raise ConfigError(
            f"{directory} is in the released layout, which holds LoRA and head only; name its base model "
            "(base_model=..., a directory or hub id in diffusers layout)"
        )
    transformer_dir, transformer = read_diffusers_config(base_model)
    model_config = released.model_config(config, transformer)
    shapes = reward_functional(model_config, execution).shapes
    parts = _released_parts(directory / "checkpoint", transformer_dir, model_config)
    arrays, problems = {}, []
    for source, tensors, table, belongs, unused in parts:
        if backbone is not None and belongs is _is_frozen:
            continue
        wanted = {name: shape for name, shape in shapes.items() if belongs(name)}
        try:
            arrays |= tables.load(tensors, table, wanted, source=str(source), unused=unused)
        except WeightsError as error:
            problems.append(str(error))
    if problems:
        raise WeightsError("\n".join(problems))
    shared = {} if backbone is None else share(backbone, model_config, execution)
    likelihood = released.likelihood(config)
    return PretrainedModel(model_config, execution, base_model, arrays, shared, likelihood)


def read_diffusers_config(base_model: str | AnyPath) -> tuple[pathlib.Path, BackboneConfig]:
    """The transformer's directory and geometry; `base_model` is a pipeline or the transformer itself.

    Raises:
        ConfigError: the config of another kind of model.
    """
    directory = resolve(base_model, TRANSFORMER_FILES)
    if (directory / "transformer").is_dir():
        directory = directory / "transformer"
    config = read_json(directory / "config.json")
    family = family_in_diffusers(config.get("_class_name"), str(directory / "config.json"))
    return directory, family.diffusers.read_config(config, str(directory / "config.json"))


def load_backbone(
    base_model: str | AnyPath, execution: ExecutionConfig = ExecutionConfig()
) -> tuple[BackboneConfig, Params]:
    """A whole transformer from a diffusers directory or a native backbone, on the device in the compute dtype."""
    transformer, arrays = open_backbone(base_model)
    return transformer, place(arrays, execution.dtype)


def open_backbone(base_model: str | AnyPath) -> tuple[BackboneConfig, dict[str, np.ndarray]]:
    """The same as views of the mapped files, in their dtype: only what is used of them is read."""
    directory = resolve(base_model, TRANSFORMER_FILES)
    config = read_json(directory / "config.json") if (directory / "config.json").exists() else {}
    if "format" in config:
        values = _native(config, "backbone", directory)
        transformer = from_mapping(BackboneConfig, values, f"{directory}/config.json")  # type: ignore[type-abstract]
        tensors, table = SafetensorsDirectory(directory, "backbone"), tables.IDENTITY
    else:
        directory, transformer = read_diffusers_config(directory)
        tensors = SafetensorsDirectory(directory, "diffusion_pytorch_model")
        table = _diffusers(transformer).table(transformer, "")
    shapes = transformer_functional(transformer, ExecutionConfig()).shapes
    return transformer, tables.load(tensors, table, shapes, source=str(directory))


def truncate(backbone: Mapping[str, A], config: RewardModelConfig) -> dict[str, A]:
    """The frozen parameters that a reward model takes from a whole transformer, or their shapes."""
    shapes = reward_functional(config, ExecutionConfig()).shapes
    return {name: backbone[name.removeprefix("backbone.")] for name in shapes if not is_trainable(name)}


def share(backbone: Params, config: RewardModelConfig, execution: ExecutionConfig) -> Params:
    """`truncate`, of arrays that a reward model of this dtype can use as they are.

    Raises:
        WeightsError: arrays that are missing, not on a device, or of another shape or dtype.
    """
    problems = []
    shapes = reward_functional(config, execution).shapes
    for name, shape in ((name.removeprefix("backbone."), shapes[name]) for name in shapes if not is_trainable(name)):
        array = backbone.get(name)
        if array is None:
            problems.append(f"{name} is missing")
        elif not isinstance(array, jax.Array):
            problems.append(f"{name} is not on a device; use jax.device_put")
        elif (array.shape, array.dtype) != (shape.shape, jnp.dtype(execution.dtype)):
            problems.append(f"{name} is {array.dtype} {array.shape}, expected {execution.dtype} {shape.shape}")
    if problems:
        shown = [*problems[:5], f"... and {len(problems) - 5} more"] if len(problems) > 6 else problems
        raise WeightsError(
            f"the backbone cannot be shared with a {execution.dtype} model (dtype=...):\n  " + "\n  ".join(shown)
        )
    return truncate(backbone, config)


def save_reward_model(
    output: str | AnyPath,
    config: RewardModelConfig,
    params: Mapping[str, np.ndarray | jax.Array],
    likelihood: LossConfig | None = None,
    image_sizes: Sequence[Size] = (),
    step: int | None = None,
) -> None:
    """Writes a native checkpoint, whole or not at all; `step` is the training step that it is of."""
    trained, frozen = split(params, is_trainable)
    with whole_directory(output) as directory:
        beside = {
            "likelihood": None if likelihood is None else to_mapping(likelihood),
            "image_sizes": [list(size) for size in image_sizes],
            "step": step,
            "weights": digest(params, is_trainable),
        }
        _write_config(directory, "reward_model", to_mapping(config), **beside)
        save_safetensors(directory / "backbone.safetensors", tables.dump(frozen, tables.IDENTITY))
        save_safetensors(directory / "trained.safetensors", tables.dump(trained, tables.IDENTITY))


def check_native(checkpoint: str | AnyPath) -> pathlib.Path:
    """The directory of a native reward model on this machine.

    Raises:
        ConfigError: another layout, or a hub id.
    """
    directory = pathlib.Path(checkpoint)
    if not (directory / "config.json").is_file() or "format" not in read_json(directory / "config.json"):
        raise ConfigError(
            f"{checkpoint} is no native model's directory, which a fitted likelihood is written into; make one: "
            f"python -m dinalrm_jax.convert native --checkpoint {checkpoint} --output DIR"
        )
    check_writable(directory / CALIBRATION)
    return directory


def save_calibration(checkpoint: str | AnyPath, likelihood: LossConfig, beside: Mapping[str, Any]) -> None:
    """Writes a fitted likelihood into a native checkpoint, in the place of the one it was trained with."""
    write_json(check_native(checkpoint) / CALIBRATION, {"likelihood": to_mapping(likelihood), **beside}, indent=1)


@dataclasses.dataclass(frozen=True)
class Origin:
    """How a backbone was trained.

    encoders: what made its latents and prompt embeddings.
    shift: of its schedule, `sampling.schedule`: 3 for SD3, 1 where levels were drawn evenly.
    """

    encoders: EncodersConfig = EncodersConfig("sd3", 256)
    shift: float = 3.0


def origin_of(base_model: str | AnyPath) -> Origin:
    """How a backbone was trained, as its files say.

    Raises:
        ConfigError: a native backbone that does not say it.
    """
    directory = resolve(base_model, (*TRANSFORMER_FILES, "scheduler/*"))
    config = read_json(directory / "config.json") if (directory / "config.json").exists() else {}
    if "format" in config:
        if config.get("origin") is None:
            raise ConfigError(
                f"{directory} does not say which encoders it was trained with; train it again, or convert it"
            )
        return from_mapping(Origin, config["origin"], f"{directory}/config.json, origin")
    scheduler = directory / "scheduler" / "scheduler_config.json"
    return Origin(shift=float(read_json(scheduler).get("shift", 1.0))) if scheduler.is_file() else Origin()


def save_backbone(
    config: BackboneConfig, params: Mapping[str, AnyArray], output: str | AnyPath, origin: Origin | None = None
) -> None:
    """Writes a native backbone, whole or not at all; without an origin it cannot be sampled from alone."""
    with whole_directory(output) as directory:
        _write_config(directory, "backbone", to_mapping(config), origin=origin and to_mapping(origin))
        save_safetensors(directory / "backbone.safetensors", tables.dump(params, tables.IDENTITY))


def export_released(
    output: str | AnyPath,
    config: RewardModelConfig,
    params: Mapping[str, np.ndarray | jax.Array],
    likelihood: LossConfig | None = None,
) -> None:
    """Writes LoRA and head in the released layout, which the released code, PEFT and torch load.

    Raises:
        ConfigError: a model that this layout cannot hold.
    """
    whole_config = released.released_config(config, likelihood)
    lora, _ = split(params, _is_lora)
    head, _ = split(params, _is_head)
    with whole_directory(output) as directory:
        (directory / "config.json").write_text(json.dumps(whole_config, indent=1))
        checkpoint = directory / "checkpoint"
        checkpoint.mkdir()
        if config.lora is not None:
            adapter = checkpoint / "backbone_lora"
            adapter.mkdir()
            (adapter / "adapter_config.json").write_text(json.dumps(released.adapter_config(config), indent=1))
            save_safetensors(adapter / "adapter_model.safetensors", tables.dump(lora, released.LORA))
        torch_file.write(checkpoint / "rm_head.pt", tables.dump(head, released.HEAD))


def export_diffusers(config: BackboneConfig, params: Params, output: str | AnyPath) -> None:
    """Writes a whole transformer as a diffusers `transformer/` directory."""
    with whole_directory(output) as directory:
        layout = _diffusers(config)
        geometry = {"_class_name": layout.class_name, **layout.write_config(config)}
        (directory / "config.json").write_text(json.dumps(geometry, indent=1))
        weights = tables.dump(params, layout.table(config, ""))
        save_safetensors(directory / "diffusion_pytorch_model.safetensors", weights)


def _diffusers(config: BackboneConfig) -> DiffusersLayout:
    layout = family_of(config).diffusers
    if layout is None:
        raise ConfigError(f"backbones of family {config.family!r} have no layout in diffusers")
    return layout


def _open_native(
    directory: pathlib.Path,
    config: dict,
    base_model: str | AnyPath | None,
    execution: ExecutionConfig,
    backbone: Params | None,
) -> PretrainedModel:
    model_config = from_mapping(
        RewardModelConfig, _native(config, "reward_model", directory), f"{directory}/config.json"
    )
    shapes = reward_functional(model_config, execution).shapes
    shared = {} if backbone is None else share(backbone, model_config, execution)
    tensors = {}
    for stem in ("trained",) if shared else ("backbone", "trained"):
        tensors |= SafetensorsDirectory(directory, stem)
    wanted = {name: shape for name, shape in shapes.items() if name not in shared}
    arrays = tables.load(tensors, tables.IDENTITY, wanted, source=str(directory))
    source, found = "config.json", config.get("likelihood")
    if (directory / CALIBRATION).is_file():
        source, found = CALIBRATION, read_json(directory / CALIBRATION).get("likelihood")
    likelihood = None if found is None else from_mapping(LossConfig, found, f"{directory}/{source}, likelihood")
    sizes = tuple((height, width) for height, width in config.get("image_sizes", ()))
    return PretrainedModel(model_config, execution, base_model, arrays, shared, likelihood, sizes)


def _released_parts(checkpoint: pathlib.Path, transformer: pathlib.Path, config: RewardModelConfig):
    """(source, tensors, table, which of our names it holds, what it may hold beside) of every part."""
    if not (checkpoint / "rm_head.pt").is_file():
        raise FileNotFoundError(
            f"{checkpoint} holds no rm_head.pt: it is not a released checkpoint, or an incomplete one"
        )
    yield checkpoint / "rm_head.pt", torch_file.read(checkpoint / "rm_head.pt"), released.HEAD, _is_head, None
    if config.lora is not None:
        adapter = checkpoint / "backbone_lora"
        _check_adapter_config(adapter, config)
        yield adapter, SafetensorsDirectory(adapter, "adapter_model"), released.LORA, _is_lora, None
    tensors = SafetensorsDirectory(transformer, "diffusion_pytorch_model")
    layout = _diffusers(config.transformer)
    table, unused = layout.table(config.transformer, "backbone."), layout.unused(config.num_blocks)
    yield transformer, tensors, table, _is_frozen, unused


def _is_head(name: str) -> bool:
    return name.startswith("head.")


def _is_lora(name: str) -> bool:
    return name.endswith((".lora_A", ".lora_B"))


def _is_frozen(name: str) -> bool:
    return not is_trainable(name)


def _check_adapter_config(adapter: pathlib.Path, config: RewardModelConfig) -> None:
    peft = read_json(adapter / "adapter_config.json")
    found, expected = (peft.get("r"), peft.get("lora_alpha")), (config.lora.rank, config.lora.alpha)
    if found != expected:
        raise ConfigError(f"{adapter}/adapter_config.json has (r, lora_alpha) {found}, config.json says {expected}")
    for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save"):
        if peft.get(key):
            raise ConfigError(f"{adapter}/adapter_config.json sets {key}, which this model does not have")


def _write_config(directory: pathlib.Path, kind: str, config: dict, **beside: Any) -> None:
    """`beside` is what is known of the model that does not shape it."""
    text = json.dumps({"format": FORMAT, "kind": kind, "config": config, **beside}, indent=1)
    (directory / "config.json").write_text(text + "\n")


def _native(config: dict, kind: str, directory: pathlib.Path) -> dict:
    if config["format"] != FORMAT:
        raise ConfigError(f"{directory} has format {config['format']!r}, this version reads {FORMAT!r}")
    if config.get("kind") != kind:
        raise ConfigError(f"{directory} holds a {config.get('kind')}, expected a {kind}")
    return config["config"]
