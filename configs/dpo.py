"""Diffusion-DPO on SD3.5-Medium: each prompt's best image by the reward against its worst (docs/alignment.md).

    python -m dinalrm_jax.align --config configs/dpo.py --config.prompts prompts.txt \\
        --config.reward.checkpoint path/to/DiNa-LRM-SD35M-12layers --workdir runs/dpo

16 prompts of 8 images a batch, beta 2000 as published. `:records` learns from pairs that `preprocess` made (set
`dpo.records`), with beta 100 as verl-omni's script for SD3.5 has it; the reward then only watches. `:smoke` is for
what configs/hpdv3.py:smoke leaves.
"""

from ml_collections import ConfigDict

import configs.refl as refl
from dinalrm_jax.config import AlignConfig
from dinalrm_jax.mapping import with_defaults


def get_config(variant: str = "") -> ConfigDict:
    values = refl.recipe() | {"name": "dpo", "refl": None, "dpo": {}}
    optimizer = values["tuning"]["optimizer"] | {"learning_rate": 5e-5}
    values["tuning"] = values["tuning"] | {"batch_size": 16 * 8, "optimizer": optimizer}
    if variant == "records":
        values |= {"name": "dpo_records", "dpo": {"records": "path/to/records", "beta": 100.0}}
    elif variant == "smoke":
        values = refl.smoke(values, dpo={"steps": 3, "group": 4})
    elif variant:
        raise ValueError(f"this config knows the variants :records and :smoke, not :{variant}")
    return with_defaults(AlignConfig, values)
