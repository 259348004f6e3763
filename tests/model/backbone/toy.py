"""A second backbone family in one file: a plain DiT that reads the prompt through its pooled embedding only.

Importing it registers it, as the line in `dinalrm_jax.model.backbone` does for the families of the package.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from dinalrm_jax.devices.sharding import WHOLE
from dinalrm_jax.model.backbone.family import BackboneConfig, Family, Features, LatentSpec, register
from dinalrm_jax.model.layers import Linear, layer_norm


@dataclasses.dataclass(frozen=True)
class ToyConfig(BackboneConfig):
    family: ClassVar[str] = "toy"

    num_layers: int = 3
    width: int = 16
    text_width: int = 64
    deepest_text_tap: ClassVar[None] = None

    @property
    def latents(self) -> LatentSpec:
        return LatentSpec(16, 8, 2, largest_side=64, trained_side=8, text_width=self.text_width, pooled_width=64)

    def flops(self, num_blocks, image_tokens, text_tokens):
        return num_blocks * image_tokens * 2 * self.width**2 * 12


class Block(nnx.Module):
    def __init__(self, width, *, rngs):
        self.modulation = Linear(width, 2 * width, rngs=rngs)
        self.to_qkv, self.to_out = Linear(width, 3 * width, rngs=rngs), Linear(width, width, rngs=rngs)
        self.up, self.down = Linear(width, 4 * width, rngs=rngs), Linear(4 * width, width, rngs=rngs)

    def __call__(self, x, temb):
        shift, scale = jnp.split(self.modulation(temb)[:, None], 2, axis=-1)
        query, key, value = jnp.split(self.to_qkv(layer_norm(x) * (1 + scale) + shift)[:, :, None], 3, axis=-1)
        x = x + self.to_out(jax.nn.dot_product_attention(query, key, value)[:, :, 0])
        return x + self.down(jax.nn.gelu(self.up(layer_norm(x))))


class Toy(nnx.Module):
    def __init__(self, config, execution, *, num_blocks, zero_init, rngs):
        self.dtype, channels = execution.dtype, config.latents.channels
        self.patches, self.condition = (
            Linear(4 * channels, config.width, rngs=rngs),
            Linear(66, config.width, rngs=rngs),
        )
        self.blocks = nnx.List(Block(config.width, rngs=rngs) for _ in range(num_blocks or config.num_layers))
        self.out = Linear(config.width, 4 * channels, rngs=rngs) if num_blocks is None else None

    def features(self, latents, timestep, prompt, *, visual_taps, text_taps):
        b, h, w, c = latents.shape
        x = latents.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, 4 * c)
        angle = timestep[:, None] / 1000
        known = jnp.concatenate([jnp.cos(angle), jnp.sin(angle), prompt.pooled_prompt_embeds], axis=-1)
        temb, x = self.condition(known.astype(self.dtype)), self.patches(x.astype(self.dtype))
        taps = [x]
        for block in self.blocks:
            taps.append(block(taps[-1], temb))
        return Features(temb, tuple(taps[tap] for tap in visual_taps), ())

    def velocity(self, latents, timestep, prompt):
        b, h, w, c = latents.shape
        found = self.features(latents, timestep, prompt, visual_taps=(len(self.blocks),), text_taps=())
        out = self.out(found.visual[0]).reshape(b, h // 2, w // 2, 2, 2, c)
        return out.transpose(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)


RULES = (
    (r"(?:.*\.)?(?:modulation|to_qkv|up|patches|condition|out)\.weight", P("fsdp", None)),
    (r".*\.(?:to_out|down)\.weight", P(None, "fsdp")),
    (r".*\.bias|.*\.lora_[AB]", WHOLE),
)

FAMILY = Family(
    config=ToyConfig,
    build=Toy,
    adapted=lambda backbone, with_last_text: [x for block in backbone.blocks for x in (block.to_qkv, block.to_out)],
    sharding=RULES,
)
register(FAMILY)
