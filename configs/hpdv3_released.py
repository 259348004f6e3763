"""DiNa-LRM on HPDv3 with the constants of the released code where it differs from the paper.

    python -m dinalrm_jax.train --config configs/hpdv3_released.py --config.data data/hpdv3

sigma_0^2 = 0.05 and 1e-6 inside the roots of the loss, no warmup, no EMA: the released code configures
both, and neither runs. Preprocess as configs/hpdv3.py says, with --min-vote-share 0.6 for its filter;
hardware and :smoke are the same.
"""

from ml_collections import ConfigDict

import configs.hpdv3 as hpdv3


def get_config(variant: str = "") -> ConfigDict:
    config = hpdv3.get_config(variant)
    config.name = config.name.replace("hpdv3", "hpdv3_released")
    config.loss.sigma_0 = 0.05**0.5
    config.loss.epsilon = 1e-6
    config.reward.optimizer.warmup_steps = 0
    config.reward.optimizer.ema_decay = 0.0
    return config
