"""Real human rankings on the quickstart's tiny codec and backbone: real data through the real path.

    python -m dinalrm_jax.preprocess --dataset hpdv2 --source DIR --output runs/hpdv2/data \\
        --encoders tiny --text-length 32 --buckets 128x128 --fit crop --min-area 0
    python -m dinalrm_jax.train --config configs/hpdv2.py --config.data runs/hpdv2/data

A model this small, without pretrained weights, cannot judge images well; what the run shows is
that HPDv2's files train and evaluate. The report has the held-out accuracy by rule M1 (strict
pairs, model ties wrong, pooled) beside chance and beside the JPEG file's size as a score.
"""

from ml_collections import ConfigDict

import configs.quickstart as quickstart


def get_config() -> ConfigDict:
    config = quickstart.get_config()
    config.name = "hpdv2"
    config.scenes = None
    config.model.encoders.text_length = 32
    config.generator.steps = 300
    config.generator.batch_size = 32
    config.reward.steps = 300
    config.reward.batch_size = 16
    config.evaluation.batch_size = 20
    return config
