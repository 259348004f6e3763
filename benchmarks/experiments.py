"""The paper's claims on human ratings, small enough to run anywhere: docs/experiments.md, from the runs' own results.

    python -m dinalrm_jax.train --config configs/agiqa.py:small
    python -m dinalrm_jax.train --config configs/agiqa_ablation.py
    python -m benchmarks.experiments --run runs/agiqa_small --sweep runs/agiqa_ablation --agiqa DIR --hpdv2 DIR \\
        --taesd3 DIR
    python -m benchmarks.experiments                      # the document again, from benchmarks/results/agiqa.json

Reads what the runs reported, scores the first run's model on the held-out prompts' images and on HPDv2's rankings, and
the sweep's models, those trained as the paper does, by several levels and ensembles; fits the likelihood to people's
shares.
"""

import dataclasses
import datetime
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags

import dinalrm_jax as dina
from benchmarks import speed
from dinalrm_jax.benchmark import processor
from dinalrm_jax.data.config import OpinionConfig
from dinalrm_jax.data.records import Records
from dinalrm_jax.data.sources import agiqa3k, hpdv2
from dinalrm_jax.devices.compilation import enable_compilation_cache
from dinalrm_jax.evaluation.benchmark import evaluate_images, evaluate_records
from dinalrm_jax.evaluation.benchmark_report import summarize
from dinalrm_jax.evaluation.calibration import calibrate
from dinalrm_jax.evaluation.comparison import Comparison, compare
from dinalrm_jax.evaluation.controls import Standing
from dinalrm_jax.evaluation.markdown import table
from dinalrm_jax.evaluation.scoring import level_name
from dinalrm_jax.noise import NoiseDraw

RESULT = speed.RESULTS / "agiqa.json"
DOCUMENT = speed.HERE.parent / "docs" / "experiments.md"
START, END = "<!-- agiqa: python -m benchmarks.experiments -->", "<!-- end of agiqa -->"
SINGLES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
ENSEMBLES = {3: (0.2, 0.5, 0.7), 5: (0.1, 0.2, 0.4, 0.5, 0.7), 8: SINGLES[1:]}
STANDARD = 0.4  # the level that stands for a run

# Claim; the paper's numbers; the run that leaves the choice out, and the level that both are judged at. The paper's
# numbers of its ablation are HPDv2's, HPDv3's and GenAI-Bench's, in points.
ABLATION = (
    ("a variance that grows with the noise, not a fixed one", "+3.4, -0.1, +0.4", "fixed variance", "0.4"),
    ("the fidelity loss, not the negative log-likelihood", "", "nll", "0.4"),
    ("the fidelity loss, not Bradley and Terry's", "", "bradley-terry", "0.4"),
    ("levels drawn evenly, not logit-normally", "", "logit-normal", "0.4"),
    ("levels drawn evenly, not 0.4 alone", "", "sigma 0.4 only", "0.4"),
    ("noise at all, not clean latents only; judged at 0.4", "+22.9, +0.7, +0.9", "clean only", "0.4"),
    ("the same, judged on clean latents", "", "clean only", "0"),
    ("adapters, not a frozen backbone", "+8.6, +8.0, -1.8", "frozen", "0.4"),
    ("a pretrained backbone, not a random one", "", "random backbone", "0.4"),
    ("DiNa-LRM's head and loss, not LRM's", "+9.8 (mean)", "lrm", "0.4"),
)

# The same of what one model is scored at; the comparisons of `by_levels`.
LEVELS = (
    ("the ensemble of 0.2, 0.5 and 0.7, not one level (0.4)", "+1.0 (mean)", "ensemble of 3 beside 0.4"),
    ("the ensemble's tokens together, not the mean of its scores", "yes", "tokens beside means"),
    ("more levels: 5, not 3", "", "ensemble of 5 beside 3"),
    ("more levels: 8, not 3", "", "ensemble of 8 beside 3"),
    ("a level in the middle (0.4), not clean latents", "yes", "0.4 beside 0"),
    ("a level in the middle (0.4), not 0.8", "yes", "0.4 beside 0.8"),
)


