"""A few queries at a time, in plain JAX: any platform and dtype, partitioned by XLA as it likes."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dinalrm_jax.model.backbone.attention.per_device import SAVED

QUERIES = 256


@jax.custom_vjp
def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """See `backbone.attention`."""
    return _forward(query, key, value)[0]


def _forward(query, key, value):
    keys, values = _by_head(key), _by_head(value)

    def chunk(queries):
        logits = jnp.einsum("bhqd,bhkd->bhqk", queries, keys, preferred_element_type=jnp.float32)
        largest = logits.max(axis=-1, keepdims=True)
        weights = jnp.exp(logits - largest)
        total = weights.sum(axis=-1, keepdims=True)
        out = jnp.einsum("bhqk,bhkd->bhqd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
        return (out / total).astype(values.dtype), (largest + jnp.log(total))[..., 0]

    out, log_total = jax.lax.map(chunk, _chunks(_scaled(query)))
    out = checkpoint_name(_joined(out, query.shape[1]), SAVED)
    log_total = checkpoint_name(log_total, SAVED)
    return out, (query, key, value, out, log_total)


def _backward(saved, gradient):
    """FlashAttention's (arXiv 2205.14135, appendix B): the weights again from the logits and their log-sum-exp."""
    query, key, value, out, log_total = saved
    keys, values = _by_head(key), _by_head(value)
    shared = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    wide = {"preferred_element_type": jnp.float32}

    def chunk(sums, arrays):
        by_keys, by_values = sums
        queries, gradients, log_total, shared = arrays
        weights = jnp.exp(jnp.einsum("bhqd,bhkd->bhqk", queries, keys, **wide) - log_total[..., None])
        by_weights = jnp.einsum("bhqd,bhkd->bhqk", gradients, values, **wide)
        by_logits = (weights * (by_weights - shared)).astype(query.dtype)
        by_values += jnp.einsum("bhqk,bhqd->bhkd", weights.astype(gradients.dtype), gradients, **wide)
        by_keys += jnp.einsum("bhqk,bhqd->bhkd", by_logits, queries, **wide)
        return (by_keys, by_values), jnp.einsum("bhqk,bhkd->bhqd", by_logits, keys)

    zeros = jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32)
    arrays = (_chunks(_scaled(query)), _chunks(gradient), log_total, _chunks(shared))
    (by_keys, by_values), by_queries = jax.lax.scan(chunk, zeros, arrays)
    by_query = _scaled(_joined(by_queries, query.shape[1]))
    return by_query, _by_head(by_keys).astype(key.dtype), _by_head(by_values).astype(value.dtype)


attend.defvjp(_forward, _backward)


def _scaled(query: jax.Array) -> jax.Array:
    return query * query.shape[-1] ** -0.5


def _by_head(x: jax.Array) -> jax.Array:
    """(B, N, heads, d) to (B, heads, N, d), and back."""
    return x.transpose(0, 2, 1, 3)


def _chunks(x: jax.Array) -> jax.Array:
    """(B, N, heads, d) -> (chunks, B, heads, queries of one, d), the last one filled up with zeros.

    (A query of zeros gives finite weights, and its gradient is zero.)
    """
    batch, tokens, heads, dim = x.shape
    size = min(QUERIES, tokens)
    x = jnp.pad(x, ((0, 0), (0, -tokens % size), (0, 0), (0, 0)))
    return x.reshape(batch, -1, size, heads, dim).transpose(1, 0, 3, 2, 4)


def _joined(x: jax.Array, tokens: int) -> jax.Array:
    """The inverse of `_chunks`."""
    chunks, batch, heads, size, dim = x.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(batch, chunks * size, heads, dim)[:, :tokens]
