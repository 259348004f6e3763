"""A short run of the HPDv3 configuration on given records, for several processes and for one."""

from ml_collections import ConfigDict

import configs.hpdv3 as hpdv3


def get_config() -> ConfigDict:
    config = hpdv3.get_config("smoke")
    config.name = "sharded"
    config.rehearsal = None
    config.model.encoders.text_length = 8
    config.reward.update(steps=10, batch_size=4, log_every=1, evaluate_every=10, checkpoint_every=10)
    config.evaluation.update(batch_size=4, levels=())
    config.model.update(num_blocks=1, visual_taps=(1,), text_taps=(1,))
    config.execution.update(dtype="float32", layers="loop", remat="none")
    return config