def measure(run: pathlib.Path, sweep: pathlib.Path, agiqa: pathlib.Path, rankings: pathlib.Path, taesd3: str) -> dict:
    """All that the document shows, as JSON values."""
    model = dina.RewardModel.from_pretrained(run / "model", taesd3, dtype="float32")
    records = Records(json.loads((run / "config.json").read_text())["config"]["data"])
    held_out = agiqa3k.benchmark(agiqa, OpinionConfig(), records.manifest["source"]["holdout"])
    draws, levels = [NoiseDraw(seed) for seed in range(2)], [STANDARD, *(each for each in SINGLES if each != STANDARD)]
    known = evaluate_images(model, held_out, levels, draws, batch_size=64)
    zero_shot = evaluate_images(model, hpdv2.benchmark(rankings), [*levels, ENSEMBLES[3]], draws, batch_size=64)
    fitted = calibrate(known)
    accuracies = json.loads((sweep / "results.json").read_text())
    return {
        "conditions": f"jax {jax.__version__}, {processor()}, {os.cpu_count()} cores, float32, {datetime.date.today()}",
        "seeds": len(next(iter(accuracies.values()))),
        "report": json.loads((run / "report" / "results.json").read_text()),
        "agiqa": summarize(known),
        "hpdv2": summarize(zero_shot),
        "hpdv2, fitted likelihood": summarize(dataclasses.replace(zero_shot, likelihood=fitted.likelihood)),
        "calibration": dataclasses.asdict(fitted),
        "accuracies": accuracies,
        "comparisons": json.loads((sweep / "comparisons.json").read_text()),
        "levels": by_levels([path / "paper" / "model" for path in sorted(sweep.glob("seed*"))], records),
    }


def by_levels(models: Sequence[pathlib.Path], records: Records) -> dict[str, Any]:
    """Accuracy of models by level, by ensembles and by means of scores, and what is better than the standard level."""
    answers: dict[str, list[np.ndarray]] = {}
    for path in models:
        model = dina.RewardModel.from_pretrained(path, dtype="float32")
        levels = [*SINGLES, *ENSEMBLES.values()]
        found = evaluate_records(model, records, "eval", levels, [NoiseDraw(0)], batch_size=64)
        scores = {level_name(level): np.stack(found.pairs(place)[:2], axis=1) for place, level in enumerate(levels)}
        for count, members in ENSEMBLES.items():
            scores[f"mean of {count}"] = np.mean([scores[level_name(level)] for level in members], axis=0)
        for name, row in scores.items():
            answers.setdefault(name, []).append(row[:, 0] > row[:, 1])
    prompts = np.array([ranking.prompt for ranking in found.rankings])

    def beside(one: str, other: str) -> dict[str, Any]:
        return dataclasses.asdict(compare(answers[one], answers[other], prompts))

    ensembles = {count: level_name(members) for count, members in ENSEMBLES.items()}
    return {
        "accuracy": {name: [float(row.mean()) for row in rows] for name, rows in answers.items()},
        "ensemble of 3 beside 0.4": beside(ensembles[3], f"{STANDARD:g}"),
        "ensemble of 5 beside 3": beside(ensembles[5], ensembles[3]),
        "ensemble of 8 beside 3": beside(ensembles[8], ensembles[3]),
        "tokens beside means": beside(ensembles[3], "mean of 3"),
        "0.4 beside 0": beside("0.4", "0"),
        "0.4 beside 0.8": beside("0.4", "0.8"),
    }


def verdict(found: Comparison) -> tuple[str, str]:
    """Ours, and whether the paper's claim holds; `found` is the paper's choice beside the other."""
    low, high = (f"{100 * end:+.1f}" for end in found.interval)
    words = {"better": "holds here", "worse": "the contrary here"}
    said = words.get(found.verdict) or str(found).partition(": ")[2]
    return f"{100 * found.difference:+.1f} ({low} to {high})", said


def turned(found: Comparison) -> Comparison:
    low, high = found.interval
    return dataclasses.replace(
        found, difference=-found.difference, interval=(-high, -low), by_seed=tuple(-x for x in found.by_seed)
    )


