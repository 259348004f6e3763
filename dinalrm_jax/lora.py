"""LoRA with PEFT's semantics on the attention projections of an SD3 backbone.

An adapted projection computes `x W^T + b + (alpha / rank) (x A^T) B^T`, with A ~ N(0, 1/rank)
(standard deviation 1/rank: PEFT's "gaussian") and B = 0.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from dinalrm_jax.backbone.mmdit import JointTransformerBlock
from dinalrm_jax.backbone.sd3 import SD3Transformer
from dinalrm_jax.config import LoRAConfig
from dinalrm_jax.layers import Linear

IMAGE_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_TARGETS = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


def add_lora(backbone: SD3Transformer, config: LoRAConfig, *, adapt_last_text: bool, rngs: nnx.Rngs) -> None:
    """Attaches adapters to every attention projection of `backbone`, in place.

    Args:
        backbone: a truncated transformer.
        config: rank and alpha.
        adapt_last_text: see `RewardModelConfig.adapts_last_text`.
        rngs: initialises A.
    """
    last = len(backbone.transformer_blocks) - 1
    for index, block in enumerate(backbone.transformer_blocks):
        for linear in _targets(block, with_text=adapt_last_text or index < last):
            out_features, in_features = linear.weight.shape
            key = rngs.params()
            linear.lora_A = nnx.LoRAParam(jax.random.normal(key, (config.rank, in_features)) / config.rank)
            linear.lora_B = nnx.LoRAParam(jnp.zeros((out_features, config.rank)))
            linear.lora_scale = config.scale


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


def _targets(block: JointTransformerBlock, with_text: bool) -> list[Linear]:
    targets = [(block.attn, IMAGE_TARGETS)]
    if with_text:
        targets.append((block.attn, TEXT_TARGETS))
    if block.attn2 is not None:
        targets.append((block.attn2, IMAGE_TARGETS))
    projections = [
        attention.to_out[0] if name == "to_out.0" else getattr(attention, name)
        for attention, names in targets
        for name in names
    ]
    return [projection for projection in projections if projection is not None]
