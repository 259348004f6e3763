"""Several configurations on the same data, each with every seed; runs of one seed share its generator."""

import dataclasses
import json
from collections.abc import Callable

from dinalrm_jax.config import SweepConfig, TrainConfig
from dinalrm_jax.devices import processes
from dinalrm_jax.disk import AnyPath
from dinalrm_jax.evaluation.pairs import PairScores
from dinalrm_jax.evaluation.run_report import sweep_table
from dinalrm_jax.evaluation.scoring import Level, level_name
from dinalrm_jax.training.workdir import claim_workdir


def sweep_runs(
    sweep: SweepConfig,
    workdir: AnyPath,
    run: Callable[[TrainConfig, AnyPath], PairScores],
    generate: Callable[[TrainConfig, AnyPath], AnyPath],
) -> None:
    """Runs every configuration with every seed, and prints the held-out accuracies with their spread.

    Args:
        sweep: what to run.
        workdir: gets a directory a seed, `results.json` and `report.md`.
        run: a whole run in its directory.
        generate: a run's generator stage alone, in a directory; gives the trained backbone's.
    """
    claim_workdir(workdir, sweep, {})
    accuracies = {config.name: [] for config in sweep.runs}
    for seed in sweep.seeds:
        for config in sweep.runs:
            config = dataclasses.replace(config, seed=seed)
            if not config.mixture:
                config = dataclasses.replace(config, data=config.data or str(workdir / "data"))
            if config.generator is not None:
                backbone = generate(config, workdir / f"seed{seed}" / "generator_run")
                config = dataclasses.replace(config, generator=None, base_model=str(backbone))
            scores = run(config, workdir / f"seed{seed}" / config.name)
            judged = config.evaluation
            levels: list[Level] = list(dict.fromkeys((0.0, *sorted({judged.sigma, *judged.levels}))))
            levels.append(judged.ensemble)
            accuracies[config.name].append({level_name(level): scores.accuracy(level) for level in levels})
    if processes.is_first():
        table = sweep_table(accuracies)
        (workdir / "results.json").write_text(json.dumps(accuracies, indent=1) + "\n")
        (workdir / "report.md").write_text(table)
        print("\n" + table)