def as_markdown(result: Mapping[str, Any]) -> str:
    """The section that the document has."""
    report, levels, seeds = result["report"], result["levels"], result["seeds"]
    known, other, fitted = result["agiqa"], result["hpdv2"], result["calibration"]
    agreeing = "share of people who agree with the order"

    claims = [
        [claim, theirs, *verdict(turned(Comparison(**result["comparisons"][name][level])))]
        for claim, theirs, name, level in ABLATION
        if name in result["comparisons"]
    ]
    claims += [[claim, theirs, *verdict(Comparison(**levels[name]))] for claim, theirs, name in LEVELS]

    columns = list(next(iter(result["accuracies"].values()))[0])
    accuracies = []
    for name, rows in result["accuracies"].items():
        found = 100 * np.array([[seed.get(column, np.nan) for column in columns] for seed in rows])
        spread = found.std(axis=0, ddof=min(1, seeds - 1))
        accuracies.append([name, *(f"{mean:.1f} ± {s:.1f}" for mean, s in zip(found.mean(axis=0), spread))])

    groups = list(next(iter(report["controls, per cent"].values())))
    controls = [[f"the model at {STANDARD:g}", *(f"{100 * report[f'{STANDARD:g}'][group]:.1f}" for group in groups)]]
    for name, by_group in report["controls, per cent"].items():
        cells = (str(Standing(**by_group[group])) for group in groups)
        controls.append([f"{name}; the model is ahead by", *cells])

    correlations = [
        [level, f"{found['strict']['accuracy']:.1f}", *(f"{value:.3f}" for value in found["correlations"].values())]
        for level, found in known["levels"].items()
    ]
    correlations.append([agreeing, f"{known['people']['all']:.1f}", "", "", ""])

    zero_shot = []
    for level, found in other["levels"].items():
        low, high = found["strict"]["interval_95"]
        zero_shot.append([f"the model at {level}", f"{found['strict']['accuracy']:.1f} ({low:.1f} to {high:.1f})"])
    for name, by_group in other["controls"].items():
        zero_shot.append([f"{name}; the model at {STANDARD:g} is ahead by", str(Standing(**by_group["all"]))])
    zero_shot.append([agreeing, f"{other['people']['all']:.1f}"])

    errors, after = fitted["errors"], result["hpdv2, fitted likelihood"]["levels"]
    calibrated = [
        ["AGIQA-3K, as trained", *(before for before, _ in errors.values())],
        ["AGIQA-3K, fitted", *(found for _, found in errors.values())],
        ["HPDv2, as trained", *(other["levels"][level]["calibration_error"] for level in errors)],
        ["HPDv2, fitted to AGIQA-3K", *(after[level]["calibration_error"] for level in errors)],
    ]
    likelihood = fitted["likelihood"]
    return "\n\n".join([
        f"The paper's choices beside others, {seeds} seeds on one backbone; levels of the runs trained as it does:",
        table(["claim", "paper, points", "ours, points (95 % interval)", "verdict"], claims),
        table([f"accuracy, % ({seeds} seeds)", *columns], accuracies),
        table(
            ["scored at", *levels["accuracy"]],
            [["accuracy, %", *(f"{100 * np.mean(row):.1f}" for row in levels["accuracy"].values())]],
        ),
        "Controls, %, and by how much the model that trained longest is ahead (95 % interval over prompts):",
        table(["AGIQA-3K, held-out prompts", *groups], controls),
        table(["AGIQA-3K, held-out prompts, the model at", "accuracy, %", "SRCC", "PLCC", "KRCC"], correlations),
        table([f"HPDv2, {other['prompts']} prompts, not trained on", "all"], zero_shot),
        f"Probabilities beside the share of people who prefer the image, by sigma. k = {likelihood['k']:.3g} and "
        f"sigma_0 = {likelihood['sigma_0']:.3g} were fitted to half of AGIQA-3K's held-out prompts, the others judge "
        f"({fitted['judged_by']} pairs a level; `evaluate --calibrate`); HPDv2's people are ten a prompt:",
        table(
            ["expected calibration error, %", *errors],
            [[name, *(f"{error:.1f}" for error in row)] for name, *row in calibrated],
        ),
        f"({result['conditions']}.)",
    ])  # fmt: skip


def main(argv: list[str]) -> None:
    values = flags.FLAGS
    if values.run is not None:
        if None in (values.sweep, values.agiqa, values.hpdv2, values.taesd3):
            raise app.UsageError("--run goes with --sweep, --agiqa, --hpdv2 and --taesd3")
        enable_compilation_cache()
        paths = (pathlib.Path(path) for path in (values.run, values.sweep, values.agiqa, values.hpdv2))
        RESULT.write_text(json.dumps(measure(*paths, values.taesd3), indent=1) + "\n")
    head, rest = DOCUMENT.read_text().split(START)
    text = as_markdown(json.loads(RESULT.read_text()))
    DOCUMENT.write_text(f"{head}{START}\n{text}\n{END}{rest.split(END)[1]}")
    print(text)


if __name__ == "__main__":
    flags.DEFINE_string("run", None, "Workdir of configs/agiqa.py.")
    flags.DEFINE_string("sweep", None, "Workdir of configs/agiqa_ablation.py.")
    flags.DEFINE_string("agiqa", None, "Directory of AGIQA-3K.")
    flags.DEFINE_string("hpdv2", None, "Directory of HPDv2's rankings.")
    flags.DEFINE_string("taesd3", None, "Directory of TAESD3.")
    app.run(main)
