"""LoRA with PEFT's semantics.

An adapted projection computes `x W^T + b + (alpha / rank) (x A^T) B^T`, with A ~ N(0, 1/rank)
(standard deviation 1/rank: PEFT's "gaussian") and B = 0.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.layers import Linear


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters with PEFT's semantics: the update is `alpha / rank * B @ A`."""

    rank: int = 64
    alpha: float = 128.0

    def __post_init__(self):
        if self.rank < 1:
            raise ConfigError(f"a LoRA rank is at least 1, got {self.rank}; for a frozen backbone set lora to None")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def add_lora(projections: Iterable[Linear], config: LoRAConfig, *, rngs: nnx.Rngs) -> None:
    """Attaches an adapter to each projection, in place.

    Args:
        projections: see `Family.adapted`.
        config: rank and alpha.
        rngs: initialises A.
    """
    for linear in projections:
        out_features, in_features = linear.weight.shape
        key = rngs.params()
        linear.lora_A = nnx.LoRAParam(jax.random.normal(key, (config.rank, in_features)) / config.rank)
        linear.lora_B = nnx.LoRAParam(jnp.zeros((out_features, config.rank)))
        linear.lora_scale = config.scale


def init_adapters(shapes: Mapping[str, jax.ShapeDtypeStruct], config: LoRAConfig, seed: int) -> dict[str, np.ndarray]:
    """Adapters alone of a module that has them, as `add_lora` draws them: A normal with deviation 1 / rank, B zero.

    Args:
        shapes: `Functional.shapes`.
        config: rank and alpha.
        seed: of A; the draws of a name depend on nothing else.
    """
    drawn = {}
    for name, shape in shapes.items():
        if name.endswith(".lora_A"):
            bits = int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:8], "little")
            drawn[name] = np.random.default_rng(bits).standard_normal(shape.shape, np.float32) / config.rank
        elif name.endswith(".lora_B"):
            drawn[name] = np.zeros(shape.shape, np.float32)
    return drawn


def merge(params: dict[str, jax.Array], config: LoRAConfig) -> dict[str, jax.Array]:
    """Adds every adapter's update to its weight and drops the adapter.

    Args:
        params: named parameters of a model with adapters.
        config: of those adapters.

    Returns:
        The parameters of the same model without adapters; summed in float32, stored in each weight's dtype.
    """
    return {name: _updated(params, name, config.scale) for name in params if not name.endswith((".lora_A", ".lora_B"))}


def unmerge(params: dict[str, jax.Array], adapters: dict[str, jax.Array], config: LoRAConfig) -> dict[str, jax.Array]:
    """The inverse of `merge`: subtracts the updates of `adapters` from `params` and puts them back beside it."""
    both = {**params, **adapters}
    return {**{name: _updated(both, name, -config.scale) for name in params}, **adapters}


def _updated(params: dict[str, jax.Array], name: str, scale: float) -> jax.Array:
    weight, stem = params[name], name.removesuffix(".weight")
    if f"{stem}.lora_A" not in params:
        return weight
    lora_a, lora_b = params[f"{stem}.lora_A"], params[f"{stem}.lora_B"]
    update = jnp.dot(lora_b.astype(jnp.float32), lora_a.astype(jnp.float32), precision="highest")
    return (weight.astype(jnp.float32) + scale * update).astype(weight.dtype)
