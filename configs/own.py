"""A few dozen pairs of your own, on the tiny codec and backbone: no weights, two cores. See docs/training.md.

    python -m dinalrm_jax.preprocess --dataset jsonl --source own --output runs/own/data \\
        --encoders tiny --text-length 32 --buckets 128x128 --fit crop --min-area 0 --holdout 3
    python -m dinalrm_jax.train --config configs/own.py --config.data runs/own/data --workdir runs/own/run
"""

from ml_collections import ConfigDict

import configs.hpdv2 as hpdv2


def get_config() -> ConfigDict:
    config = hpdv2.get_config()
    config.name = "own"
    for stage in (config.generator, config.reward):
        stage.steps, stage.batch_size, stage.checkpoint_every = 100, 8, 50
        stage.optimizer.warmup_steps = 10
    config.reward.evaluate_every = 50
    config.evaluation.batch_size = 8
    return config
