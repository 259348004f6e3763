"""`SD3Transformer2DModel` of diffusers in Flax NNX: whole with its velocity, or truncated with taps."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float

from dinalrm_jax.devices.mesh import split_rows
from dinalrm_jax.model.backbone.family import Features
from dinalrm_jax.model.backbone.mmdit import ZEROS, AdaLayerNorm, JointTransformerBlock
from dinalrm_jax.model.backbone.remat import rematerialised
from dinalrm_jax.model.backbone.sd3.config import SD3Config
from dinalrm_jax.model.batch import PromptEmbeds
from dinalrm_jax.model.execution import ExecutionConfig
from dinalrm_jax.model.layers import Linear, layer_norm
from dinalrm_jax.noise import AnyArray


class PatchEmbed(nnx.Module):
    """Patches of latents projected to tokens, plus the centre crop of a fixed sin-cos table.

    `proj.weight` is (D, p p C) over channels-last patches; diffusers' is a (D, C, p, p) convolution.
    diffusers stores the table as (1, S S, D), 906 MB in float32 at SD3.5's size; its left half
    depends on the column only and its right half on the row only, so `pos_embed` keeps the two
    (2, S, D/2) one-dimensional tables: column, then row.
    """

    def __init__(self, config: SD3Config, *, rngs: nnx.Rngs):
        self.patch_size = config.patch_size
        self.max_size = config.pos_embed_max_size
        self.proj = Linear(config.patch_size**2 * config.in_channels, config.inner_dim, rngs=rngs)
        table = sincos_table(config.pos_embed_max_size, config.inner_dim // 2, config.sample_size // config.patch_size)
        self.pos_embed = nnx.Param(jnp.asarray(np.stack([table, table])))

    def __call__(self, latents: jax.Array) -> jax.Array:
        """(B, H, W, C) -> (B, H/p W/p, D)."""
        batch, height, width, channels = latents.shape
        p = self.patch_size
        rows, columns = height // p, width // p
        patches = latents.reshape(batch, rows, p, columns, p, channels).transpose(0, 1, 3, 2, 4, 5)
        tokens = self.proj(patches.reshape(batch, rows * columns, p * p * channels))
        left, top = (self.max_size - columns) // 2, (self.max_size - rows) // 2
        by_column, by_row = self.pos_embed[...]
        by_column = by_column[None, left : left + columns]
        by_row = by_row[top : top + rows, None]
        table = jnp.concatenate(jnp.broadcast_arrays(by_column, by_row), axis=-1)
        return tokens + table.reshape(rows * columns, -1).astype(tokens.dtype)


class TwoLayerEmbedding(nnx.Module):
    """Linear, SiLU, Linear: diffusers' TimestepEmbedding and PixArtAlphaTextProjection."""

    def __init__(self, in_features: int, dim: int, *, rngs: nnx.Rngs):
        self.linear_1 = Linear(in_features, dim, rngs=rngs)
        self.linear_2 = Linear(dim, dim, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class TimeTextEmbed(nnx.Module):
    """The conditioning embedding: sinusoids of the timestep plus the pooled prompt."""

    def __init__(self, config: SD3Config, *, rngs: nnx.Rngs):
        self.timestep_embedder = TwoLayerEmbedding(256, config.inner_dim, rngs=rngs)
        self.text_embedder = TwoLayerEmbedding(config.pooled_projection_dim, config.inner_dim, rngs=rngs)

    def __call__(self, timestep: AnyArray, pooled: jax.Array) -> jax.Array:
        """(B,) in [0, 1000], (B, P) -> (B, D)."""
        sinusoids = timestep_sinusoids(timestep, 256).astype(pooled.dtype)
        return self.timestep_embedder(sinusoids) + self.text_embedder(pooled)


class SD3Transformer(nnx.Module):
    """The first `num_blocks` blocks of an SD3 transformer; all of them give a velocity.

    Args:
        config: the diffusers geometry.
        execution: dtype, attention implementation, loop or scan, rematerialisation.
        num_blocks: how many blocks to keep; None keeps the whole model with its output layers.
        zero_init: start blocks as the identity and the velocity at zero, to train from nothing;
            otherwise as diffusers draws a fresh model.
    """

    def __init__(
        self,
        config: SD3Config,
        execution: ExecutionConfig = ExecutionConfig(),
        *,
        num_blocks: int | None = None,
        zero_init: bool = False,
        rngs: nnx.Rngs,
    ):
        self.config, self.execution = config, execution
        self.whole = num_blocks is None
        dim = config.inner_dim
        self.pos_embed = PatchEmbed(config, rngs=rngs)
        self.time_text_embed = TimeTextEmbed(config, rngs=rngs)
        self.context_embedder = Linear(config.joint_attention_dim, dim, rngs=rngs)
        self.transformer_blocks = nnx.List(
            JointTransformerBlock(
                dim,
                config.num_attention_heads,
                dual_attention=i in config.dual_attention_layers,
                context_pre_only=i == config.num_layers - 1,
                qk_norm=config.qk_norm is not None,
                attention=execution.attention,
                zero_init=zero_init,
                rngs=rngs,
            )
            for i in range(config.num_layers if self.whole else num_blocks)
        )
        if self.whole:
            out_features = config.patch_size**2 * config.out_channels
            self.norm_out = AdaLayerNorm(dim, 2, zero_init=zero_init, rngs=rngs)
            self.proj_out = Linear(dim, out_features, rngs=rngs, kernel_init=ZEROS if zero_init else None)

    def features(
        self,
        latents: Float[AnyArray, "b h w c"],
        timestep: Float[AnyArray, " b"],
        prompt: PromptEmbeds,
        *,
        visual_taps: tuple[int, ...],
        text_taps: tuple[int, ...],
    ) -> Features:
        """The streams after the tapped blocks; see `Backbone.features`."""
        image, text, temb = self._embed(latents, timestep, prompt)
        visual, textual = {0: image}, {0: text}
        stops = sorted({0, *visual_taps, *text_taps})
        for start, stop in itertools.pairwise(stops):
            image, text = self._run_blocks(start, stop, image, text, temb)
            visual[stop], textual[stop] = image, text
        return Features(temb, tuple(visual[tap] for tap in visual_taps), tuple(textual[tap] for tap in text_taps))

    def velocity(
        self, latents: Float[AnyArray, "b h w c"], timestep: Float[AnyArray, " b"], prompt: PromptEmbeds
    ) -> Float[Array, "b h w out"]:
        """The velocity, (B, H, W, out_channels) in the compute dtype; see `Backbone.velocity`.

        Raises:
            ValueError: a truncated transformer.
        """
        if not self.whole:
            raise ValueError(
                f"this transformer keeps {len(self.transformer_blocks)} of {self.config.num_layers} blocks and has no "
                "output layers; build it with num_blocks=None for a velocity"
            )
        image, text, temb = self._embed(latents, timestep, prompt)
        image, _ = self._run_blocks(0, len(self.transformer_blocks), image, text, temb)
        scale, shift = self.norm_out(temb)
        image = self.proj_out(layer_norm(image) * (1 + scale) + shift)
        batch, height, width, _ = latents.shape
        p = self.config.patch_size
        patches = image.reshape(batch, height // p, width // p, p, p, self.config.out_channels)
        return patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height, width, -1)

    def _embed(
        self, latents: AnyArray, timestep: AnyArray, prompt: PromptEmbeds
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        dtype = jnp.dtype(self.execution.dtype)
        image = self.pos_embed(jnp.asarray(latents, dtype))
        text = self.context_embedder(jnp.asarray(prompt.prompt_embeds, dtype))
        return image, text, self.time_text_embed(timestep, jnp.asarray(prompt.pooled_prompt_embeds, dtype))

    def _run_blocks(
        self, start: int, stop: int, image: jax.Array, text: jax.Array, temb: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        """Blocks start..stop-1, unrolled or, run by run of equal structure, scanned."""
        blocks = [nnx.split(block) for block in self.transformer_blocks[start:stop]]
        if self.execution.layers == "loop":
            for graphdef, state in blocks:
                image, text = self._block(graphdef)(state, image, text, temb)
            return image, text
        for graphdef, run in itertools.groupby(blocks, key=lambda block: block[0]):
            block, states = self._block(graphdef), [state for _, state in run]
            if len(states) == 1:  # among them a whole model's last block, whose text stream ends
                image, text = block(states[0], image, text, temb)
                continue

            def layer(streams, state, block=block):
                return block(state, *streams, temb), None

            stacked = jax.tree.map(lambda *layers: jnp.stack(layers), *states)
            (image, text), _ = jax.lax.scan(layer, (image, text), stacked)
        return image, text

    def _block(self, graphdef: nnx.GraphDef):
        """One block as a pure function of (state, image, text, temb), rematerialised as configured."""

        def apply(state, image, text, temb):
            image, text = nnx.merge(graphdef, state)(split_rows(image), split_rows(text), temb)
            return split_rows(image), text if text is None else split_rows(text)

        return rematerialised(apply, self.execution.remat)


def sincos_table(size: int, dim: int, base_size: int) -> np.ndarray:
    """One axis of diffusers' `get_2d_sincos_pos_embed`: (size, dim) float32.

    Positions are scaled so that `size` patches span `base_size`; computed in float64.
    """
    position = np.arange(size, dtype=np.float32) / (size / base_size)
    frequency = 1.0 / 10000 ** (np.arange(dim // 2, dtype=np.float64) / (dim / 2.0))
    angle = position.astype(np.float64)[:, None] * frequency[None]
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=-1).astype(np.float32)


def timestep_sinusoids(timestep: AnyArray, dim: int) -> jax.Array:
    """diffusers' `Timesteps(dim, flip_sin_to_cos=True, downscale_freq_shift=0)`: (B,) -> (B, dim) float32."""
    half = dim // 2
    frequency = jnp.exp(-math.log(10000) * jnp.arange(half, dtype=jnp.float32) / half)
    angle = timestep.astype(jnp.float32)[:, None] * frequency[None]
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
