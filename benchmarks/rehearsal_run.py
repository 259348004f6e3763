"""configs/hpdv3.py:smoke on records that are already there; see benchmarks/rehearsal.py."""

from ml_collections import ConfigDict

import configs.hpdv3 as hpdv3


def get_config() -> ConfigDict:
    config = hpdv3.get_config("smoke")
    config.name = "rehearsal"
    config.rehearsal = None
    config.reward.checkpoint_every = 10
    config.reward.log_every = 5
    return config
