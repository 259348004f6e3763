"""Joint attention of SD3's MMDiT, with diffusers' attribute names."""

import jax
import jax.numpy as jnp
from flax import nnx

from dinalrm_jax.layers import Linear, RMSNorm


class Attention(nnx.Module):
    """Multi-head self-attention over image tokens, or jointly over image and text tokens.

    diffusers' `Attention` with `JointAttnProcessor2_0`: image and text have projections of their
    own and attend over the concatenation of both, image tokens first.

    Args:
        dim, heads: token width and number of heads.
        joint: project text tokens too (`attn`); otherwise image only (`attn2`).
        context_pre_only: text is attended to but not updated (the transformer's last block).
        qk_norm: RMSNorm queries and keys per head, eps 1e-6.
        implementation: of `jax.nn.dot_product_attention`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        joint: bool,
        context_pre_only: bool = False,
        qk_norm: bool,
        implementation: str,
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

    def __call__(self, image: jax.Array, text: jax.Array | None = None) -> tuple[jax.Array, jax.Array | None]:
        """(B, Nv, D) and, where joint, (B, Nt, D) -> the updates of both (None for an unused text)."""
        query = self._heads(self.to_q(image), self.norm_q)
        key = self._heads(self.to_k(image), self.norm_k)
        value = self._heads(self.to_v(image), None)
        if self.joint:
            query = jnp.concatenate([query, self._heads(self.add_q_proj(text), self.norm_added_q)], axis=1)
            key = jnp.concatenate([key, self._heads(self.add_k_proj(text), self.norm_added_k)], axis=1)
            value = jnp.concatenate([value, self._heads(self.add_v_proj(text), None)], axis=1)
        out = jax.nn.dot_product_attention(query, key, value, implementation=self.implementation)
        out = out.reshape(*out.shape[:2], -1)
        if not self.joint:
            return self.to_out[0](out), None
        image_out, text_out = out[:, : image.shape[1]], out[:, image.shape[1] :]
        return self.to_out[0](image_out), None if self.to_add_out is None else self.to_add_out(text_out)

    def _heads(self, x: jax.Array, norm: RMSNorm | None) -> jax.Array:
        x = x.reshape(*x.shape[:2], self.heads, -1)
        return x if norm is None else norm(x)
