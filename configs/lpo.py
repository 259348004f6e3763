"""LPO on SD3.5-Medium: at every sampling step the best outcome against the worst (docs/lrm_lpo.md).

    python -m dinalrm_jax.align --config configs/lpo.py --config.prompts prompts.txt \\
        --config.reward.checkpoint path/to/lrm/model --workdir runs/lpo

The published recipe of SDXL, mapped to a flow: 20 steps of DDIM with eta 1 and guidance 5, four outcomes a step,
threshold 0.45 to 0.6, beta 500, clip 0.1, LoRA of rank 64, learning rate 1e-5; 16 prompts a rollout. Its pairs make
four updates here, of up to 76 pairs each; the published code makes one of every 16 pairs.
Any reward that knows noise levels serves: LRM (configs/lrm.py), or DiNa-LRM at each step's own level; with
`--config.lpo.scored_at=clean` one that knows a single level.

    python -m dinalrm_jax.train --config configs/lrm.py:smoke
    python -m dinalrm_jax.align --config configs/lpo.py:smoke

run the whole path on random tiny weights in the real layout, in a few minutes.
"""

from ml_collections import ConfigDict

import configs.refl as refl
from dinalrm_jax.config import AlignConfig
from dinalrm_jax.mapping import with_defaults


def get_config(variant: str = "") -> ConfigDict:
    values = refl.recipe() | {
        "name": "lpo",
        "refl": None,
        "reward": {"checkpoint": "path/to/lrm/model"},
        "lpo": {"updates": 4},
        "lora": {"rank": 64, "alpha": 64.0},
        "height": 1024,
        "width": 1024,
    }
    optimizer = values["tuning"]["optimizer"] | {"learning_rate": 1e-5, "weight_decay": 1e-4}
    values["tuning"] = values["tuning"] | {"steps": 1250, "batch_size": 16, "optimizer": optimizer}
    if variant == "smoke":
        run = "runs/lrm_smoke"
        values = refl.smoke(
            values,
            base_model=f"{run}/base_model",
            reward={"checkpoint": f"{run}/model"},
            lpo={"steps": 4, "pairs": 3, "updates": 2, "threshold": (0.0, 0.01)},
        )
    elif variant:
        raise ValueError(f"this config knows the variant :smoke, not :{variant}")
    return with_defaults(AlignConfig, values)
