"""JAX's Pallas kernel for TPUs ("splash attention"), with a row's heads beside those of all other rows."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from dinalrm_jax.model.backbone.attention.per_device import SAVED, per_device

# Tiles that fit a v5e's VMEM, forward and backward (tests compile them with libtpu); blocks of all keys do not.
QUERIES, KEYS, KEYS_AT_ONCE = 512, 1536, 512


def attend(query: jax.Array, key: jax.Array, value: jax.Array, *, interpret: bool = False) -> jax.Array:
    """See `backbone.attention`; `interpret` runs the kernel's steps one by one on a CPU, for tests."""
    return per_device(functools.partial(_rows, interpret=interpret))(query, key, value)


def _rows(query: jax.Array, key: jax.Array, value: jax.Array, interpret: bool) -> jax.Array:
    batch, tokens, heads, dim = query.shape
    keys = key.shape[1]
    block = min(KEYS, math.ceil(keys / KEYS_AT_ONCE) * KEYS_AT_ONCE)
    folded = [_folded(x, unit) for x, unit in ((query * dim**-0.5, QUERIES), (key, block), (value, block))]
    kernel = _kernel(batch * heads, folded[0].shape[1], folded[1].shape[1], keys, block, interpret)
    out = kernel(*folded).reshape(batch, heads, -1, dim)
    return out[:, :, :tokens].transpose(0, 2, 1, 3)


def _folded(x: jax.Array, unit: int) -> jax.Array:
    """(B, N, heads, d) -> (B heads, N and zeros up to a multiple of `unit`, d)."""
    batch, tokens, heads, dim = x.shape
    x = jnp.pad(x, ((0, 0), (0, -tokens % unit), (0, 0), (0, 0)))
    return x.transpose(0, 2, 1, 3).reshape(batch * heads, -1, dim)


def _kernel(heads: int, queries: int, padded: int, keys: int, block: int, interpret: bool):
    """A kernel for so many queries and (padded) keys."""
    sizes = kernels.BlockSizes(
        block_q=QUERIES, block_kv=block, block_kv_compute=KEYS_AT_ONCE,
        block_q_dkv=QUERIES, block_kv_dkv=block, block_kv_dkv_compute=KEYS_AT_ONCE,
        block_q_dq=QUERIES, block_kv_dq=block,
    )  # fmt: skip
    mask = masks.FullMask((queries, padded)) if padded == keys else _FirstKeys((queries, padded), keys)
    return kernels.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * heads), block_sizes=sizes, residual_checkpoint_name=SAVED, interpret=interpret
    )


class _FirstKeys(masks._ComputableMask):
    """Only the first `keys` keys are there; computed within the kernel, not read from memory."""

    def __init__(self, shape: tuple[int, int], keys: int):
        super().__init__(shape, lambda query, key: key < keys)
        self.keys = keys

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _FirstKeys) and (self.shape, self.keys) == (other.shape, other.keys)

    def __hash__(self) -> int:
        return hash((self.shape, self.keys))
