"""The leaf layers, with PyTorch's parameter names and layouts.

Parameters are stored in float32 or in the compute dtype; a layer computes in the dtype of its
input, so one cast at the model's entry decides the compute dtype of everything behind it.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

Initializer = jax.nn.initializers.Initializer


class Linear(nnx.Module):
    """`y = x W^T + b`, with an optional low-rank adapter: `y += scale (x A^T) B^T`.

    `weight` is (out_features, in_features), PyTorch's order: a checkpoint's array is used as it
    is, and contracting both minor dimensions is the fastest GEMM layout on CPU.

    Without `kernel_init` the weights are drawn as `torch.nn.Linear` draws them,
    U(-1/sqrt(in), 1/sqrt(in)) for weight and bias, so that training starts where the released
    code starts.
    """

    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs, kernel_init: Initializer | None = None):
        if kernel_init is None:
            weight_init = bias_init = _uniform(in_features**-0.5)
        else:
            weight_init, bias_init = kernel_init, jax.nn.initializers.zeros
        self.weight = nnx.Param(weight_init(rngs.params(), (out_features, in_features), jnp.float32))
        self.bias = nnx.Param(bias_init(rngs.params(), (out_features,), jnp.float32))
        self.lora_A = nnx.data(None)  # (rank, in_features), attached by dinalrm_jax.lora
        self.lora_B = nnx.data(None)  # (out_features, rank)
        self.lora_scale = 0.0

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., in_features) -> (..., out_features), in x's dtype."""
        y = _project(x, self.weight[...])
        if self.lora_A is not None:
            y += self.lora_scale * _project(_project(x, self.lora_A[...]), self.lora_B[...])
        return y + self.bias[...].astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last axis; statistics in float32."""

    def __init__(self, dim: int, *, eps: float):
        self.weight = nnx.Param(jnp.ones((dim,), jnp.float32))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (x32 * self.weight[...].astype(jnp.float32)).astype(x.dtype)


def layer_norm(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """LayerNorm over the last axis without learned scale or shift; statistics in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    return (x32 * lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)).astype(x.dtype)


def _project(x: jax.Array, weight: jax.Array) -> jax.Array:
    return lax.dot_general(x, weight.astype(x.dtype), (((x.ndim - 1,), (1,)), ((), ())))


def _uniform(bound: float) -> Initializer:
    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
