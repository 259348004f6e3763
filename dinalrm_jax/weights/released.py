"""The released checkpoint <-> ours: PEFT adapters, `rm_head.pt`, and the training config.

Layout: `config.json`, `checkpoint/backbone_lora/adapter_{config.json,model.safetensors}`,
`checkpoint/rm_head.pt`.
"""

from collections.abc import Mapping
from typing import Any

from dinalrm_jax.mapping import ConfigError, from_mapping, to_mapping
from dinalrm_jax.model.backbone.family import BackboneConfig
from dinalrm_jax.model.backbone.sd3 import SD3Config
from dinalrm_jax.model.backbone.sd3.adapters import peft_targets
from dinalrm_jax.model.config import HeadConfig, LoRAConfig, RewardModelConfig
from dinalrm_jax.model.tables import Row
from dinalrm_jax.preference import LossConfig

HEAD = (Row("{}", "head.{}"),)
LORA = (
    Row("base_model.model.{}.lora_A.weight", "backbone.{}.lora_A"),
    Row("base_model.model.{}.lora_B.weight", "backbone.{}.lora_B"),
)

# Keys of the released config that cannot change a score: of training (EMA), of the hub, or read by no code.
IGNORED = {"model_type", "backbone_model_id", "use_ema", "ema_decay", "use_t_embed"}
IGNORED_HEAD = {"patch_size", "cfg_scale"}


def model_config(released: Mapping[str, Any], transformer: BackboneConfig) -> RewardModelConfig:
    """The model that a released `config.json` describes.

    Args:
        released: the parsed file; only its `model` section is read.
        transformer: the base model's geometry.

    Raises:
        ConfigError: an unknown or missing key, or a value that the released layout cannot hold.
    """
    if "model" not in released:
        raise ConfigError("released config.json has no 'model' section: it is the config of another model")
    model = {key: value for key, value in released["model"].items() if key not in IGNORED}
    head = {key: value for key, value in model.pop("reward_head", {}).items() if key not in IGNORED_HEAD}
    if head.pop("out_dim", 1) != 1:
        raise ConfigError("released config: model.reward_head.out_dim must be 1, this model gives one score")
    if head.pop("dropout", 0.0) != 0.0:
        raise ConfigError("released config: model.reward_head.dropout must be 0, the head has no dropout")
    if model.pop("use_logistic", False):
        raise ConfigError("released config: model.use_logistic is set, but rm_head.pt does not hold eta3 and eta4")
    if not model.pop("use_text_features", True):
        raise ConfigError("released config: model.use_text_features is false, which this model does not have")
    width = head.pop("width", -1)
    frozen = model.pop("freeze_backbone", False)
    lora = model.pop("lora_config", None)
    use_lora = model.pop("use_lora", False) and not frozen
    if not use_lora and not frozen:
        raise ConfigError("released config: the whole backbone was trained (no LoRA, not frozen); not supported")
    if use_lora:
        unknown = (lora or {}).keys() - {"r", "lora_alpha", "init_lora_weights"}
        if lora is None or "r" not in lora or "lora_alpha" not in lora or unknown:
            raise ConfigError(
                f"released config: model.lora_config needs r and lora_alpha and knows init_lora_weights, got {lora}"
            )
    renamed = {"num_transformer_layers": "num_blocks", "visual_head_idx": "visual_taps", "text_head_idx": "text_taps"}
    unknown = model.keys() - renamed.keys()
    if unknown or renamed.keys() - model.keys():
        raise ConfigError(
            f"released config, section model: unknown keys {sorted(unknown)}, "
            f"missing keys {sorted(renamed.keys() - model.keys())}"
        )
    return from_mapping(
        RewardModelConfig,
        {
            **{renamed[key]: value for key, value in model.items()},
            "transformer": transformer,
            "lora": LoRAConfig(rank=lora["r"], alpha=float(lora["lora_alpha"])) if use_lora else None,
            "head": from_mapping(HeadConfig, {**head, "width": None if width == -1 else width}, "model.reward_head"),
        },
        "released config",
    )


# `model_type` of the released config, and the constants that its code has for it.
LIKELIHOODS = {
    "thurstone": LossConfig(sigma_0=0.05**0.5, epsilon=1e-6),
    "thurstone-constant": LossConfig(variance="constant", constant_variance=0.5, epsilon=1e-6),
    "bt": LossConfig(name="bradley_terry"),
    "bt-margin": LossConfig(name="bradley_terry", margin=1.0),
}


def likelihood(released: Mapping[str, Any]) -> LossConfig | None:
    """What a released model was trained with: by `model_type`, unless we exported it and said so.

    None for a `model_type` that the released code does not have.
    """
    if "likelihood" in released:
        return from_mapping(LossConfig, released["likelihood"], "config.json, likelihood")
    return LIKELIHOODS.get(released["model"].get("model_type"))


def released_config(config: RewardModelConfig, trained_with: LossConfig | None = None) -> dict[str, Any]:
    """The inverse of `model_config`: the `config.json` to write beside an exported checkpoint.

    Raises:
        ConfigError: a logistic model, whose eta3 and eta4 the released layout does not hold, or one
            without text taps, which the released code cannot build.
    """
    if not isinstance(config.transformer, SD3Config):
        raise ConfigError("only models on an SD3 backbone can be exported: the released code knows no other")
    if not isinstance(config.head, HeadConfig):
        raise ConfigError("only models with the Q-Former head can be exported: the released code knows no other")
    if not config.text_taps:
        raise ConfigError("a model without text taps cannot be exported: the released code needs at least one")
    if config.logistic:
        raise ConfigError("a logistic model cannot be exported: the released layout does not hold eta3 and eta4")
    lora = config.lora and {
        "r": config.lora.rank,
        "lora_alpha": config.lora.alpha,
        "init_lora_weights": "gaussian",
    }
    return {
        "model": {
            "model_type": next((name for name, one in LIKELIHOODS.items() if one == trained_with), "thurstone"),
            "backbone_model_id": "local",
            "num_transformer_layers": config.num_blocks,
            "freeze_backbone": config.lora is None,
            "use_lora": config.lora is not None,
            "use_text_features": True,
            "lora_config": lora,
            "use_logistic": False,
            "visual_head_idx": list(config.visual_taps),
            "text_head_idx": list(config.text_taps),
            "use_t_embed": True,
            "reward_head": {
                "use_proj_in": config.head.use_proj_in,
                "width": config.head.width or -1,
                "out_dim": 1,
                "num_queries": config.head.num_queries,
                "num_attn_heads": config.head.num_attn_heads,
                "dropout": 0.0,
            },
        },
        "training": {"add_noise": True},
        # Not the released code's, which has the constants of four likelihoods in its source and reads no such key.
        **({} if trained_with is None else {"likelihood": to_mapping(trained_with)}),
    }


def adapter_config(config: RewardModelConfig) -> dict[str, Any]:
    """PEFT's `adapter_config.json` for the exported adapters of a model that has them."""
    alpha = config.lora.alpha
    target, exclude = peft_targets(config.num_blocks, config.adapts_last_text)
    return {
        "peft_type": "LORA",
        "r": config.lora.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": "gaussian",
        "inference_mode": True,
        "target_modules": target,
        "exclude_modules": exclude,
        "use_dora": False,
        "use_rslora": False,
    }
