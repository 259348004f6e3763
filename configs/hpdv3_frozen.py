"""The ablation without LoRA: the head alone learns on the frozen backbone's features.

    python -m dinalrm_jax.train --config configs/hpdv3_frozen.py --config.data data/hpdv3

Otherwise configs/hpdv3.py, :smoke included. Nothing is differentiated through the backbone, so a step
takes less time and far less memory (not measured here). The paper's summary gives 73.52 / 67.09 /
70.27 for this ablation, without naming its columns (docs/method.md, Numbers of the paper).
"""

from ml_collections import ConfigDict

import configs.hpdv3 as hpdv3


def get_config(variant: str = "") -> ConfigDict:
    config = hpdv3.get_config(variant)
    config.name = config.name.replace("hpdv3", "hpdv3_frozen")
    config.model.lora = None
    return config
