"""Joint attention of SD3's MMDiT, with diffusers' attribute names."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from dinalrm_jax.devices.mesh import platform
from dinalrm_jax.model.layers import Linear, RMSNorm


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


def attend(
    query: Float[Array, "b n heads e"],
    key: Float[Array, "b n heads e"],
    value: Float[Array, "b n heads e"],
    implementation: str,
) -> Float[Array, "b n heads e"]:
    """`softmax(q k^T / sqrt(d)) v` over all tokens.

    Args:
        query, key, value: (B, N, heads, d).
        implementation: "xla" and "cudnn" of `jax.nn.dot_product_attention`, or "grouped": a few heads at a
            time, whose logits fit the CPU's cache, and nothing of their size kept for the backward pass (but
            no forward-mode differentiation). "auto" is "grouped" on CPUs and "xla" elsewhere.

    Returns:
        (B, N, heads, d), in the values' dtype.
    """
    if implementation == "auto":
        implementation = "grouped" if platform() == "cpu" else "xla"
    if implementation == "grouped":
        return _grouped(query, key, value)
    return jax.nn.dot_product_attention(query, key, value, implementation=implementation)  # type: ignore[call-overload]


# Of 2, 4 and 8, the fastest forward pass and about the fastest backward pass (`python -m benchmarks.attention`).
GROUP = 4


@jax.custom_vjp
def _grouped(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    return _grouped_forward(query, key, value)[0]


def _grouped_forward(query, key, value):
    def group(heads):
        query, key, value = heads
        logits = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32)
        largest = logits.max(axis=-1, keepdims=True)
        weights = jnp.exp(logits - largest)
        total = weights.sum(axis=-1, keepdims=True)
        out = jnp.einsum("bhqk,bhkd->bhqd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
        return (out / total).astype(value.dtype), (largest + jnp.log(total))[..., 0]

    out, log_total = _each(group, (_groups(_scaled(query)), _groups(key), _groups(value)))
    out = _side_by_side(out)
    return out, (query, key, value, out, log_total)


def _grouped_backward(saved, gradient):
    """FlashAttention's (arXiv 2205.14135, appendix B): the weights again from the logits and their log-sum-exp."""
    query, key, value, out, log_total = saved
    shared = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)

    def group(heads):
        query, key, value, gradient, log_total, shared = heads
        wide = {"preferred_element_type": jnp.float32}
        weights = jnp.exp(jnp.einsum("bhqd,bhkd->bhqk", query, key, **wide) - log_total[..., None])
        by_weights = jnp.einsum("bhqd,bhkd->bhqk", gradient, value, **wide)
        by_logits = (weights * (by_weights - shared)).astype(query.dtype)
        by_value = jnp.einsum("bhqk,bhqd->bhkd", weights.astype(gradient.dtype), gradient)
        by_query = jnp.einsum("bhqk,bhkd->bhqd", by_logits, key)
        return by_query, jnp.einsum("bhqk,bhqd->bhkd", by_logits, query), by_value

    arrays = [_groups(x) for x in (_scaled(query), key, value, gradient)]
    by_query, by_key, by_value = _each(group, (*arrays, log_total, _groups(shared)))
    return _scaled(_side_by_side(by_query)), _side_by_side(by_key), _side_by_side(by_value)


_grouped.defvjp(_grouped_forward, _grouped_backward)


def _each(function, groups):
    """`function` of every group, one after another."""
    if len(groups[0]) > 1:
        return jax.lax.map(function, groups)
    return jax.tree.map(lambda x: x[None], function(jax.tree.map(lambda x: x[0], groups)))


def _scaled(query: jax.Array) -> jax.Array:
    return query * query.shape[-1] ** -0.5


def _groups(x: jax.Array) -> jax.Array:
    """(B, N, heads, d) -> (groups, B, heads of one, N, d)."""
    batch, tokens, heads, dim = x.shape
    size = math.gcd(heads, GROUP)
    return x.reshape(batch, tokens, heads // size, size, dim).transpose(2, 0, 3, 1, 4)


def _side_by_side(x: jax.Array) -> jax.Array:
    """The inverse of `_groups`."""
    groups, batch, size, tokens, dim = x.shape
    return x.transpose(1, 3, 0, 2, 4).reshape(batch, tokens, groups * size, dim)
