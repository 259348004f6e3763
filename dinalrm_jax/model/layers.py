"""The leaf layers, with PyTorch's parameter names and layouts.

Parameters are stored in float32 or in the compute dtype; a layer computes in the dtype of its
input, so one cast at the model's entry decides the compute dtype of everything behind it.
"""

import functools

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

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rngs: nnx.Rngs,
        kernel_init: Initializer | None = None,
        use_bias: bool = True,
    ):
        if kernel_init is None:
            weight_init = bias_init = _uniform(in_features**-0.5)
        else:
            weight_init, bias_init = kernel_init, jax.nn.initializers.zeros
        self.weight = nnx.Param(weight_init(rngs.params(), (out_features, in_features), jnp.float32))
        self.bias = nnx.Param(bias_init(rngs.params(), (out_features,), jnp.float32)) if use_bias else None
        self.lora_A: nnx.LoRAParam | None = nnx.data(None)  # (rank, in_features), attached by dinalrm_jax.model.lora
        self.lora_B: nnx.LoRAParam | None = nnx.data(None)  # (out_features, rank)
        self.lora_scale = 0.0

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., in_features) -> (..., out_features), in x's dtype."""
        y = _project(x, self.weight[...])
        if self.lora_A is not None:
            y += self.lora_scale * _project(_project(x, self.lora_A[...]), self.lora_B[...])
        return y if self.bias is None else add_vector(y, self.bias[...])


class Embedding(nnx.Module):
    """A table of vectors; `weight` is (entries, dim)."""

    def __init__(self, entries: int, dim: int, *, rngs: nnx.Rngs):
        self.weight = nnx.Param(0.02 * jax.random.normal(rngs.params(), (entries, dim), jnp.float32))

    def __call__(self, indices: jax.Array) -> jax.Array:
        """(...) integers -> (..., dim)."""
        return self.weight[...][indices]


class Conv2d(nnx.Module):
    """A 2-D convolution of channels-last images; `weight` is PyTorch's (out, in, k, k).

    `padding` is ((top, bottom), (left, right)).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        stride: int = 1,
        padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0)),
        use_bias: bool = True,
        rngs: nnx.Rngs,
    ):
        init = _uniform((in_channels * kernel**2) ** -0.5)
        self.weight = nnx.Param(init(rngs.params(), (out_channels, in_channels, kernel, kernel)))
        self.bias = nnx.Param(init(rngs.params(), (out_channels,))) if use_bias else None
        self.stride, self.padding = stride, padding

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, in_channels) -> (B, H', W', out_channels), in x's dtype."""
        y = lax.conv_general_dilated(
            x,
            self.weight[...].astype(x.dtype),
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "OIHW", "NHWC"),
        )
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """LayerNorm over the last axis with learned scale and shift; statistics in float32."""

    def __init__(self, dim: int, *, eps: float):
        self.weight = nnx.Param(jnp.ones((dim,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((dim,), jnp.float32))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = layer_norm(x.astype(jnp.float32), self.eps)
        return (x32 * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class GroupNorm(nnx.Module):
    """Normalisation of channels-last images over space and each of `groups` runs of channels; in float32."""

    def __init__(self, groups: int, channels: int, *, eps: float):
        self.weight = nnx.Param(jnp.ones((channels,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.groups, self.eps = groups, eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32).reshape(len(x), -1, self.groups, x.shape[-1] // self.groups)
        x32 = x32 - jnp.mean(x32, axis=(1, 3), keepdims=True)
        x32 = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), axis=(1, 3), keepdims=True) + self.eps)
        x32 = x32.reshape(x.shape) * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return x32.astype(x.dtype)


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


def contract(spec: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """`einsum(spec, x, weight)` in x's dtype, whose gradient for a weight is in the weight's own.

    A trainable weight is float32 where the computation is bfloat16. JAX alone would round its gradient to bfloat16
    before it is summed over micro-batches and devices. (No forward-mode differentiation then.)
    """
    return jnp.einsum(spec, x, weight) if weight.dtype == x.dtype else _contract(spec, x, weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _contract(spec, x, weight):
    return jnp.einsum(spec, x, weight.astype(x.dtype))


def _contract_forward(spec, x, weight):
    return _contract(spec, x, weight), (x, weight)


def _contract_backward(spec, saved, gradient):
    x, weight = saved
    inputs, out = spec.split("->")
    of_x, of_weight = inputs.split(",")
    by_x = jnp.einsum(f"{out},{of_weight}->{of_x}", gradient, weight.astype(x.dtype))
    by_weight = jnp.einsum(f"{out},{of_x}->{of_weight}", gradient, x, preferred_element_type=weight.dtype)
    return by_x, by_weight


_contract.defvjp(_contract_forward, _contract_backward)


def add_vector(x: jax.Array, vector: jax.Array) -> jax.Array:
    """`x + vector` in x's dtype, with the vector's gradient summed in its own."""
    return (x.astype(jnp.promote_types(x.dtype, vector.dtype)) + vector).astype(x.dtype)


def _project(x: jax.Array, weight: jax.Array) -> jax.Array:
    if weight.dtype == x.dtype:
        return lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())))
    rows = "abcd"[: x.ndim - 1]
    return contract(f"{rows}i,oi->{rows}o", x, weight)


def _uniform(bound: float) -> Initializer:
    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
