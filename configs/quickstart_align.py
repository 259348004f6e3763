"""Tune a small generator under a judge that its reward knows nothing of, on a CPU, from nothing (docs/alignment.md).

    python -m dinalrm_jax.train --config configs/quickstart_align.py:reward
    python -m dinalrm_jax.align --config configs/quickstart_align.py

The first command trains a generator of drawn scenes, has it draw several pictures of every caption, orders them by
rules as people would, with errors, and trains the reward on those pairs. The second tunes the generator with that
reward by DiffusionNFT; `:flow_grpo`, `:refl` and `:dpo` take other algorithms, `:hacked` is ReFL without anything that
holds it back, and `:control` has the rules themselves as reward. A fifth of all captions is held out from all of it,
and the rules judge every run by pictures of those.

`:lpo` compares the outcomes of single steps by their jumps to clean latents. `:lpo_lrm` and `:lpo_dinalrm` compare them
noisy, by rewards of all levels that `:lrm` and `:dinalrm` train on the same pairs.
"""

from ml_collections import ConfigDict

import configs.quickstart as quickstart
from dinalrm_jax.config import AlignConfig, TrainConfig
from dinalrm_jax.mapping import with_defaults

# One group of objects a scene: what so small a generator learns to draw, if not always right. That makes 360 captions,
# of at most 6 words; nearly all of the 283 to train on and of the 77 held out.
WORLD = {"two_groups": 0.0}
TEXT_LENGTH = 8
CAPTIONS, HELD_OUT = 280, 70
REWARD_RUN = "runs/quickstart_align_reward"


def reward_run() -> dict:
    values = quickstart.values()
    generator = values["generator"] | {
        "steps": 5000, "batch_size": 32, "checkpoint_every": 1000,
        "optimizer": values["generator"]["optimizer"] | {"learning_rate": 4e-3},
    }  # fmt: skip
    return values | {
        "name": "quickstart_align_reward",
        "model": values["model"] | {"encoders": {"kind": "tiny", "text_length": TEXT_LENGTH}},
        "scenes": {"train_pairs": 16_000, "image_size": 64, "held_out": "captions", **WORLD},
        # Many pictures: a reward that sees each of them often learns them by heart.
        "samples": {
            "train_captions": CAPTIONS, "eval_captions": HELD_OUT, "drawn": 0.0,
            "rounds": 6, "steps": 16 * (12,) + 2 * (6,), "pairs": 36,
        },
        "generator": generator,
        "reward": values["reward"] | {
            "steps": 2500, "checkpoint_every": 500, "evaluate_every": 1250,
            # Where it orders one caption's pictures best. Trained at all levels it orders them worse at each of them.
            "sigma": {"distribution": "constant", "parameters": (0.2,)},
        },
        "evaluation": {"sigma": 0.2, "max_pairs": 1000},
    }  # fmt: skip


def all_levels(variant: str) -> dict:
    """A reward of every level, on the pairs and the generator that `:reward` left."""
    values = reward_run()
    values = {key: values[key] for key in ("seed", "model", "reward", "loss")} | {
        "name": f"quickstart_align_{variant}",
        "base_model": f"{REWARD_RUN}/generator/backbone",
        "data": f"{REWARD_RUN}/samples",
        "reward": values["reward"] | {"steps": 1500, "evaluate_every": 1500, "sigma": {}},
        "evaluation": {"levels": (0.2, 0.6, 0.8), "max_pairs": 1000},
    }
    if variant == "lrm":
        head = {"kind": "lrm", "width": 96}
        values["model"] = values["model"] | {"visual_taps": (5,), "text_taps": (), "head": head}
        values["loss"] = {"name": "bradley_terry"}
    return values


def alignment(variant: str) -> dict:
    return {
        "name": f"quickstart_align_{variant}",
        "base_model": f"{REWARD_RUN}/generator/backbone",
        "reward": {"checkpoint": f"{REWARD_RUN}/model", "sigma": (0.2,)},
        "scenes": {"count": CAPTIONS, **WORLD},
        "height": 64,
        "width": 64,
        "lora": {"rank": 16, "alpha": 32.0},
        "tuning": {
            "steps": 60, "batch_size": 96, "checkpoint_every": 20, "evaluate_every": 10, "log_every": 5,
            "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.0, "warmup_steps": 0, "ema_decay": 0.0},
        },
        "evaluation": {
            "prompts": HELD_OUT, "each": 4, "steps": 12, "guidance": 1.0, "sigma": (0.1, 0.4, 0.6),
            "judges": ({"kind": "scenes"},),
        },
    }  # fmt: skip


def get_config(variant: str = "nft") -> ConfigDict:
    if variant == "reward":
        return with_defaults(TrainConfig, reward_run())
    if variant in ("lrm", "dinalrm"):
        return with_defaults(TrainConfig, all_levels(variant))
    values = alignment(variant)
    tuning = values["tuning"]
    if variant == "flow_grpo":
        values |= {"flow_grpo": {"group": 12, "clip_range": 1e-3}, "reference_weight": 0.004}
    elif variant in ("refl", "hacked"):
        values |= {"refl": {"steps": 12, "guidance": 1.0, "first": 4, "last": 10}}
        values |= {"reference_weight": 0.0 if variant == "hacked" else 1.0}
        values["tuning"] = tuning | {"evaluate_every": 2}  # a reward's gradient needs few steps to spoil everything
    elif variant in ("nft", "control"):
        nft = {"group": 12, "levels": 4, "updates": 4, "beta": 0.3, "advantage_clip": 1.5}
        values |= {"nft": nft, "reference_weight": 0.03}
        values["tuning"] = tuning | {
            "steps": 80, "evaluate_every": 20,
            "optimizer": tuning["optimizer"] | {"learning_rate": 2e-3, "ema_decay": 0.5},
        }  # fmt: skip
        if variant == "control":
            values["reward"] = {"judge": {"kind": "scenes"}}
    elif variant == "dpo":
        values |= {"dpo": {"group": 12}}
    elif variant == "lpo":
        lpo = {
            "steps": 12, "guidance": 1.0, "candidates": 6, "scored_at": "clean", "threshold": (0.5, 0.5), "pairs": 6,
            "updates": 2, "beta": 500.0, "epsilon": 0.3,
        }  # fmt: skip
        values |= {"lpo": lpo}
        values["tuning"] = tuning | {
            "batch_size": 32, "steps": 40,
            "optimizer": tuning["optimizer"] | {"learning_rate": 2e-3, "ema_decay": 0.5},
        }  # fmt: skip
    elif variant in ("lpo_lrm", "lpo_dinalrm"):
        values["reward"] = {"checkpoint": f"runs/quickstart_align_{variant.removeprefix('lpo_')}/model"}
        # LRM is surest where it orders worst, at high noise; so the threshold rises steeply.
        lpo = {
            "steps": 12, "guidance": 1.0, "threshold": (0.2, 0.9), "pairs": 6, "updates": 2, "beta": 200.0,
            "epsilon": 0.3,
        }  # fmt: skip
        values |= {"lpo": lpo}
        values["tuning"] = tuning | {
            "batch_size": 32, "optimizer": tuning["optimizer"] | {"learning_rate": 5e-4},
        }  # fmt: skip
        values["evaluation"] = values["evaluation"] | {"sigma": (0.1, 0.2, 0.6)}
    else:
        known = "reward, lrm, dinalrm, nft, flow_grpo, refl, dpo, lpo, lpo_lrm, lpo_dinalrm, hacked, control"
        raise ValueError(f"this config knows the variants {known}, not :{variant}")
    return with_defaults(AlignConfig, values)
