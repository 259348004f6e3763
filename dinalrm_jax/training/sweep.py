"""Several configurations on the same data, each with every seed; runs of one seed share its generator."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace

import numpy as np

from dinalrm_jax.config import SweepConfig, TrainConfig
from dinalrm_jax.devices import processes
from dinalrm_jax.disk import AnyPath
from dinalrm_jax.evaluation.comparison import Comparison, compare
from dinalrm_jax.evaluation.pairs import PairScores
from dinalrm_jax.evaluation.run_report import comparison_table, sweep_table
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
        workdir: gets a directory a seed, `results.json`, `report.md` and, of runs that are judged by the same pairs,
            `comparisons.json`.
        run: a whole run in its directory.
        generate: a run's generator stage alone, in a directory; gives the trained backbone's.
    """
    claim_workdir(workdir, sweep, {})
    accuracies, answers = ({config.name: [] for config in sweep.runs} for _ in range(2))
    pairs: list[np.ndarray] = []  # that each run is judged by
    for seed in sweep.seeds:
        for config in sweep.runs:
            config = replace(config, seed=seed)
            if not config.mixture:
                config = replace(config, data=config.data or str(workdir / "data"))
            if config.generator is not None:
                backbone = generate(config, workdir / f"seed{seed}" / "generator_run")
                config = replace(config, generator=None, base_model=str(backbone))
            scores = run(config, workdir / f"seed{seed}" / config.name)
            judged = config.evaluation
            singles = sorted({judged.sigma, *judged.levels} | ({0.0} & {*judged.report}))
            levels: list[Level] = [*singles, judged.ensemble]
            accuracies[config.name].append({level_name(level): scores.accuracy(level) for level in levels})
            answers[config.name].append({level_name(level): scores.correct(level) for level in levels})
            pairs.append(scores.records)
    if processes.is_first():
        table = sweep_table(accuracies)
        (workdir / "results.json").write_text(json.dumps(accuracies, indent=1) + "\n")
        if len(sweep.runs) > 1 and all(np.array_equal(one, pairs[0]) for one in pairs):
            comparisons = against_first(answers, pairs[0][:, 2])
            table += "\n" + comparison_table(comparisons, sweep.runs[0].name)
            values = {name: {level: asdict(one) for level, one in row.items()} for name, row in comparisons.items()}
            (workdir / "comparisons.json").write_text(json.dumps(values, indent=1) + "\n")
        (workdir / "report.md").write_text(table)
        print("\n" + table)


def against_first(
    answers: Mapping[str, Sequence[Mapping[str, np.ndarray]]], prompts: np.ndarray
) -> dict[str, dict[str, Comparison]]:
    """Every run beside the first one, by level, where both were judged there.

    Args:
        answers: of each run one {level: (P,) which pairs are right} a seed.
        prompts: (P,) of the pairs.
    """
    (_, first), *others = answers.items()
    return {
        name: {
            level: compare([row[level] for row in rows], [row[level] for row in first], prompts)
            for level in rows[0]
            if level in first[0]
        }
        for name, rows in others
    }
