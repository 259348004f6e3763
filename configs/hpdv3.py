"""DiNa-LRM on HPDv3, as the paper has it: SD3.5-Medium, 12 blocks, LoRA 64, calibrated Thurstone likelihood.

    python -m dinalrm_jax.preprocess --dataset hpdv3 --source HPDV3_DIR --output data/hpdv3 \\
        --base-model stabilityai/stable-diffusion-3.5-medium --max-rows-per-prompt 8
    python -m dinalrm_jax.train --config configs/hpdv3.py --config.data data/hpdv3

Data: about 0.8M pairs, so one epoch is 25,000 steps of 32 pairs. Records take 0.5 MB an image of
1024 x 1024 and 1.7 MB a prompt.
Hardware: 8 accelerators as configured (4 pairs each): by XLA's own count a step at 1024 x 1024 takes 12 to 13
GiB of a TPU v5e, v5p, v6e or an H100; `micro_batches` divides the activations, `--config.mesh.fsdp=8` weights and
optimizer (docs/measured.md). `--check-memory --for v5e:2x4` asks the compiler beforehand.
On more hosts: launch/slurm.sh, launch/tpu_pod.sh.
Time and accuracy: not measured here. The paper reports 75.04 % on HPDv3 at one level and 74.86 % for
the ensemble (paper).

    python -m dinalrm_jax.train --config configs/hpdv3.py:smoke

rehearses the very same path on two CPU cores in a minute and a half: a random, tiny pipeline in SD3's layout,
generated data in HPDv3's layout, preprocessing, training, report. `:sd3_medium` and `:sd35_large` train on the first
12 blocks of SD3.5-Medium's siblings instead (whose VAE, not measured here, must have made the records).
"""

from ml_collections import ConfigDict

from dinalrm_jax.config import TrainConfig
from dinalrm_jax.mapping import to_mapping, with_defaults
from dinalrm_jax.model.backbone.sd3.config import SD3Config

SIBLINGS = {
    "sd3_medium": ("stabilityai/stable-diffusion-3-medium-diffusers", SD3Config.sd3_medium()),
    "sd35_large": ("stabilityai/stable-diffusion-3.5-large", SD3Config.sd35_large()),
}


def get_config(variant: str = "") -> ConfigDict:
    values = {
        "name": "hpdv3",
        "base_model": "stabilityai/stable-diffusion-3.5-medium",
        "data": "data/hpdv3",
        "model": {},  # the published one
        "reward": {
            "steps": 25_000,
            "batch_size": 32,
            "optimizer": {
                "learning_rate": 5e-5, "weight_decay": 0.01, "warmup_steps": 1000, "schedule": "constant",
                "max_grad_norm": 1.0, "ema_decay": 0.995,
            },
            "checkpoint_every": 1000,
            "evaluate_every": 1000,
        },
        "loss": {"name": "fidelity", "variance": "calibrated", "k": 2.0, "sigma_0": 0.1},
        "execution": {"dtype": "bfloat16", "layers": "scan", "remat": "block"},
        "evaluation": {"sigma": 0.4, "levels": (0.3, 0.4, 0.5), "max_pairs": 1000},
    }  # fmt: skip
    if variant == "smoke":
        values = smoke(values)
    elif variant in SIBLINGS:
        base_model, transformer = SIBLINGS[variant]
        values |= {"name": f"hpdv3_{variant}", "base_model": base_model}
        values["model"] = {"transformer": to_mapping(transformer)}
    elif variant:
        raise ValueError(f"this config knows the variants :smoke, :{', :'.join(SIBLINGS)}, not :{variant}")
    return with_defaults(TrainConfig, values)


def smoke(values: dict) -> dict:
    """The same experiment on tiny random weights and generated data; most of its time is compilation."""
    from dinalrm_jax.scenes import rehearsal

    small = {key: value for key, value in values.items() if key not in ("base_model", "data")}
    optimizer = values["reward"]["optimizer"] | {"learning_rate": 1e-3, "warmup_steps": 10}
    stage = {"steps": 60, "batch_size": 4, "checkpoint_every": 20, "log_every": 10, "evaluate_every": 30}
    return small | {
        "name": f"{values['name']}_smoke",
        "model": values.get("model", {}) | {
            "transformer": to_mapping(rehearsal.TRANSFORMER),
            "num_blocks": 2, "visual_taps": (1, 2), "text_taps": (1, 2), "head": {"num_attn_heads": 4},
        },
        "reward": values["reward"] | stage | {"optimizer": optimizer},
        "evaluation": values["evaluation"] | {"batch_size": 4},
        "rehearsal": {
            "train_pairs": 48,
            "eval_pairs": 12,
            "preparation": {
                "dataset": "hpdv3", "buckets": ("64x64", "96x64"), "min_area": 1024, "images_per_shard": 16,
                "prompts_per_shard": 16,
            },
        },
    }  # fmt: skip
