"""What a backbone family is: the one place where all that belongs to a kind of transformer is named.

A family gives its geometry as a frozen configuration, the transformer as a module, and what others need to know of
both: which projections LoRA adapts, where parameters lie on a mesh, how diffusers stores them. Everything else reads
`BackboneConfig` and its `LatentSpec` only. `dinalrm_jax.model.backbone` registers the families.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import jax
from flax import nnx

from dinalrm_jax.devices.sharding import Rules
from dinalrm_jax.mapping import ConfigError, Variants
from dinalrm_jax.model.batch import PromptEmbeds
from dinalrm_jax.model.execution import ExecutionConfig
from dinalrm_jax.model.layers import Linear
from dinalrm_jax.model.lora import LoRAConfig, add_lora
from dinalrm_jax.model.parameters import Functional, functional
from dinalrm_jax.model.tables import Table
from dinalrm_jax.noise import AnyArray

DEFAULT = "sd3"  # of a configuration that names no family, as files had none before there were several


@dataclasses.dataclass(frozen=True)
class LatentSpec:
    """The latents and prompts that a backbone takes.

    Attributes:
        channels: of a latent.
        downsampling: pixels along a side of one latent.
        patch: latents along a side of one token.
        largest_side: latents along a side, at most.
        trained_side: latents along a side of the square images that the backbone was made for.
        text_width, pooled_width: of prompt embeddings.
    """

    channels: int
    downsampling: int
    patch: int
    largest_side: int
    trained_side: int
    text_width: int
    pooled_width: int

    @property
    def unit(self) -> int:
        """Pixels that an image's sides are multiples of."""
        return self.downsampling * self.patch

    def tokens(self, height: int, width: int) -> int:
        """Image tokens of latents of this size."""
        return (height // self.patch) * (width // self.patch)

    def validate(self, latents: AnyArray) -> None:
        """Raises ValueError unless `latents` is (B, H, W, channels) of a size that the backbone can patch."""
        shape = latents.shape
        if len(shape) != 4:
            raise ValueError(f"latents must be (batch, height, width, {self.channels}), got rank {len(shape)}: {shape}")
        if shape[-1] != self.channels:
            if shape[1] == self.channels:
                raise ValueError(
                    f"latents look channels-first (NCHW): {shape}; expected (batch, height, width, {self.channels}). "
                    "Transpose with latents.transpose(0, 2, 3, 1)"
                )
            raise ValueError(f"latents have {shape[-1]} channels, the model takes {self.channels}: {shape}")
        for name, size in zip(("height", "width"), shape[1:3]):
            if size % self.patch or not size:
                raise ValueError(
                    f"latent {name} {size} is not a positive multiple of the patch size {self.patch}; "
                    f"resize the image so that its {name} is a multiple of {self.unit} pixels"
                )
            if size > self.largest_side:
                raise ValueError(f"latent {name} {size} exceeds the position table, {self.largest_side}")

    def validate_rows(self, latents: jax.Array, prompt: PromptEmbeds) -> None:
        """Raises ValueError unless latents and as many prompts are what the backbone takes."""
        self.validate(latents)
        prompt.validate(latents.shape[0], self.text_width, self.pooled_width)


class BackboneConfig(Variants):
    """A backbone's geometry: the base of the families' frozen configurations."""

    family: ClassVar[str]
    num_layers: int

    @property
    @abc.abstractmethod
    def width(self) -> int:
        """Of a token."""

    @property
    @abc.abstractmethod
    def latents(self) -> LatentSpec:
        """What it takes."""

    @property
    @abc.abstractmethod
    def deepest_text_tap(self) -> int | None:
        """The last block after which there is a text stream; None where there never is one."""

    @abc.abstractmethod
    def flops(self, num_blocks: int, image_tokens: int, text_tokens: int) -> int:
        """Of the first blocks for one image, by the cost model: a multiply-add is two."""

    @classmethod
    def variant(cls, values: Mapping[str, Any]) -> tuple[type, dict[str, Any]]:
        name = values.get("family", DEFAULT)
        if name not in _FAMILIES:
            raise ConfigError(f"there is no backbone family {name!r}; known: {', '.join(_FAMILIES)}")
        return _FAMILIES[name].config, {key: values[key] for key in values if key != "family"}

    @classmethod
    def kinds(cls) -> tuple[type, ...]:
        return tuple(family.config for family in _FAMILIES.values())

    def marks(self) -> dict[str, Any]:
        return {} if self.family == DEFAULT else {"family": self.family}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Features:
    """What the head sees of a backbone.

    Attributes:
        temb: (B, D) conditioning: embedded noise level plus pooled text.
        visual: one (B, Nv, D) array per visual tap, shallow to deep.
        text: one (B, Nt, D) array per text tap; empty for a head without text.
    """

    temb: jax.Array
    visual: tuple[jax.Array, ...]
    text: tuple[jax.Array, ...]


class Backbone(Protocol):
    """A family's transformer, an `nnx.Module`: whole, or truncated to its first blocks."""

    def features(
        self,
        latents: jax.Array,
        timestep: jax.Array,
        prompt: PromptEmbeds,
        *,
        visual_taps: tuple[int, ...],
        text_taps: tuple[int, ...],
    ) -> Features:
        """The streams after the tapped blocks (0: the embedded input).

        Args:
            latents: (B, H, W, C) noisy latents.
            timestep: (B,) 1000 sigma.
            prompt: B prompts.
            visual_taps, text_taps: increasing block counts.
        """
        ...

    def velocity(self, latents: jax.Array, timestep: jax.Array, prompt: PromptEmbeds) -> jax.Array:
        """The flow-matching velocity `eps - x0` by the whole transformer, (B, H, W, C); arguments as for `features`."""
        ...


@dataclasses.dataclass(frozen=True)
class DiffusersLayout:
    """How diffusers stores a family's transformer.

    Attributes:
        class_name: in its `config.json`.
        read_config: the geometry that such a file describes, with diffusers' own defaults.
        write_config: the inverse, without the class's name.
        table: (config, prefix) -> names and layouts there and here; `prefix` stands before each of ours.
        unused: number of blocks -> pattern of the file's names that a model of the first blocks leaves alone.
    """

    class_name: str
    read_config: Callable[[Mapping[str, Any], str], BackboneConfig]
    write_config: Callable[[Any], dict[str, Any]]
    table: Callable[[Any, str], Table]
    unused: Callable[[int], str]


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of backbone.

    Attributes:
        config: its geometry's class.
        build: (config, execution, *, num_blocks, zero_init, rngs) -> the transformer: its first `num_blocks` blocks, or
            all with the output layers (None). `zero_init` starts it as one trains from nothing.
        adapted: (backbone, with_last_text) -> the projections that LoRA adapts; `with_last_text` whether the last
            block's text stream is read by anything.
        sharding: where its parameters lie, by patterns of their names; see `devices.sharding`.
        diffusers: its layout there, if it has one.
    """

    config: type[BackboneConfig]
    build: Callable[..., Any]
    adapted: Callable[[Any, bool], list[Linear]]
    sharding: Rules
    diffusers: DiffusersLayout | None = None


_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Makes a family known to config files, checkpoints and everything that takes a `BackboneConfig`."""
    name = family.config.family
    if _FAMILIES.get(name, family) != family:
        raise ValueError(f"there is a backbone family {name!r} already")
    _FAMILIES[name] = family


def family_of(config: BackboneConfig) -> Family:
    """The family of a geometry."""
    return _FAMILIES[config.family]


def family_in_diffusers(class_name: str | None, where: str) -> Family:
    """The family that diffusers calls `class_name`.

    Raises:
        ConfigError: none of ours.
    """
    known = {family.diffusers.class_name: family for family in _FAMILIES.values() if family.diffusers is not None}
    if class_name not in known:
        raise ConfigError(f"{where} is of {class_name!r}, expected a diffusers {' or '.join(known)}")
    return known[class_name]


def transformer_functional(
    config: BackboneConfig, execution: ExecutionConfig, *, zero_init: bool = False, lora: LoRAConfig | None = None
) -> Functional:
    """The whole transformer, velocity included, as a pure function of named parameters; with adapters where asked."""
    family = family_of(config)

    def build(rngs: nnx.Rngs) -> Any:
        transformer = family.build(config, execution, num_blocks=None, zero_init=zero_init, rngs=rngs)
        if lora is not None:
            add_lora(family.adapted(transformer, False), lora, rngs=rngs)
        return transformer

    return functional(build, family.sharding)
