"""Flow-GRPO on SD3.5-Medium with the latent reward, after the released recipe (docs/alignment.md).

    python -m dinalrm_jax.align --config configs/flow_grpo.py --config.prompts prompts.txt \\
        --config.reward.checkpoint path/to/DiNa-LRM-SD35M-12layers --workdir runs/flow_grpo

10 steps at 512 pixels without guidance, three of the first five with the noise of "cps"; 14 prompts of 18 images a
batch. One update a rollout, where the recipe has two: ratios are 1, and nothing is clipped.

    python -m dinalrm_jax.align --config configs/flow_grpo.py:quickstart

tunes the quickstart's generator with its reward (runs/quickstart must be there) on two cores.
"""

from ml_collections import ConfigDict

import configs.refl as refl
from dinalrm_jax.config import AlignConfig
from dinalrm_jax.mapping import with_defaults


def get_config(variant: str = "") -> ConfigDict:
    values = refl.recipe() | {"name": "flow_grpo", "refl": None, "flow_grpo": {}, "reference_weight": 0.004}
    optimizer = values["tuning"]["optimizer"] | {"learning_rate": 5e-5}
    values["tuning"] = values["tuning"] | {"batch_size": 252, "optimizer": optimizer}
    if variant == "quickstart":
        values = refl.on_the_quickstart(values)
        values["tuning"] = values["tuning"] | {"batch_size": 32}
        values["flow_grpo"] = {"group": 8}
    elif variant:
        raise ValueError(f"this config knows the variant :quickstart, not :{variant}")
    return with_defaults(AlignConfig, values)
