"""Frozen, typed configurations, and the one function that builds them from plain mappings.

A config file (`configs/*.py`) returns an `ml_collections.ConfigDict`, a native checkpoint holds
JSON; both pass through `from_mapping`, which checks every key and type and names the nearest
valid key where one is unknown.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from dinalrm_jax.data.buckets import BUCKETS, bucket_name, parse_bucket

if TYPE_CHECKING:
    from ml_collections import ConfigDict  # needed by training only

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be used as it stands."""


# --------------------------------------------------------------------------------------- builder


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str = "config") -> T:
    """Builds the frozen dataclass `cls` from a plain mapping, checking keys and types.

    Args:
        cls: one of the dataclasses below; nested ones are built from nested mappings.
        values: a mapping, for instance an `ml_collections.ConfigDict` or parsed JSON.
        where: what error messages call the mapping.

    Raises:
        ConfigError: an unknown key (the nearest valid one is named), a missing one, or a value of
            the wrong type.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = [key for key in values if key not in fields]
    if unknown:
        raise ConfigError("; ".join(_unknown_key(f"{where}.{key}", key, fields) for key in unknown))
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)} (needed by {cls.__name__})")
    hints = typing.get_type_hints(cls)
    try:
        return cls(**{key: _convert(hints[key], value, f"{where}.{key}") for key, value in values.items()})
    except ConfigError as error:
        # A dataclass's own check knows its fields but not where it stands; say it once.
        if str(error).startswith("config") or str(error).startswith(where):
            raise
        raise ConfigError(f"{where}: {error}") from None


def with_defaults(cls: type, values: Mapping[str, Any]) -> "ConfigDict":
    """`values` with every default of the dataclass `cls` filled in, for `configs/*.py` to return.

    What stands in a ConfigDict can be overridden on the command line, so nothing may be left out.
    Values are not checked here: `from_mapping` does that when the overrides are in.
    """
    from ml_collections import ConfigDict, config_dict

    out = ConfigDict()
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        inner = [arg for arg in typing.get_args(hint) if arg is not type(None)] or [hint]
        value = values.get(field.name, field.default)
        if value is dataclasses.MISSING:
            continue  # from_mapping names it
        if dataclasses.is_dataclass(value):
            value = to_mapping(value)
        if value is None and inner[0] in (str, int, float):
            out[field.name] = config_dict.placeholder(inner[0])
        elif dataclasses.is_dataclass(inner[0]) and hasattr(value, "keys"):
            out[field.name] = with_defaults(inner[0], value)
        else:
            out[field.name] = tuple(value) if isinstance(value, list) else value
    for key in values:
        if key not in out:
            out[key] = values[key]
    return out


def to_mapping(config: Any) -> dict[str, Any]:
    """The inverse of `from_mapping`: nested plain dicts, tuples as lists, ready for JSON."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def refuse_ignored(config: Any, names: Sequence[str], reason: str) -> None:
    """Raises ConfigError where one of these fields is not at its default, but the others leave it without effect."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    given = [name for name in names if getattr(config, name) != defaults[name]]
    if given:
        values = ", ".join(f"{name} = {getattr(config, name)!r}" for name in given)
        raise ConfigError(
            f"{values} would have no effect: {reason}; leave it at {', '.join(repr(defaults[name]) for name in given)}"
        )


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_mapping(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _unknown_key(path: str, key: str, valid: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(sorted(valid))}"
    return f"{path} is not a known key; {hint}"


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (inner,) = [arg for arg in args if arg is not type(None)]
        return _convert(inner, value, where)
    if origin is Literal:
        if value not in args:
            near = difflib.get_close_matches(str(value), [str(arg) for arg in args], n=1)
            hint_text = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(map(repr, args))}"
            raise ConfigError(f"{where} is {value!r}; {hint_text}")
        return value
    if origin is tuple:
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise ConfigError(f"{where} must be a sequence, got {value!r}")
        return tuple(_convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        if not hasattr(value, "keys"):
            raise ConfigError(f"{where} must be a mapping of {hint.__name__}'s keys, got {value!r}")
        return from_mapping(hint, value, where)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{where} must be {hint.__name__}, got {type(value).__name__} {value!r}")
    return value


# ---------------------------------------------------------------------------------------- model


@dataclasses.dataclass(frozen=True)
class SD3Config:
    """Geometry of a diffusers `SD3Transformer2DModel`, field for field its `config.json`.

    The defaults are `stabilityai/stable-diffusion-3.5-medium`.
    """

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    out_channels: int = 16
    num_layers: int = 24
    num_attention_heads: int = 24
    attention_head_dim: int = 64
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1536
    pooled_projection_dim: int = 2048
    pos_embed_max_size: int = 384
    dual_attention_layers: tuple[int, ...] = tuple(range(13))
    qk_norm: Literal["rms_norm"] | None = "rms_norm"

    def __post_init__(self):
        if self.caption_projection_dim != self.inner_dim:
            raise ConfigError(
                f"caption_projection_dim is {self.caption_projection_dim}, but the blocks take text tokens of width "
                f"num_attention_heads x attention_head_dim = {self.inner_dim}; set both to the same width"
            )
        if self.inner_dim % 4:
            raise ConfigError(f"the sin-cos position table needs a width divisible by 4, got {self.inner_dim}")

    @property
    def inner_dim(self) -> int:
        """Width of both token streams."""
        return self.num_attention_heads * self.attention_head_dim


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters with PEFT's semantics: the update is `alpha / rank * B @ A`."""

    rank: int = 64
    alpha: float = 128.0

    def __post_init__(self):
        if self.rank < 1:
            raise ConfigError(f"a LoRA rank is at least 1, got {self.rank}; for a frozen backbone set lora to None")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """The gated Q-Former head; `width` None means the backbone's."""

    width: int | None = None
    num_queries: int = 4
    num_attn_heads: int = 8
    use_proj_in: bool = False

    def __post_init__(self):
        if self.num_queries < 1 or self.num_attn_heads < 1:
            raise ConfigError(
                f"a head needs queries and attention heads, got {self.num_queries}, {self.num_attn_heads}"
            )


