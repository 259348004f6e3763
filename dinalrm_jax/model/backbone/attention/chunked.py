"""A few queries at a time, in plain JAX: any platform and dtype, partitioned by XLA as it likes."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dinalrm_jax.model.backbone.attention import tile
from dinalrm_jax.model.backbone.attention.per_device import SAVED

# 24 heads of so many queries and 4,301 tokens (1024 pixels) are 0.1 GB of logits a row. Not tuned on a GPU yet.
QUERIES = 256


@jax.custom_vjp
def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """See `backbone.attention`."""
    return _forward(query, key, value)[0]


def _forward(query, key, value):
    keys, values = _by_head(key), _by_head(value)
    out, log_total = jax.lax.map(lambda queries: tile.forward(queries, keys, values), _chunks(tile.scaled(query)))
    out = checkpoint_name(_joined(out, query.shape[1]), SAVED)
    log_total = checkpoint_name(log_total, SAVED)
    return out, (query, key, value, out, log_total)


def _backward(saved, gradient):
    query, key, value, out, log_total = saved
    keys, values = _by_head(key), _by_head(value)

    def chunk(sums, arrays):
        queries, *others = arrays
        by_queries, by_keys, by_values = tile.backward(queries, keys, values, *others)
        return (sums[0] + by_keys, sums[1] + by_values), by_queries

    zeros = jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32)
    shared = tile.shared_term(gradient, out)
    arrays = (_chunks(tile.scaled(query)), _chunks(gradient), log_total, _chunks(shared))
    (by_keys, by_values), by_queries = jax.lax.scan(chunk, zeros, arrays)
    by_query = tile.scaled(_joined(by_queries, query.shape[1]))
    return by_query, _by_head(by_keys).astype(key.dtype), _by_head(by_values).astype(value.dtype)


attend.defvjp(_forward, _backward)


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
