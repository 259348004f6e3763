"""Your own pairs, as few as a dozen, with nothing downloaded: the quickstart's tiny codec, text and backbone.

    python -m dinalrm_jax.preprocess --dataset jsonl --source DIR --output runs/own/data --holdout 3 \\
        --encoders tiny --text-length 32 --buckets 128x128 --fit crop --min-area 0
    python -m dinalrm_jax.train --config configs/own.py --config.data runs/own/data

DIR holds `pairs.jsonl` and the images that it names (docs/training.md). It shows that a set trains and evaluates;
what a backbone this small learns from so few pairs is nearly nothing. `configs/own.py:8` takes batches of 8 pairs.
"""

from ml_collections import ConfigDict

import configs.quickstart as quickstart


def get_config(batch_size: str = "4") -> ConfigDict:
    config = quickstart.get_config()
    config.name = "own"
    config.scenes = None
    config.model.encoders.text_length = 32
    for stage in (config.generator, config.reward):
        stage.batch_size = int(batch_size)
        stage.steps = 60
    config.reward.evaluate_every = 20
    config.evaluation.batch_size = 8
    return config