@dataclasses.dataclass(frozen=True)
class EncodersConfig:
    """What makes a model's latents and prompt embeddings (`dinalrm_jax.encoders`).

    kind: "sd3" for the VAE and text encoders of an SD3 pipeline, "tiny" for the built-in formulas.
    text_length: T5 tokens (DiNa-LRM: 128; diffusers' own default is 256); words for "tiny".
    """

    kind: Literal["sd3", "tiny"] = "sd3"
    text_length: int = 128

    def __post_init__(self):
        if self.text_length < 1:
            raise ConfigError(f"text_length must be at least 1, got {self.text_length}")


@dataclasses.dataclass(frozen=True)
class RewardModelConfig:
    """A truncated SD3 backbone, its taps, adapters and head. The defaults are the published model.

    A tap `i` is the stream after block `i`; 0 is the embedded input.
    """

    transformer: SD3Config = SD3Config()
    num_blocks: int = 12
    visual_taps: tuple[int, ...] = (4, 8, 12)
    text_taps: tuple[int, ...] = (4, 8, 12)
    lora: LoRAConfig | None = LoRAConfig()
    head: HeadConfig = HeadConfig()
    logistic: bool = False
    encoders: EncodersConfig = EncodersConfig()

    def __post_init__(self):
        if not 1 <= self.num_blocks <= self.transformer.num_layers:
            raise ConfigError(f"num_blocks must be in 1..{self.transformer.num_layers}, got {self.num_blocks}")
        if not self.visual_taps:
            raise ConfigError("visual_taps is empty: the head needs at least one image tap")
        for name in ("visual_taps", "text_taps"):
            taps = getattr(self, name)
            if list(taps) != sorted(set(taps)) or any(not 0 <= tap <= self.num_blocks for tap in taps):
                raise ConfigError(f"{name} must be increasing numbers in 0..{self.num_blocks}, got {taps}")
        if self.transformer.num_layers in self.text_taps:
            raise ConfigError(
                f"text_taps names layer {self.transformer.num_layers}, the transformer's last, which drops the text "
                f"stream; tap at most {self.transformer.num_layers - 1}"
            )
        if self.head_width % self.head.num_attn_heads:
            raise ConfigError(f"head width {self.head_width} is not divisible by {self.head.num_attn_heads} heads")

    @property
    def head_width(self) -> int:
        return self.head.width or self.transformer.inner_dim

    @property
    def adapts_last_text(self) -> bool:
        """Whether the last kept block's text-side projections have adapters.

        The released code leaves them out unless that block's text stream is tapped: nothing else reads it.
        """
        return self.text_taps[-1:] == (self.num_blocks,)


