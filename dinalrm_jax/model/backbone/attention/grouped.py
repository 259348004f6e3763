"""A few heads at a time, whose logits fit a CPU's cache."""

import math

import jax
from jax.ad_checkpoint import checkpoint_name

from dinalrm_jax.model.backbone.attention import tile
from dinalrm_jax.model.backbone.attention.per_device import SAVED

# Of 2, 4 and 8, the fastest forward pass and about the fastest backward pass (`python -m benchmarks.attention`).
GROUP = 4


@jax.custom_vjp
def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """See `backbone.attention`."""
    return _forward(query, key, value)[0]


def _forward(query, key, value):
    arrays = (_groups(tile.scaled(query)), _groups(key), _groups(value))
    out, log_total = _each(lambda heads: tile.forward(*heads), arrays)
    out, log_total = checkpoint_name(_side_by_side(out), SAVED), checkpoint_name(log_total, SAVED)
    return out, (query, key, value, out, log_total)


def _backward(saved, gradient):
    query, key, value, out, log_total = saved

    def group(heads):
        by_query, by_key, by_value = tile.backward(*heads)
        return by_query, by_key.astype(key.dtype), by_value.astype(value.dtype)

    arrays = [_groups(x) for x in (tile.scaled(query), key, value, gradient)]
    by_query, by_key, by_value = _each(group, (*arrays, log_total, _groups(tile.shared_term(gradient, out))))
    return tile.scaled(_side_by_side(by_query)), _side_by_side(by_key), _side_by_side(by_value)


attend.defvjp(_forward, _backward)


def _each(function, groups):
    """`function` of every group, one after another."""
    if len(groups[0]) > 1:
        return jax.lax.map(function, groups)
    return jax.tree.map(lambda x: x[None], function(jax.tree.map(lambda x: x[0], groups)))


def _groups(x: jax.Array) -> jax.Array:
    """(B, N, heads, d) -> (groups, B, heads of one, N, d)."""
    batch, tokens, heads, dim = x.shape
    size = math.gcd(heads, GROUP)
    return x.reshape(batch, tokens, heads // size, size, dim).transpose(2, 0, 3, 1, 4)


def _side_by_side(x: jax.Array) -> jax.Array:
    """The inverse of `_groups`."""
    groups, batch, size, tokens, dim = x.shape
    return x.transpose(1, 3, 0, 2, 4).reshape(batch, tokens, groups * size, dim)
