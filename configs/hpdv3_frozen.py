"""The ablation without LoRA: the head alone learns on the frozen backbone's features.

    python -m dinalrm_jax.train --config configs/hpdv3_frozen.py --config.data data/hpdv3

Otherwise configs/hpdv3.py, :smoke included. Nothing is differentiated through the backbone, so a step
takes about a third of the time and far less memory. The paper's ablation loses most of its accuracy
here (method: numbers to expect).
"""

from ml_collections import ConfigDict

import configs.hpdv3 as hpdv3


def get_config(variant: str = "") -> ConfigDict:
    config = hpdv3.get_config(variant)
    config.name = config.name.replace("hpdv3", "hpdv3_frozen")
    config.model.lora = None
    return config
