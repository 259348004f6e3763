"""ReFL on SD3.5-Medium with the latent reward, as the released recipe has it (docs/alignment.md).

    python -m dinalrm_jax.align --config configs/refl.py --config.prompts prompts.txt \\
        --config.reward.checkpoint path/to/DiNa-LRM-SD35M-12layers --workdir runs/refl

40 steps at 512 pixels with guidance 4.5, of which one of 30 to 39 trains; batches of 64; LoRA of rank 32. The recipe
has no regularisation and is easily hacked: watch before_after.png, and raise `reference_weight`.

    python -m dinalrm_jax.align --config configs/refl.py:quickstart

tunes the quickstart's generator with its reward (runs/quickstart must be there) on two cores.
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


def on_the_quickstart(values: dict) -> dict:
    """The same on the quickstart's generator, reward and captions."""
    stage = {"steps": 40, "batch_size": 16, "checkpoint_every": 20, "evaluate_every": 20, "log_every": 5}
    return values | {
        "name": f"{values['name']}_quickstart",
        "base_model": "runs/quickstart/generator/backbone",
        "reward": {"checkpoint": "runs/quickstart/model"},
        "prompts": None,
        "scene_captions": 128,
        "tuning": values["tuning"] | stage,
        "height": 64,
        "width": 64,
        "evaluation": {"steps": 20, "guidance": 1.0},
        "execution": {},
    }


def get_config(variant: str = "") -> ConfigDict:
    values = recipe()
    if variant == "quickstart":
        values = on_the_quickstart(values) | {"reference_weight": 1.0}
        values["refl"] = {"steps": 20, "guidance": 1.0, "first": 14, "last": 18}
    elif variant:
        raise ValueError(f"this config knows the variant :quickstart, not :{variant}")
    return with_defaults(AlignConfig, values)
