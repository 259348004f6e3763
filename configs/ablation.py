"""The paper's ablation in miniature, on the quickstart's scenes: same data, same budget, three seeds.

    python -m dinalrm_jax.train --config configs/ablation.py

Prints held-out accuracy at one level and for the ensemble, mean and spread over the seeds. Runs of
one seed share one generator. About an hour on two cores; `configs/ablation.py:1` runs one seed.
"""

from ml_collections import ConfigDict

import configs.quickstart as quickstart


def get_config(seeds: str = "3") -> ConfigDict:
    def variant(name: str, **changes) -> ConfigDict:
        config = quickstart.get_config()
        config.name = name
        config.generator.steps = 400
        config.reward.steps = 400
        with config.ignore_type():
            for path, value in changes.items():
                *parents, key = path.split("__")
                node = config
                for parent in parents:
                    node = node[parent]
                node[key] = value
        return config

    return ConfigDict({
        "name": "ablation",
        "seeds": tuple(range(int(seeds))),
        "runs": (
            variant("calibrated"),
            variant("fixed variance", loss__variance="constant"),
            variant("sigma = 0 only", reward__sigma={"distribution": "constant", "parameters": (0.0,)}),
            variant("no LoRA", model__lora=None),
            variant("no generative pretraining", generator=None),
        ),
    })  # fmt: skip
