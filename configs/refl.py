"""ReFL on SD3.5-Medium with the latent reward, as the released recipe has it (docs/alignment.md).

    python -m dinalrm_jax.align --config configs/refl.py --config.prompts prompts.txt \\
        --config.reward.checkpoint path/to/DiNa-LRM-SD35M-12layers --workdir runs/refl

40 steps at 512 pixels with guidance 4.5, of which one of 30 to 39 trains; batches of 64; LoRA of rank 32. The recipe
has no regularisation and is easily hacked: watch the judges, and raise `reference_weight`, or give images to
`refl.pretraining`.

    python -m dinalrm_jax.train --config configs/hpdv3.py:smoke
    python -m dinalrm_jax.align --config configs/refl.py:smoke

run the whole path on random tiny weights in the real layout, in a few minutes.
"""

from ml_collections import ConfigDict

from dinalrm_jax.config import AlignConfig
from dinalrm_jax.mapping import with_defaults


def recipe() -> dict:
    return {
        "name": "refl",
        "base_model": "stabilityai/stable-diffusion-3.5-medium",
        "prompts": "prompts.txt",
        "reward": {"checkpoint": "path/to/DiNa-LRM-SD35M-12layers"},
        "refl": {},
        "tuning": {
            "steps": 1000,
            "batch_size": 64,
            "optimizer": {"learning_rate": 1e-4, "weight_decay": 1e-4, "warmup_steps": 0, "ema_decay": 0.0},
            "checkpoint_every": 100,
            "evaluate_every": 100,
            "log_every": 1,
        },
        "execution": {"dtype": "bfloat16", "layers": "scan", "remat": "block"},
    }


def smoke(values: dict, **changed: dict) -> dict:
    """Two steps of a recipe on what `train --config configs/hpdv3.py:smoke` left."""
    values = values | {
        "name": f"{values['name']}_smoke",
        "base_model": "runs/hpdv3_smoke/base_model",
        "reward": {"checkpoint": "runs/hpdv3_smoke/model"},
        "prompts": None,
        "scenes": {"count": 16},
        "tuning": values["tuning"] | {"steps": 2, "batch_size": 8, "checkpoint_every": 1, "evaluate_every": 2},
        "height": 64,
        "width": 64,
        "text_length": 16,
        "lora": {"rank": 4, "alpha": 8.0},
        "evaluation": {"prompts": 2, "steps": 2, "guidance": 1.0, "images": 2},
        "execution": {},
    }
    return values | changed


def get_config(variant: str = "") -> ConfigDict:
    values = recipe()
    if variant == "smoke":
        values = smoke(values, refl={"steps": 4, "first": 2, "last": 3})
    elif variant:
        raise ValueError(f"this config knows the variant :smoke, not :{variant}")
    return with_defaults(AlignConfig, values)
