"""Stable Diffusion 3 and 3.5: the MMDiT of arXiv 2403.03206, with dual attention in 3.5-Medium."""

from dinalrm_jax.mapping import to_mapping
from dinalrm_jax.model.backbone.family import DiffusersLayout, Family
from dinalrm_jax.model.backbone.sd3.adapters import adapted
from dinalrm_jax.model.backbone.sd3.config import SD3Config, read_config
from dinalrm_jax.model.backbone.sd3.sharding import RULES
from dinalrm_jax.model.backbone.sd3.transformer import SD3Transformer
from dinalrm_jax.model.backbone.sd3.weights import table, unused_by_truncation

FAMILY = Family(
    config=SD3Config,
    build=SD3Transformer,
    adapted=adapted,
    sharding=RULES,
    diffusers=DiffusersLayout("SD3Transformer2DModel", read_config, to_mapping, table, unused_by_truncation),
)
