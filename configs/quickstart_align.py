"""Tune a small generator under a judge that its reward knows nothing of, on a CPU, from nothing (docs/alignment.md).

    python -m dinalrm_jax.train --config configs/quickstart_align.py:reward
    python -m dinalrm_jax.align --config configs/quickstart_align.py

The first command trains a generator of drawn scenes, has it draw several pictures of every caption, orders them by
rules as people would, with errors, and trains the reward on those pairs. The second tunes the generator with that
reward by Flow-GRPO; `:refl`, `:nft` and `:dpo` take other algorithms, `:hacked` is ReFL without anything that holds it
back, and `:control` Flow-GRPO with the rules themselves as reward. A fifth of all captions is held out from all of it,
and the rules judge every run by pictures of those.
"""

from ml_collections import ConfigDict

import configs.quickstart as quickstart
from dinalrm_jax.config import AlignConfig, TrainConfig
from dinalrm_jax.mapping import with_defaults

REWARD_RUN = "runs/quickstart_align_reward"


def reward_run() -> dict:
    values = quickstart.values()
    generator = values["generator"] | {"steps": 2400, "checkpoint_every": 400}
    return values | {
        "name": "quickstart_align_reward",
        "scenes": {"train_pairs": 16_000, "eval_pairs": 400, "image_size": 64, "held_out": "captions", "seed": 0},
        "samples": {},
        "generator": generator,
        "reward": values["reward"] | {"steps": 2000, "checkpoint_every": 500, "evaluate_every": 500},
    }


def alignment(variant: str) -> dict:
    return {
        "name": f"quickstart_align_{variant}",
        "base_model": f"{REWARD_RUN}/generator/backbone",
        "reward": {"checkpoint": f"{REWARD_RUN}/model", "sigma": (0.2,)},  # where it orders one caption's pictures best
        "scene_captions": 1000,
        "height": 64,
        "width": 64,
        "lora": {"rank": 16, "alpha": 32.0},
        "tuning": {
            "steps": 60, "batch_size": 96, "checkpoint_every": 20, "evaluate_every": 10, "log_every": 5,
            "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.0, "warmup_steps": 0, "ema_decay": 0.0},
        },
        "evaluation": {
            "prompts": 128, "steps": 12, "guidance": 1.0, "sigma": (0.1, 0.4, 0.6), "judges": ({"kind": "scenes"},),
        },
    }  # fmt: skip


def get_config(variant: str = "flow_grpo") -> ConfigDict:
    if variant == "reward":
        return with_defaults(TrainConfig, reward_run())
    values = alignment(variant)
    tuning = values["tuning"]
    if variant in ("flow_grpo", "control"):
        values |= {"flow_grpo": {"group": 12, "clip_range": 1e-3}, "reference_weight": 0.004}
        if variant == "control":
            values["reward"] = {"judge": {"kind": "scenes"}}
    elif variant in ("refl", "hacked"):
        values |= {"refl": {"steps": 12, "guidance": 1.0, "first": 4, "last": 10}}
        values |= {"reference_weight": 0.0 if variant == "hacked" else 1.0}
    elif variant == "nft":
        values |= {"nft": {"group": 12}, "reference_weight": 1e-4}
        values["tuning"] = tuning | {"optimizer": tuning["optimizer"] | {"ema_decay": 0.5}}
    elif variant == "dpo":
        values |= {"dpo": {"group": 12}}
    else:
        raise ValueError(f"this config knows :reward, :flow_grpo, :refl, :nft, :dpo, :hacked, :control, not :{variant}")
    return with_defaults(AlignConfig, values)
