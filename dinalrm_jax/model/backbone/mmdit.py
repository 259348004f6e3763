"""The MMDiT block of Stable Diffusion 3 (arXiv 2403.03206) and 3.5 (MMDiT-X: dual attention).

Attribute names are diffusers' (`JointTransformerBlock`), so a parameter's path is its name in a
diffusers checkpoint.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from dinalrm_jax.model.backbone.attention import attend
from dinalrm_jax.model.execution import AttentionImplementation
from dinalrm_jax.model.layers import Linear, RMSNorm, layer_norm

ZEROS = jax.nn.initializers.zeros


class AdaLayerNorm(nnx.Module):
    """Chunks of shift, scale and gate computed from the conditioning embedding.

    With `zero_init` (DiT's adaLN-Zero) a block starts as the identity, which is how to train one from
    nothing; without it the modulation is random, as in a freshly built diffusers model.
    """

    def __init__(self, dim: int, chunks: int, *, zero_init: bool, rngs: nnx.Rngs):
        self.chunks = chunks
        self.linear = Linear(dim, chunks * dim, rngs=rngs, kernel_init=ZEROS if zero_init else None)

    def __call__(self, temb: jax.Array) -> list[jax.Array]:
        """(B, D) -> `chunks` arrays (B, 1, D), in diffusers' order."""
        return jnp.split(self.linear(jax.nn.silu(temb))[:, None], self.chunks, axis=-1)


class FeedForward(nnx.Module):
    """D -> 4D -> D with tanh-approximate GELU; `net.0.proj` and `net.2` as in diffusers."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.net = nnx.List([_Projection(dim, 4 * dim, rngs=rngs), None, Linear(4 * dim, dim, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.net[2](jax.nn.gelu(self.net[0].proj(x), approximate=True))  # type: ignore[attr-defined]


class _Projection(nnx.Module):
    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs):
        self.proj = Linear(in_features, out_features, rngs=rngs)


class Attention(nnx.Module):
    """Multi-head self-attention over image tokens, or jointly over image and text tokens.

    diffusers' `Attention` with `JointAttnProcessor2_0`: image and text have projections of their
    own and attend over the concatenation of both, image tokens first.

    Args:
        dim, heads: token width and number of heads.
        joint: project text tokens too (`attn`); otherwise image only (`attn2`).
        context_pre_only: text is attended to but not updated (the transformer's last block).
        qk_norm: RMSNorm queries and keys per head, eps 1e-6.
        implementation: see `attend`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        joint: bool,
        context_pre_only: bool = False,
        qk_norm: bool,
        implementation: AttentionImplementation,
        rngs: nnx.Rngs,
    ):
        self.heads = heads
        self.implementation = implementation
        self.to_q = Linear(dim, dim, rngs=rngs)
        self.to_k = Linear(dim, dim, rngs=rngs)
        self.to_v = Linear(dim, dim, rngs=rngs)
        self.to_out = nnx.List([Linear(dim, dim, rngs=rngs)])
        self.norm_q, self.norm_k = self._norms(dim, qk_norm)
        self.joint = joint
        if joint:
            self.add_q_proj = Linear(dim, dim, rngs=rngs)
            self.add_k_proj = Linear(dim, dim, rngs=rngs)
            self.add_v_proj = Linear(dim, dim, rngs=rngs)
            self.norm_added_q, self.norm_added_k = self._norms(dim, qk_norm)
            self.to_add_out = None if context_pre_only else Linear(dim, dim, rngs=rngs)

    def _norms(self, dim: int, qk_norm: bool) -> tuple[RMSNorm | None, RMSNorm | None]:
        if not qk_norm:
            return None, None
        return RMSNorm(dim // self.heads, eps=1e-6), RMSNorm(dim // self.heads, eps=1e-6)

    def __call__(
        self, image: Float[Array, "b n d"], text: Float[Array, "b t d"] | None = None
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b t d"] | None]:
        """(B, Nv, D) and, where joint, (B, Nt, D) -> the updates of both (None for an unused text)."""
        query = self._heads(self.to_q(image), self.norm_q)
        key = self._heads(self.to_k(image), self.norm_k)
        value = self._heads(self.to_v(image), None)
        if self.joint:
            query = jnp.concatenate([query, self._heads(self.add_q_proj(text), self.norm_added_q)], axis=1)
            key = jnp.concatenate([key, self._heads(self.add_k_proj(text), self.norm_added_k)], axis=1)
            value = jnp.concatenate([value, self._heads(self.add_v_proj(text), None)], axis=1)
        out = attend(query, key, value, self.implementation)
        out = out.reshape(*out.shape[:2], -1)
        if not self.joint:
            return self.to_out[0](out), None
        image_out, text_out = out[:, : image.shape[1]], out[:, image.shape[1] :]
        return self.to_out[0](image_out), None if self.to_add_out is None else self.to_add_out(text_out)

    def _heads(self, x: jax.Array, norm: RMSNorm | None) -> jax.Array:
        x = x.reshape(*x.shape[:2], self.heads, -1)
        return x if norm is None else norm(x)


class JointTransformerBlock(nnx.Module):
    """One MMDiT block over an image and a text stream.

    Args:
        dim, heads: width and number of heads.
        dual_attention: add an image-only self-attention with its own modulation (9 chunks, not 6).
        context_pre_only: the text stream ends here (only read by the joint attention).
        qk_norm, attention: see `Attention`.
        zero_init: see `AdaLayerNorm`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        dual_attention: bool,
        context_pre_only: bool,
        qk_norm: bool,
        attention: AttentionImplementation,
        zero_init: bool,
        rngs: nnx.Rngs,
    ):
        self.dual_attention = dual_attention
        self.context_pre_only = context_pre_only
        make_attention = functools.partial(Attention, dim, heads, qk_norm=qk_norm, implementation=attention, rngs=rngs)
        self.norm1 = AdaLayerNorm(dim, 9 if dual_attention else 6, zero_init=zero_init, rngs=rngs)
        self.norm1_context = AdaLayerNorm(dim, 2 if context_pre_only else 6, zero_init=zero_init, rngs=rngs)
        self.attn = make_attention(joint=True, context_pre_only=context_pre_only)
        self.attn2 = make_attention(joint=False) if dual_attention else None
        self.ff = FeedForward(dim, rngs=rngs)
        self.ff_context = None if context_pre_only else FeedForward(dim, rngs=rngs)

    def __call__(
        self, image: Float[Array, "b n d"], text: Float[Array, "b t d"], temb: Float[Array, "b d"]
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b t d"] | None]:
        """(B, Nv, D), (B, Nt, D), (B, D) -> both streams updated; text None after context_pre_only."""
        normed = layer_norm(image)
        shift, scale, gate, shift_ff, scale_ff, gate_ff, *dual = self.norm1(temb)
        if self.context_pre_only:
            # AdaLayerNormContinuous: scale comes first here.
            text_scale, text_shift = self.norm1_context(temb)
        else:
            text_shift, text_scale, text_gate, text_shift_ff, text_scale_ff, text_gate_ff = self.norm1_context(temb)

        image_update, text_update = self.attn(
            _modulate(normed, shift, scale), _modulate(layer_norm(text), text_shift, text_scale)
        )
        image = image + gate * image_update
        if self.dual_attention:
            shift2, scale2, gate2 = dual
            image_update, _ = self.attn2(_modulate(normed, shift2, scale2))
            image = image + gate2 * image_update
        image = image + gate_ff * self.ff(_modulate(layer_norm(image), shift_ff, scale_ff))
        if self.context_pre_only:
            return image, None

        text = text + text_gate * text_update
        text = text + text_gate_ff * self.ff_context(_modulate(layer_norm(text), text_shift_ff, text_scale_ff))
        return image, text


def _modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    return x * (1 + scale) + shift
