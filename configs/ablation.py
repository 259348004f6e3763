"""The paper's ablation in miniature, on the quickstart's scenes: same data, same budget, three seeds.

    python -m dinalrm_jax.train --config configs/ablation.py

Prints held-out accuracy at one level and for the ensemble, mean and spread over the seeds. Runs of
one seed share one generator. About an hour on two cores; `configs/ablation.py:1` runs one seed.
"""

from ml_collections import ConfigDict

import configs.quickstart as quickstart


def get_config(seeds: str = "3") -> ConfigDict:
    if not seeds.isdecimal():
        raise ValueError(f"this config takes a number of seeds (:1), not :{seeds}")

    def variant(name: str) -> ConfigDict:
        config = quickstart.get_config()
        config.name = name
        config.generator.steps = 400
        config.reward.steps = 400
        return config

    fixed_variance = variant("fixed variance")
    fixed_variance.loss.variance = "constant"
    clean_only = variant("sigma = 0 only")
    clean_only.reward.sigma.update(distribution="constant", parameters=(0.0,))
    no_lora, no_pretraining = variant("no LoRA"), variant("no generative pretraining")
    no_lora.model.lora = None
    no_pretraining.generator = None  # random frozen blocks, as diffusers draws them
    return ConfigDict({
        "name": "ablation",
        "seeds": tuple(range(int(seeds))),
        "runs": (variant("calibrated"), fixed_variance, clean_only, no_lora, no_pretraining),
    })  # fmt: skip
