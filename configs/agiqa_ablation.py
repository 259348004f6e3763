"""The paper's ablation on human ratings: one pretrained backbone, one variable changed at a time, several seeds.

    python -m dinalrm_jax.train --config configs/agiqa.py:small
    python -m dinalrm_jax.train --config configs/agiqa_ablation.py

Every run has the same pairs and the same orders of them; the table says of each whether it is better or worse than
the first, the paper's choice, or whether that cannot be told, and how many seeds would tell. It reuses the backbone of
the first command. `:3` runs three seeds.
"""

from ml_collections import ConfigDict

import configs.agiqa as agiqa

BACKBONE = "runs/agiqa_small/generator/backbone"
STEPS, PAIRS = 200, 16


def get_config(seeds: str = "5") -> ConfigDict:
    if not seeds.isdecimal():
        raise ValueError(f"this config takes a number of seeds (:3), not :{seeds}")

    def variant(name: str) -> ConfigDict:
        config = agiqa.get_config("small")
        config.name, config.generator, config.base_model = name, None, BACKBONE
        config.reward.steps = config.reward.checkpoint_every = config.reward.evaluate_every = STEPS
        config.reward.batch_size = PAIRS
        config.evaluation.update(report=(0.0,), levels=(0.2, 0.4), batch_size=64)
        return config

    runs = {
        name: variant(name)
        for name in (
            "paper", "fixed variance", "nll", "bradley-terry", "logit-normal", "sigma 0.4 only", "clean only",
            "frozen", "random backbone", "lrm",
        )
    }  # fmt: skip
    runs["fixed variance"].loss.variance = "constant"
    runs["nll"].loss.name = "nll"
    runs["bradley-terry"].loss = ConfigDict({"name": "bradley_terry"})
    runs["logit-normal"].reward.sigma.update(distribution="logit_normal", parameters=(0.0, 1.0))
    runs["sigma 0.4 only"].reward.sigma.update(distribution="constant", parameters=(0.4,))
    runs["clean only"].reward.sigma.update(distribution="constant", parameters=(0.0,))
    runs["frozen"].model.lora = None
    runs["random backbone"].base_model = None
    lrm = runs["lrm"]
    for name, value in {"text_taps": (), "head": ConfigDict({"kind": "lrm", "width": 192, "guidance": 7.5})}.items():
        lrm.model[name] = value
    lrm.model.visual_taps = lrm.model.visual_taps[-1:]
    lrm.loss = ConfigDict({"name": "bradley_terry"})
    return ConfigDict({"name": "agiqa_ablation", "seeds": tuple(range(int(seeds))), "runs": tuple(runs.values())})
