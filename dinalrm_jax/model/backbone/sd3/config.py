"""The geometry of Stable Diffusion 3 and 3.5."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from dinalrm_jax.mapping import ConfigError, from_mapping
from dinalrm_jax.model.backbone.family import BackboneConfig, LatentSpec

DOWNSAMPLING = 8  # of the VAE that all of them are trained on

# What diffusers' SD3Transformer2DModel takes for a key that its config.json leaves out; not SD3.5-Medium's values.
DIFFUSERS_DEFAULTS = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 18,
    "attention_head_dim": 64,
    "num_attention_heads": 18,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1152,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 96,
    "dual_attention_layers": (),
    "qk_norm": None,
}


@dataclasses.dataclass(frozen=True)
class SD3Config(BackboneConfig):
    """Geometry of a diffusers `SD3Transformer2DModel`, field for field its `config.json`.

    The defaults are `stabilityai/stable-diffusion-3.5-medium`; see `sd3_medium` and `sd35_large` for its siblings.
    """

    family: ClassVar[str] = "sd3"

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

    @classmethod
    def sd3_medium(cls) -> "SD3Config":
        """`stabilityai/stable-diffusion-3-medium`: no norm of queries and keys, no dual attention."""
        return cls(pos_embed_max_size=192, dual_attention_layers=(), qk_norm=None)

    @classmethod
    def sd35_large(cls) -> "SD3Config":
        """`stabilityai/stable-diffusion-3.5-large`: 38 blocks of width 2432, no dual attention."""
        return cls(
            num_layers=38,
            num_attention_heads=38,
            caption_projection_dim=2432,
            pos_embed_max_size=192,
            dual_attention_layers=(),
        )

    @property
    def inner_dim(self) -> int:
        """Width of both token streams."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def width(self) -> int:
        return self.inner_dim

    @property
    def latents(self) -> LatentSpec:
        return LatentSpec(
            channels=self.in_channels,
            downsampling=DOWNSAMPLING,
            patch=self.patch_size,
            largest_side=self.patch_size * self.pos_embed_max_size,
            trained_side=self.sample_size,
            text_width=self.joint_attention_dim,
            pooled_width=self.pooled_projection_dim,
        )

    @property
    def deepest_text_tap(self) -> int:
        return self.num_layers - 1  # the last block drops the text stream

    def flops(self, num_blocks: int, image_tokens: int, text_tokens: int) -> int:
        width, both, total = self.inner_dim, image_tokens + text_tokens, 0
        for block in range(num_blocks):
            dual = block in self.dual_attention_layers
            total += 2 * width**2 * ((16 if dual else 12) * image_tokens + 12 * text_tokens)
            total += 4 * width * (both**2 + (image_tokens**2 if dual else 0))
        return total


def read_config(values: Mapping[str, Any], where: str) -> SD3Config:
    """The geometry in diffusers' `config.json`; raises ConfigError for one that is not an SD3's."""
    geometry = DIFFUSERS_DEFAULTS | {key: value for key, value in values.items() if not key.startswith("_")}
    if "out_channels" not in geometry:
        geometry["out_channels"] = 16
    elif geometry["out_channels"] is None:
        geometry["out_channels"] = geometry["in_channels"]
    return from_mapping(SD3Config, geometry, where)
