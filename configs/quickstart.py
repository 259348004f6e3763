"""Watch a small DiNa-LRM learn to prefer better images, on a CPU, from nothing.

    python -m dinalrm_jax.train --config configs/quickstart.py

`configs/quickstart.py:ensemble` also trains the ensemble (docs/experiments.md), in about twice the time.

Draws captioned scenes, trains a tiny MMDiT on them as a flow-matching generator, freezes it, and
trains LoRA and head on preference pairs. Every scene that is evaluated combines a colour with a
shape that training never combined.
"""

from ml_collections import ConfigDict

from dinalrm_jax.config import TrainConfig
from dinalrm_jax.mapping import with_defaults


def values() -> dict:
    width, taps = 96, (1, 3, 5)
    return {
        "name": "quickstart",
        "seed": 0,
        "scenes": {"train_pairs": 12_000, "eval_pairs": 400, "image_size": 64, "seed": 0},
        "model": {
            "transformer": {
                "sample_size": 32,
                "num_layers": 6,
                "num_attention_heads": 4,
                "attention_head_dim": width // 4,
                "caption_projection_dim": width,
                "joint_attention_dim": 64,
                "pooled_projection_dim": 64,
                "pos_embed_max_size": 16,
                "dual_attention_layers": (0, 1, 2),
            },
            "num_blocks": 5,
            "visual_taps": taps,
            "text_taps": taps,
            "lora": {"rank": 16, "alpha": 32.0},
            "head": {"num_attn_heads": 4},
            "encoders": {"kind": "tiny", "text_length": 16},
        },
        "generator": {
            "steps": 500,
            "batch_size": 64,
            "optimizer": {"learning_rate": 2e-3, "warmup_steps": 50, "schedule": "cosine", "weight_decay": 0.0,
                          "ema_decay": 0.99},
            "checkpoint_every": 100,
        },
        "reward": {
            "steps": 1000,
            "batch_size": 32,
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 50, "schedule": "cosine", "ema_decay": 0.98},
            "checkpoint_every": 100,
            "evaluate_every": 200,
        },
        "loss": {"name": "fidelity", "variance": "calibrated", "k": 2.0, "sigma_0": 0.1},
    }  # fmt: skip


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "ensemble"):
        raise ValueError(f"this config knows the variant :ensemble, not :{variant}")
    if variant:
        term = {"count": 3, "weight": 0.5}
        return with_defaults(TrainConfig, values() | {"name": "quickstart_ensemble", "ensemble_term": term})
    return with_defaults(TrainConfig, values())
