"""DiffusionNFT on SD3.5-Medium with the latent reward (docs/alignment.md).

    python -m dinalrm_jax.align --config configs/nft.py --config.prompts prompts.txt \\
        --config.reward.checkpoint path/to/DiNa-LRM-SD35M-12layers --workdir runs/nft

16 prompts of 16 images a batch, sampled by the averaged policy in 10 steps without guidance; beta 0.1, learning rate
3e-4 and 1e-4 of the distance to the reference are those of verl-omni's script for Qwen-Image: none is published for
SD3.5. `:smoke` is for what configs/hpdv3.py:smoke leaves.
"""

from ml_collections import ConfigDict

import configs.refl as refl
from dinalrm_jax.config import AlignConfig
from dinalrm_jax.mapping import with_defaults


def get_config(variant: str = "") -> ConfigDict:
    values = refl.recipe() | {"name": "nft", "refl": None, "nft": {"group": 16}, "reference_weight": 1e-4}
    optimizer = values["tuning"]["optimizer"] | {"learning_rate": 3e-4, "ema_decay": 0.9}
    values["tuning"] = values["tuning"] | {"batch_size": 16 * 16, "optimizer": optimizer}
    if variant == "smoke":
        values = refl.smoke(values, nft={"steps": 3, "group": 4})
    elif variant:
        raise ValueError(f"this config knows the variant :smoke, not :{variant}")
    return with_defaults(AlignConfig, values)
