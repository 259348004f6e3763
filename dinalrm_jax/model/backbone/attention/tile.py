"""Attention of a tile, so many heads and queries that their logits may be held: what "grouped" and "chunked" repeat."""

import jax
import jax.numpy as jnp

WIDE = {"preferred_element_type": jnp.float32}


def scaled(query: jax.Array) -> jax.Array:
    """Queries with the `1 / sqrt(d)` of the softmax; and its own derivative."""
    return query * query.shape[-1] ** -0.5


def shared_term(gradient: jax.Array, out: jax.Array) -> jax.Array:
    """(..., 1) what the softmax takes off the gradients of all of a query's weights (FlashAttention's D)."""
    return jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)


def forward(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`softmax(q k^T) v` of scaled queries.

    Args:
        query: (B, heads, Q, d); key, value: (B, heads, M, d).

    Returns:
        (B, heads, Q, d) in the values' dtype, and (B, heads, Q) the log-sum-exp of the logits in fp32.
    """
    logits = jnp.einsum("bhqd,bhkd->bhqk", query, key, **WIDE)
    largest = logits.max(axis=-1, keepdims=True)
    weights = jnp.exp(logits - largest)
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.einsum("bhqk,bhkd->bhqd", weights.astype(value.dtype), value, **WIDE)
    return (out / total).astype(value.dtype), (largest + jnp.log(total))[..., 0]


def backward(query, key, value, gradient, log_total, shared) -> tuple[jax.Array, jax.Array, jax.Array]:
    """FlashAttention's (arXiv 2205.14135, appendix B): the weights again from the logits and their log-sum-exp.

    Args:
        query, key, value: as for `forward`.
        gradient: (B, heads, Q, d) by the output.
        log_total: (B, heads, Q); shared: (B, heads, Q, 1), both in fp32.

    Returns:
        Gradients by the scaled query, in its dtype, and by the key and the value, in fp32: they are sums over queries.
    """
    weights = jnp.exp(jnp.einsum("bhqd,bhkd->bhqk", query, key, **WIDE) - log_total[..., None])
    by_weights = jnp.einsum("bhqd,bhkd->bhqk", gradient, value, **WIDE)
    by_logits = (weights * (by_weights - shared)).astype(query.dtype)
    by_query = jnp.einsum("bhqk,bhkd->bhqd", by_logits, key)
    by_key = jnp.einsum("bhqk,bhqd->bhkd", by_logits, query, **WIDE)
    by_value = jnp.einsum("bhqk,bhqd->bhkd", weights.astype(gradient.dtype), gradient, **WIDE)
    return by_query, by_key, by_value
