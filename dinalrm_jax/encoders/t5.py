"""The T5 v1.1 encoder (transformers' `T5EncoderModel`) in Flax NNX."""

import dataclasses
import math
from typing import Literal

import jax
import numpy as np
from flax import nnx

from dinalrm_jax.model.layers import Embedding, Linear, RMSNorm


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Fields of transformers' `T5Config` for a gated-GELU encoder; the defaults are T5-XXL v1.1."""

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: Literal["gated-gelu"] = "gated-gelu"


class T5Encoder(nnx.Module):
    """Bidirectional encoder with relative position biases, without an attention mask, as SD3 runs it."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.shared = Embedding(config.vocab_size, config.d_model, rngs=rngs)
        self.encoder = T5Stack(config, rngs=rngs)

    def __call__(self, input_ids: jax.Array, dtype: str) -> jax.Array:
        """(B, T) int32 -> (B, T, d_model) in the compute dtype `dtype`."""
        return self.encoder(self.shared(input_ids).astype(dtype))


class T5Stack(nnx.Module):
    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.config = config
        self.block = nnx.List(T5Block(config, has_bias=i == 0, rngs=rngs) for i in range(config.num_layers))
        self.final_layer_norm = RMSNorm(config.d_model, eps=config.layer_norm_epsilon)

    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        buckets = relative_position_buckets(
            x.shape[1], config.relative_attention_num_buckets, config.relative_attention_max_distance
        )
        # The first block's table serves all blocks: (T, T, heads) -> (1, heads, T, T).
        table = self.block[0].layer[0].SelfAttention.relative_attention_bias  # type: ignore[attr-defined]
        bias = table(buckets).transpose(2, 0, 1)[None].astype(x.dtype)
        for block in self.block:
            x = block(x, bias)
        return self.final_layer_norm(x)


class T5Block(nnx.Module):
    def __init__(self, config: T5Config, *, has_bias: bool, rngs: nnx.Rngs):
        self.layer = nnx.List(
            [T5LayerSelfAttention(config, has_bias=has_bias, rngs=rngs), T5LayerFF(config, rngs=rngs)]
        )

    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        attention, feed_forward = self.layer
        return feed_forward(attention(x, bias))


class T5LayerSelfAttention(nnx.Module):
    def __init__(self, config: T5Config, *, has_bias: bool, rngs: nnx.Rngs):
        self.layer_norm = RMSNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.SelfAttention = T5Attention(config, has_bias=has_bias, rngs=rngs)

    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        return x + self.SelfAttention(self.layer_norm(x), bias)


class T5Attention(nnx.Module):
    def __init__(self, config: T5Config, *, has_bias: bool, rngs: nnx.Rngs):
        self.heads = config.num_heads
        inner = config.num_heads * config.d_kv
        self.q = Linear(config.d_model, inner, use_bias=False, rngs=rngs)
        self.k = Linear(config.d_model, inner, use_bias=False, rngs=rngs)
        self.v = Linear(config.d_model, inner, use_bias=False, rngs=rngs)
        self.o = Linear(inner, config.d_model, use_bias=False, rngs=rngs)
        self.relative_attention_bias = (
            Embedding(config.relative_attention_num_buckets, config.num_heads, rngs=rngs) if has_bias else None
        )

    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        query, key, value = (project(x).reshape(*x.shape[:2], self.heads, -1) for project in (self.q, self.k, self.v))
        # T5 folds the usual 1/sqrt(d) into its weights.
        out = jax.nn.dot_product_attention(query, key, value, bias=bias, scale=1.0)
        return self.o(out.reshape(*x.shape[:2], -1))


class T5LayerFF(nnx.Module):
    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.layer_norm = RMSNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.DenseReluDense = T5GatedFeedForward(config, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.DenseReluDense(self.layer_norm(x))


class T5GatedFeedForward(nnx.Module):
    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.wi_0 = Linear(config.d_model, config.d_ff, use_bias=False, rngs=rngs)
        self.wi_1 = Linear(config.d_model, config.d_ff, use_bias=False, rngs=rngs)
        self.wo = Linear(config.d_ff, config.d_model, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.wo(jax.nn.gelu(self.wi_0(x), approximate=True) * self.wi_1(x))


def relative_position_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """T5's bidirectional buckets of `key - query`: (length, length) in [0, num_buckets).

    Half of the buckets are for keys behind the query. Of each half, one half holds exact distances,
    the other logarithmically wider ranges up to `max_distance` (transformers' `_relative_position_bucket`).
    """
    position = np.arange(length)
    relative = position[None, :] - position[:, None]
    half = num_buckets // 2
    exact = half // 2
    distance = np.abs(relative)
    # In float32, as transformers computes it: the buckets' edges depend on it.
    log_ratio = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / np.float32(math.log(max_distance / exact))
    far = exact + (log_ratio.astype(np.float32) * (half - exact)).astype(np.int64)
    return np.where(relative > 0, half, 0) + np.where(distance < exact, distance, np.minimum(far, half - 1))
