"""CLIP whole (transformers' `CLIPModel`): an image and a text tower into one space."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from dinalrm_jax.encoders.clip import CLIPEncoder, CLIPTextConfig, CLIPTextTransformer
from dinalrm_jax.model.layers import Conv2d, Embedding, LayerNorm, Linear

# Of the pixels that CLIP was trained on; those of every published CLIP, open_clip's among them.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
Fit = Literal["crop", "pad"]  # the middle of the image, as CLIP; all of it on black, as HPSv2


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
    """Fields of transformers' `CLIPVisionConfig`; the defaults are its own."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: float = 1e-5


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Both towers, the width of the space that they share, and how an image is brought to the tower's square."""

    text: CLIPTextConfig = CLIPTextConfig()
    vision: CLIPVisionConfig = CLIPVisionConfig()
    projection_dim: int = 512
    fit: Fit = "crop"


class CLIPModel(nnx.Module):
    """Both towers; embeddings are not normalised."""

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.text_model = CLIPTextTransformer(config.text, rngs=rngs)
        self.vision_model = CLIPVisionTransformer(config.vision, rngs=rngs)
        self.text_projection = Linear(config.text.hidden_size, config.projection_dim, use_bias=False, rngs=rngs)
        self.visual_projection = Linear(config.vision.hidden_size, config.projection_dim, use_bias=False, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.zeros(()))

    def text_features(self, input_ids: jax.Array) -> jax.Array:
        """(B, T) int32 -> (B, projection_dim) float32."""
        return self.text_projection(self.text_model(input_ids, "float32")[1])

    def image_features(self, pixels: jax.Array) -> jax.Array:
        """(B, H, W, 3) in [0, 1], of any size -> (B, projection_dim) float32; differentiable in the pixels."""
        return self.visual_projection(
            self.vision_model(prepared(pixels, self.config.vision.image_size, self.config.fit))
        )


class CLIPVisionTransformer(nnx.Module):
    def __init__(self, config: CLIPVisionConfig, *, rngs: nnx.Rngs):
        self.embeddings = CLIPVisionEmbeddings(config, rngs=rngs)
        self.pre_layrnorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # as transformers spells it
        self.encoder = CLIPEncoder(config, causal=False, rngs=rngs)
        self.post_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """(B, S, S, 3) normalised -> (B, hidden_size), of the class token."""
        x = self.pre_layrnorm(self.embeddings(pixels))
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x[:, 0])


class CLIPVisionEmbeddings(nnx.Module):
    def __init__(self, config: CLIPVisionConfig, *, rngs: nnx.Rngs):
        size, patch = config.hidden_size, config.patch_size
        self.class_embedding = nnx.Param(jax.random.normal(rngs.params(), (size,)))
        self.patch_embedding = Conv2d(3, size, patch, stride=patch, use_bias=False, rngs=rngs)
        self.position_embedding = Embedding((config.image_size // patch) ** 2 + 1, size, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        patches = self.patch_embedding(pixels)
        batch, height, width, size = patches.shape
        first = jnp.broadcast_to(self.class_embedding[...], (batch, 1, size))
        tokens = jnp.concatenate([first, patches.reshape(batch, height * width, size)], axis=1)
        return tokens + self.position_embedding(jnp.arange(tokens.shape[1]))


def prepared(pixels: jax.Array, size: int, fit: Fit) -> jax.Array:
    """What a tower of this image size reads, (B, size, size, 3) normalised.

    "crop": the shorter side to `size`, and of that the middle; CLIP's own preprocessing, but that resized pixels are
    not rounded to 8 bits. "pad": the longer side, black on both sides of the other; HPSv2's, which neither rounds nor
    clips. Both bicubic.
    """
    batch, height, width, channels = pixels.shape
    if fit == "crop":
        shorter = min(height, width)
        inner = (size * height // shorter, size * width // shorter)
    else:
        scale = size / max(height, width)
        inner = (round(height * scale), round(width * scale))
    if (height, width) != inner:
        pixels = jax.image.resize(pixels, (batch, *inner, channels), "bicubic", antialias=True)
        pixels = jnp.clip(pixels, 0, 1) if fit == "crop" else pixels
    if fit == "crop":
        top, left = ((side - size) // 2 for side in inner)
        pixels = pixels[:, top : top + size, left : left + size]
    else:
        rows, columns = (((size - side) // 2, size - side - (size - side) // 2) for side in inner)
        pixels = jnp.pad(pixels, ((0, 0), rows, columns, (0, 0)))
    return (pixels - jnp.asarray(MEAN)) / jnp.asarray(STD)
