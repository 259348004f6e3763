"""LRM beside DiNa-LRM on drawn scenes: the same generator, pairs and budget, three seeds (docs/lrm_lpo.md).

    python -m dinalrm_jax.train --config configs/quickstart_lrm.py
    python -m benchmarks.side_by_side --sweep runs/quickstart_lrm

Prints held-out accuracy by noise level, mean and spread over the seeds. About 20 minutes on two cores;
`configs/quickstart_lrm.py:1` runs one seed.
"""

from ml_collections import ConfigDict

import configs.quickstart as quickstart


def get_config(seeds: str = "3") -> ConfigDict:
    if not seeds.isdecimal():
        raise ValueError(f"this config takes a number of seeds (:1), not :{seeds}")

    def model(name: str) -> ConfigDict:
        config = quickstart.get_config()
        config.name = name
        config.evaluation.levels = (0.2, 0.6, 0.8)
        config.generator.steps = config.reward.steps = config.reward.evaluate_every = 400
        return config

    dinalrm, lrm = model("DiNa-LRM"), model("LRM")
    values = {"visual_taps": (5,), "text_taps": (), "head": {"kind": "lrm", "width": 96, "guidance": 7.5}}
    for name, value in values.items():
        lrm.model[name] = ConfigDict(value) if isinstance(value, dict) else value
    lrm.loss = ConfigDict({"name": "bradley_terry"})
    return ConfigDict({"name": "quickstart_lrm", "seeds": tuple(range(int(seeds))), "runs": (dinalrm, lrm)})
