"""The config of tests/alignment/test_align.py, for a process of its own."""

from ml_collections import ConfigDict

from dinalrm_jax.config import AlignConfig
from dinalrm_jax.mapping import with_defaults


def get_config(algorithm: str = "refl") -> ConfigDict:
    values = {
        "name": "tiny", "base_model": "", "prompts": "", "reward": {"checkpoint": ""},
        "tuning": {
            "batch_size": 8, "steps": 3, "checkpoint_every": 1, "evaluate_every": 2, "log_every": 1,
            "optimizer": {"learning_rate": 3e-3, "weight_decay": 0.0, "warmup_steps": 0, "ema_decay": 0.0},
        },
        "refl": {"steps": 4, "guidance": 1.5, "first": 1, "last": 3},
        "mesh": {"data": 1}, "lora": {"rank": 2, "alpha": 4.0}, "height": 32, "width": 48, "text_length": 16,
        "evaluation": {"prompts": 2, "steps": 3, "guidance": 1.5, "images": 1},
    }  # fmt: skip
    if algorithm == "flow_grpo":
        values |= {"refl": None, "flow_grpo": {"steps": 5, "window": 2, "last": 4, "group": 2}}
    elif algorithm == "lpo":
        values |= {"refl": None, "lpo": {"steps": 4, "pairs": 3, "updates": 2, "threshold": (0.0, 0.01)}}
    return with_defaults(AlignConfig, values)
