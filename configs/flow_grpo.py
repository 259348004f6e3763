"""Flow-GRPO on SD3.5-Medium with the latent reward, after the released recipes (docs/alignment.md).

    python -m dinalrm_jax.align --config configs/flow_grpo.py --config.prompts prompts.txt \\
        --config.reward.checkpoint path/to/DiNa-LRM-SD35M-12layers --workdir runs/flow_grpo

10 steps at 512 pixels without guidance, three of the first five with the noise of "cps"; two updates a rollout, clipped
at 3e-6. This is verl-omni's recipe, for 1 or 7 devices: 14 prompts of 18 images, KL 0.01, 80 rollouts. `:released` is
that of diffusion-rm: 64 prompts of 18 images, KL 0.004, an average, and a fifth of PickScore's advantage mixed in.
`:smoke` is for what configs/hpdv3.py:smoke leaves.
"""

from ml_collections import ConfigDict

import configs.refl as refl
from dinalrm_jax.config import AlignConfig
from dinalrm_jax.mapping import with_defaults

PICKSCORE = {
    "judge": {
        "kind": "pickscore", "model": "yuvalkirstain/PickScore_v1", "tokenizer": "openai/clip-vit-large-patch14",
    },
    "weight": 0.2,
}  # fmt: skip


def recipe() -> dict:
    values = refl.recipe() | {"name": "flow_grpo", "refl": None, "flow_grpo": {}, "reference_weight": 0.01}
    optimizer = values["tuning"]["optimizer"] | {"learning_rate": 5e-5}
    changed = {"steps": 80, "batch_size": 14 * 18, "evaluate_every": 20, "checkpoint_every": 20}
    values["tuning"] = values["tuning"] | changed | {"optimizer": optimizer}
    return values


def get_config(variant: str = "") -> ConfigDict:
    values = recipe()
    tuning = values["tuning"]
    if variant == "released":
        values |= {"name": "flow_grpo_released", "reference_weight": 0.004, "text_length": 128, "mixed": (PICKSCORE,)}
        average = tuning["optimizer"] | {"ema_decay": 0.9}
        values["tuning"] = tuning | {"steps": 1000, "batch_size": 64 * 18, "evaluate_every": 30, "optimizer": average}
        values["evaluation"] = {"prompts": 64, "steps": 40, "guidance": 4.5}
    elif variant == "smoke":
        values = refl.smoke(values, flow_grpo={"steps": 5, "window": 2, "last": 4, "group": 2})
    elif variant:
        raise ValueError(f"this config knows the variants :released and :smoke, not :{variant}")
    return with_defaults(AlignConfig, values)
