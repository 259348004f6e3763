"""Tuning a generator against a reward: one algorithm a file; here their losses, pure functions of arrays."""

from dinalrm_jax.alignment.dpo import dpo_loss
from dinalrm_jax.alignment.flow_grpo import guarded_policy_loss, policy_loss
from dinalrm_jax.alignment.lpo import lpo_loss, lpo_pairs, lpo_threshold
from dinalrm_jax.alignment.nft import nft_loss, nft_weight
from dinalrm_jax.alignment.rewards import group_advantages

__all__ = [
    "dpo_loss",
    "group_advantages",
    "guarded_policy_loss",
    "lpo_loss",
    "lpo_pairs",
    "lpo_threshold",
    "nft_loss",
    "nft_weight",
    "policy_loss",
]
