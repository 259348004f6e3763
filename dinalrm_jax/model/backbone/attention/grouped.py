"""A few heads at a time, whose logits fit a CPU's cache."""

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dinalrm_jax.model.backbone.attention.per_device import SAVED

# Of 2, 4 and 8, the fastest forward pass and about the fastest backward pass (`python -m benchmarks.attention`).
GROUP = 4


@jax.custom_vjp
def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """See `backbone.attention`."""
    return _forward(query, key, value)[0]


def _forward(query, key, value):
    def group(heads):
        query, key, value = heads
        logits = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32)
        largest = logits.max(axis=-1, keepdims=True)
        weights = jnp.exp(logits - largest)
        total = weights.sum(axis=-1, keepdims=True)
        out = jnp.einsum("bhqk,bhkd->bhqd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
        return (out / total).astype(value.dtype), (largest + jnp.log(total))[..., 0]

    out, log_total = _each(group, (_groups(_scaled(query)), _groups(key), _groups(value)))
    out, log_total = checkpoint_name(_side_by_side(out), SAVED), checkpoint_name(log_total, SAVED)
    return out, (query, key, value, out, log_total)


def _backward(saved, gradient):
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


attend.defvjp(_forward, _backward)


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