@dataclasses.dataclass(frozen=True)
class ExecutionConfig:
    """How the same numbers are computed. None of these changes what a checkpoint means.

    dtype: compute dtype; frozen weights are stored in it, trainable ones in float32.
    attention: see `backbone.attention.attend`.
    layers: "loop" unrolls the blocks (fastest on CPU); "scan" stacks each run of equal blocks
        between taps and scans over it (compiles several times quicker, for GPU and TPU).
    remat: what a block keeps for its backward pass: everything ("none"), matrix products
        ("dots"; not on CPUs, whose compiler keeps everything then) or only its inputs ("block"; on
        CPUs without forward-mode differentiation).
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Literal["auto", "xla", "cudnn", "grouped"] = "auto"
    layers: Literal["loop", "scan"] = "loop"
    remat: Literal["none", "dots", "block"] = "none"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            _convert(typing.get_type_hints(type(self))[field.name], getattr(self, field.name), field.name)


# ------------------------------------------------------------------------------------- records


@dataclasses.dataclass(frozen=True)
class PreparationConfig:
    """How a preference dataset becomes records (`dinalrm_jax.data.preparation`).

    dataset: the source's format; "dinalrm" holds latents, the others images.
    encoders: what makes latents and embeddings.
    text_dtype: compute dtype of the text encoders; the VAE computes in float32, on every backend.
    buckets: image sizes, height x width in pixels; the defaults are the paper's.
    fit: "stretch" resizes an image to a bucket whose log aspect is within `aspect_tolerance` and
        drops it where there is none (the paper's way); "crop" cuts it at the centre to the nearest.
    min_area: pixels below which an image is dropped.
    min_vote_share, min_confidence: `data.preferences.select`.
    max_rows_per_prompt: keep at most so many training rows of one prompt (released: 8); 0: all.
    holdout: prompts to hold out where the source has no split of its own.
    benchmark_split: of GenAI-Bench, "test" or "test_v1".
    eval_pairs: keep at most so many held-out pairs; 0: all.
    seed: of what is picked at random.
    images_per_shard, prompts_per_shard: what a killed run can lose of each process's work.
    batch_size, prompt_batch_size: of the encoders.
    threads: that read and decode images; changes no byte.
    """

    dataset: Literal["hpdv3", "hpdv2", "imagereward", "genai_bench", "jsonl", "dinalrm"]
    encoders: EncodersConfig = EncodersConfig()
    text_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    buckets: tuple[str, ...] = tuple(map(bucket_name, BUCKETS))
    fit: Literal["stretch", "crop"] = "stretch"
    aspect_tolerance: float = 0.03
    min_area: int = 65536
    min_vote_share: float = 0.0
    min_confidence: float = 0.0
    max_rows_per_prompt: int = 0
    holdout: int = 10
    benchmark_split: Literal["test", "test_v1"] = "test"
    eval_pairs: int = 0
    seed: int = 42
    images_per_shard: int = 512
    prompts_per_shard: int = 1024
    batch_size: int = 8
    prompt_batch_size: int = 32
    threads: int = 8

    def __post_init__(self):
        for name in ("images_per_shard", "prompts_per_shard", "batch_size", "prompt_batch_size", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("min_area", "max_rows_per_prompt", "eval_pairs", "aspect_tolerance"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("min_vote_share", "min_confidence"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.dataset == "dinalrm" and self.fit == "crop":
            raise ConfigError("fit is crop, but dinalrm holds latents, which are not cut; leave fit at stretch")
        if not self.buckets:
            raise ConfigError("buckets is empty: name at least one, height x width, for instance 512x512")
        for name in self.buckets:
            try:
                parse_bucket(name)
            except ValueError as error:
                raise ConfigError(str(error)) from None


# ------------------------------------------------------------------------------------- training


@dataclasses.dataclass(frozen=True)
class SigmaConfig:
    """The training distribution of the noise level; `noise.DISTRIBUTIONS` names the parameters."""

    distribution: Literal["uniform", "logit_normal", "mode", "constant", "power", "beta"] = "uniform"
    parameters: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """A pair loss of `dinalrm_jax.preference`; the defaults are the paper's constants.

    variance: "calibrated" is `k sigma^2 + sigma_0^2`, "constant" is `constant_variance` at every level.
    epsilon: added inside both square roots by the released code (1e-6); 0 is the paper's formula.
    margin: of the Bradley-Terry loss only, which has neither variance nor epsilon.
    """

    name: Literal["fidelity", "nll", "bradley_terry"] = "fidelity"
    variance: Literal["calibrated", "constant"] = "calibrated"
    k: float = 2.0
    sigma_0: float = 0.1
    constant_variance: float = 0.5
    epsilon: float = 0.0
    margin: float = 0.0

    def __post_init__(self):
        if self.variance == "calibrated" and not (self.k >= 0 and self.sigma_0 > 0):
            raise ConfigError(f"calibrated variance needs k >= 0 and sigma_0 > 0, got {self.k} and {self.sigma_0}")
        if self.variance == "constant" and not self.constant_variance > 0:
            raise ConfigError(f"constant_variance must be positive, got {self.constant_variance}")
        if self.name == "bradley_terry":
            refuse_ignored(
                self, ("variance", "k", "sigma_0", "constant_variance", "epsilon"), "the Bradley-Terry loss has none"
            )
        else:
            refuse_ignored(self, ("margin",), f"the {self.name} loss has none")
            if self.variance == "constant":
                refuse_ignored(self, ("k", "sigma_0"), "the variance is constant_variance")
            else:
                refuse_ignored(self, ("constant_variance",), "the variance is k sigma^2 + sigma_0^2")
        if self.name == "nll" and self.epsilon:
            raise ConfigError(f"epsilon is {self.epsilon}, but it belongs to the fidelity loss; leave it at 0")


@dataclasses.dataclass(frozen=True)
class EnsembleTermConfig:
    """Trains the token-level ensemble too: every pair is also scored at several levels at once.

    Neither the paper nor the released code has it: their head first sees several levels when it is evaluated.

    count: levels of one pair's ensemble, drawn like its single level, which is one of them.
    weight: of the ensemble's loss; the single level's has the rest.
    """

    count: int = 3
    weight: float = 0.5

    def __post_init__(self):
        if self.count < 2 or not 0 < self.weight <= 1:
            raise ConfigError(
                f"an ensemble has 2 levels or more and its loss a weight in (0, 1], got {self.count} and {self.weight}"
            )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warmup, constant or cosine decay, clipping by global norm, an average of the weights."""

    learning_rate: float = 5e-5
    weight_decay: float = 0.01
    b1: float = 0.9
    b2: float = 0.999
    warmup_steps: int = 1000
    schedule: Literal["constant", "cosine"] = "constant"
    max_grad_norm: float = 1.0
    ema_decay: float = 0.995

    def __post_init__(self):
        if self.learning_rate < 0 or self.max_grad_norm <= 0 or self.warmup_steps < 0:
            raise ConfigError(
                "learning_rate and warmup_steps must not be negative and max_grad_norm must be positive, got "
                f"{self.learning_rate}, {self.warmup_steps} and {self.max_grad_norm}"
            )
        if not 0.0 <= self.ema_decay < 1.0:
            raise ConfigError(f"ema_decay must be in [0, 1), got {self.ema_decay}; 0 averages nothing")


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One training stage.

    batch_size: pairs an optimizer step.
    steps: optimizer steps, or
    epochs: passes over the training pairs; one of the two is given.
    micro_batches: a batch passes as so many parts, one after another, in the memory of one.
    checkpoint_every, log_every, evaluate_every: steps.
    """

    batch_size: int
    steps: int | None = None
    epochs: float | None = None
    micro_batches: int = 1
    optimizer: OptimizerConfig = OptimizerConfig()
    sigma: SigmaConfig = SigmaConfig()
    checkpoint_every: int = 1000
    log_every: int = 20
    evaluate_every: int = 1000

    def __post_init__(self):
        for name in ("batch_size", "steps", "micro_batches", "checkpoint_every", "log_every", "evaluate_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if (self.steps is None) == (self.epochs is None):
            raise ConfigError(
                f"a stage is so many steps or so many epochs long, got steps {self.steps} and epochs {self.epochs}; "
                "give one of them, and the other as None"
            )
        if self.epochs is not None and not self.epochs > 0:
            raise ConfigError(f"epochs must be positive, got {self.epochs}")

    def lasting(self, pairs: float) -> "StageConfig":
        """The same stage in steps, of so many training pairs an epoch."""
        if self.steps is not None:
            return self
        return dataclasses.replace(self, steps=max(1, round(self.epochs * pairs / self.batch_size)), epochs=None)


@dataclasses.dataclass(frozen=True)
class ScenesConfig:
    """The generated scenes of `dinalrm_jax.data.synthetic` (written to `data` when it is not there)."""

    train_pairs: int = 12000
    eval_pairs: int = 400
    image_size: int = 64
    seed: int = 0

    def __post_init__(self):
        if self.train_pairs < 1 or self.eval_pairs < 1:
            raise ConfigError(
                f"train_pairs and eval_pairs must be positive, got {self.train_pairs} and {self.eval_pairs}"
            )
        if self.image_size < 16 or self.image_size % 16:
            raise ConfigError(f"image_size must be a positive multiple of 16 pixels, got {self.image_size}")


@dataclasses.dataclass(frozen=True)
class RehearsalConfig:
    """The whole path on inputs made from nothing (`dinalrm_jax.data.rehearsal`).

    A random, tiny SD3 pipeline is written to WORKDIR/base_model and HPDv3-layout data to
    WORKDIR/source; that source is preprocessed with that pipeline into WORKDIR/data.
    """

    train_pairs: int = 96
    eval_pairs: int = 24
    preparation: PreparationConfig = PreparationConfig("hpdv3")
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """A window of the reward stage that JAX's profiler records: `steps` steps (0: none) after step `start`."""

    start: int = 10
    steps: int = 0

    def __post_init__(self):
        if not self.steps:
            refuse_ignored(self, ("start",), "no steps are recorded (profile.steps is 0)")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Held-out evaluation.

    sigma: the single level that stands for a run.
    levels: single levels evaluated while training, beside `sigma`.
    ensemble: the levels of the ensemble; evaluated while training where `levels` is not empty.
    max_pairs: at most so many held-out pairs, spread evenly; 0: all.
    batch_size: images a batch, at most: half as many, and so on, where they do not fit beside the training state.
    seed: of the noise, of which every image has its own.
    """

    sigma: float = 0.4
    levels: tuple[float, ...] = ()
    max_pairs: int = 0
    ensemble: tuple[float, ...] = (0.2, 0.5, 0.7)
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self):
        levels = (self.sigma, *self.levels, *self.ensemble)
        if not self.ensemble or not all(0 <= level <= 1 for level in levels):
            raise ConfigError(
                f"sigma and the ensemble's levels must lie in [0, 1], got {self.sigma} and {self.ensemble}"
            )
        if self.batch_size < 1 or self.max_pairs < 0:
            raise ConfigError(
                f"batch_size must be at least 1 and max_pairs at least 0, got {self.batch_size}, {self.max_pairs}"
            )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 takes what the others leave.

    data: rows of a batch are split, parameters repeated.
    fsdp: rows are split and parameters too; each is gathered where it is used.
    tensor: heads and hidden units are split, within a block's matrix products.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = (self.data, self.fsdp, self.tensor)
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise ConfigError(f"mesh axes must be positive, at most one of them -1 (the rest), got {sizes}")


@dataclasses.dataclass(frozen=True)
class MixedConfig:
    """One of several record directories to train on; its pairs come `weight` times an epoch."""

    data: str
    weight: float = 1.0

    def __post_init__(self):
        if not self.weight > 0:
            raise ConfigError(f"weight must be positive, got {self.weight}; leave {self.data} out instead")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A whole training run.

    data: directory of records (`dinalrm_jax.data.records`); None: WORKDIR/data, or
    mixture: several of them, each with a weight.
    scenes: draw the quickstart's scenes into `data` where it does not exist; None: it must exist.
    rehearsal: make base model and data from nothing, instead of `data`, `scenes` and `base_model`.
    base_model: a diffusers directory or a native backbone to start from; None: random weights.
    init_from: a reward model to go on from, native (with its own backbone, unless base_model names one) or released
        (then base_model is needed): its LoRA and head are what the reward stage starts with.
    generator: a flow-matching stage that trains the whole backbone first; None: skip it.
    reward: the stage that trains LoRA and head on preference pairs.
    ensemble_term: train the ensemble too; None: single levels only, as the paper does.
    wandb_project: log to this Weights & Biases project too; needs `wandb` installed.
    profile: steps to record into WORKDIR/profile.
    """

    name: str
    model: RewardModelConfig
    reward: StageConfig
    seed: int = 0
    data: str | None = None
    mixture: tuple[MixedConfig, ...] = ()
    scenes: ScenesConfig | None = None
    base_model: str | None = None
    init_from: str | None = None
    generator: StageConfig | None = None
    loss: LossConfig = LossConfig()
    ensemble_term: EnsembleTermConfig | None = None
    execution: ExecutionConfig = ExecutionConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    mesh: MeshConfig = MeshConfig()
    rehearsal: RehearsalConfig | None = None
    wandb_project: str | None = None
    profile: ProfileConfig = ProfileConfig()

    def __post_init__(self):
        if self.rehearsal is not None and (self.scenes is not None or self.data or self.base_model):
            raise ConfigError("a rehearsal makes its own data and base model; leave scenes, data and base_model out")
        if self.generator is not None:
            refuse_ignored(self.generator, ("evaluate_every",), "a generator is not evaluated while it trains")
        if self.mixture and (self.data or self.scenes is not None or self.rehearsal is not None):
            raise ConfigError("mixture names the data; leave data, scenes and rehearsal out")
        if self.init_from is not None and (self.generator is not None or self.rehearsal is not None):
            raise ConfigError(
                "init_from is a model on a backbone of its own; a generator stage or a rehearsal would make another: "
                "set them to None (--config.generator=None)"
            )


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """Several runs on the same data, each with every seed; runs of one seed share its generator."""

    name: str
    runs: tuple[TrainConfig, ...]
    seeds: tuple[int, ...]

    def __post_init__(self):
        names = [run.name for run in self.runs]
        if len(set(names)) != len(names) or not names or not self.seeds:
            raise ConfigError(f"a sweep needs seeds and runs of different names, got {names} and {self.seeds}")
        if len({run.generator for run in self.runs if run.generator is not None}) > 1:
            raise ConfigError("runs of a sweep share one generator a seed, so their generator stages must be equal")


def known_keys() -> set[str]:
    """Every key of every configuration here, for "did you mean"."""
    kinds = [value for value in globals().values() if dataclasses.is_dataclass(value)]
    return {field.name for kind in kinds for field in dataclasses.fields(kind)}
