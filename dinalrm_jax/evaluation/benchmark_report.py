"""What an evaluation leaves: a table, JSON, the scores of every image as CSV, and plots."""

import csv
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from dinalrm_jax.data.records import RecordsError
from dinalrm_jax.evaluation.accuracy import (
    PAPER,
    RULES,
    Reliability,
    accuracies,
    intervals,
    rank_correlations,
    strict_pairs,
)
from dinalrm_jax.evaluation.benchmark import Evaluation
from dinalrm_jax.evaluation.calibration import level_pairs, reliability_of
from dinalrm_jax.evaluation.controls import Standing, control_table, standing
from dinalrm_jax.evaluation.markdown import table
from dinalrm_jax.evaluation.plots import (
    AccuracyCurve,
    ReliabilityCurve,
    plot_accuracy_by_sigma,
    plot_reliability,
    plot_scores,
)
from dinalrm_jax.evaluation.scoring import level_name
from dinalrm_jax.mapping import to_mapping
from dinalrm_jax.preference import LossConfig


def summarize(evaluation: Evaluation) -> dict[str, Any]:
    """Everything the report says, as JSON values; accuracies in per cent.

    Raises:
        RecordsError: no pair with a winner was scored.

    The accuracy of a level is the mean over the noise draws of which every image has its own, with their standard
    deviation; its interval is that of this mean under resampled prompts. "shared_noise" has the same of the draws
    that all images share.
    """
    if not evaluation.counts(0, 0).strict.sum():
        examples = "".join(f"\n  {name}: {problem}" for name, problem in list(evaluation.problems.items())[:3])
        raise RecordsError(
            f"{evaluation.name}: no pair that people did not tie was scored; {len(evaluation.problems)} images could "
            f"not be read{examples}"
        )
    prompts = [ranking.prompt for ranking in evaluation.rankings]
    by_level = {}
    for place, level in enumerate(evaluation.levels):
        found = by_level[level_name(level)] = _by_rule(evaluation, place, evaluation.draws_of(shared=False), prompts)
        if shared := evaluation.draws_of(shared=True):
            found["shared_noise"] = _by_rule(evaluation, place, shared, prompts)
        if evaluation.opinions:
            found["correlations"] = _correlations(evaluation, place)
        if not isinstance(level, tuple):
            found["calibration_error"] = _percent(_reliability(evaluation, place).calibration_error)
    counted = {group: int(evaluation.counts(0, 0, group).strict.sum()) for group in evaluation.groups}
    counted = {group: count for group, count in counted.items() if count}
    groups = (None, *counted)
    counts = evaluation.counts(0, 0)
    total = sum(len(ranking.images) * (len(ranking.images) - 1) // 2 for ranking in evaluation.rankings)
    return {
        "benchmark": evaluation.name,
        "weights": evaluation.weights,
        "rankings": len(evaluation.rankings),
        "prompts": len({ranking.prompt for ranking in evaluation.rankings}),
        "images_left_out": len(evaluation.problems),
        "pairs": int(counts.pairs.sum()),
        "pairs_left_out": int(total - counts.pairs.sum()),
        "pairs_tied_by_people": int((counts.pairs - counts.strict).sum()),
        "seeds": [evaluation.draws[place].seed for place in evaluation.draws_of(shared=False)],
        "likelihood": None if evaluation.likelihood is None else to_mapping(evaluation.likelihood),
        "levels": by_level,
        "groups": counted,
        "controls": _controls(evaluation, prompts, groups),
        "people": _people(evaluation, groups),
    }


def _controls(evaluation: Evaluation, prompts: list[str], groups: Sequence[str | None]) -> dict[str, dict[str, Any]]:
    """Each control beside the model at the first level, by group of pairs; where it scores all that the model does."""
    draws, found = evaluation.draws_of(shared=False), {}
    for name in evaluation.controls:
        found[name] = {}
        for group in groups:
            model = [evaluation.counts(0, draw, group) for draw in draws]
            control = evaluation.counts_of(name, group)
            if np.array_equal(control.strict, model[0].strict):
                found[name][group or "all"] = dataclasses.asdict(standing(model, control, prompts))
    return {name: by_group for name, by_group in found.items() if by_group}


def _people(evaluation: Evaluation, groups: Sequence[str | None]) -> dict[str, float] | None:
    """The share of people who agree with the order of a pair, by group; None where it is not known."""
    if not all(ranking.shares for ranking in evaluation.rankings):
        return None
    found = {}
    for group in groups:
        scores = [values[:, 0, 0] for values in evaluation.scores]
        if group is not None:
            scores = [np.where(mask, row, np.nan) for mask, row in zip(evaluation.groups[group], scores)]
        rankings = evaluation.rankings
        _, _, agreeing = strict_pairs([one.ranks for one in rankings], scores, [one.shares for one in rankings])
        found[group or "all"] = _percent(agreeing.mean())
    return found


def _correlations(evaluation: Evaluation, level: int) -> dict[str, float]:
    """`rank_correlations` over all images, the mean of the draws of which every image has its own noise."""
    opinions = -np.concatenate([ranking.ranks for ranking in evaluation.rankings])
    scores = np.concatenate([scores[:, level] for scores in evaluation.scores])
    scored = ~np.isnan(scores[:, 0])
    found = [rank_correlations(opinions[scored], scores[scored, draw]) for draw in evaluation.draws_of(shared=False)]
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


def _by_rule(evaluation: Evaluation, level: int, draws: list[int], prompts: list[str]) -> dict[str, Any]:
    """Accuracy by every rule at one level, over some draws; all by their places."""
    counts = [evaluation.counts(level, draw) for draw in draws]
    points = [accuracies(one) for one in counts]
    ends = intervals(counts, prompts)
    return {
        rule: {
            "accuracy": _percent(np.mean([point[rule] for point in points])),
            "standard_deviation": _percent(np.std([point[rule] for point in points], ddof=1)) if points[1:] else None,
            "interval_95": list(map(_percent, ends[rule])),
            "by_seed": [_percent(point[rule]) for point in points],
        }
        for rule in RULES
    }


def as_markdown(summary: dict[str, Any]) -> str:
    """The table, with the paper's numbers where it has some for this benchmark."""
    left_out = ""
    if summary["images_left_out"]:
        left_out = (
            f"; {summary['images_left_out']} images not read, {summary['pairs_left_out']} pairs left out for that"
        )
    seeds = len(summary["seeds"])
    shared = all("shared_noise" in by_rule for by_rule in summary["levels"].values())
    lines = [
        f"# {summary['benchmark']}",
        "",
        f"{summary['rankings']} rankings of {summary['prompts']} prompts, {summary['pairs']} pairs, of which people "
        f"tied {summary['pairs_tied_by_people']}{left_out}.",
        f"Pair accuracy, %: {f'mean ± standard deviation of {seeds} noise draws' if seeds > 1 else 'one noise draw'}, "
        "and the 95 % bootstrap interval over prompts. Every image has its own noise"
        + (", but in the last column, where all have the same." if shared else "."),
        "",
    ]
    rows = []
    for name, by_rule in summary["levels"].items():
        cells = []
        for found in [by_rule[rule] for rule in RULES] + ([by_rule["shared_noise"]["strict"]] if shared else []):
            spread = "" if found["standard_deviation"] is None else f" ± {found['standard_deviation']:.2f}"
            low, high = found["interval_95"]
            cells.append(f"{found['accuracy']:.2f}{spread} ({low:.1f} to {high:.1f})")
        rows.append([name, *cells])
    lines.append(table(["sigma", *RULES.values(), *(["strict, shared noise"] if shared else [])], rows))
    correlations = {name: found["correlations"] for name, found in summary["levels"].items() if "correlations" in found}
    if correlations:
        rows = [[name, *(f"{value:.3f}" for value in row.values())] for name, row in correlations.items()]
        lines += ["", "Correlation with people's mean opinions, over all images:", ""]
        lines.append(table(["sigma", "SRCC", "PLCC", "KRCC"], rows))
    if summary["controls"]:
        counts = {"all": summary["pairs"] - summary["pairs_tied_by_people"], **summary["groups"]}
        first = next(iter(summary["levels"]))
        standings = {
            name: {group: Standing(**values) for group, values in by_group.items()}
            for name, by_group in summary["controls"].items()
        }
        lines += [
            "",
            "What orders the same pairs without reading their prompts, %, and by how much the model at "
            f"{first} is ahead of it (95 % interval over prompts); what is fitted is fitted to other prompts:",
            "",
            control_table(standings, counts, summary["people"]),
        ]
    paper = next((rows for name, rows in PAPER.items() if summary["benchmark"].startswith(name)), None)
    if summary["weights"]:
        lines += ["", f"Weights {summary['weights']}."]
    if paper is not None:
        said = ", ".join(f"{model} {value:.2f}" for model, value in paper.items())
        lines += ["", f"The paper's table has, by a rule it does not name: {said}."]
    return "\n".join(lines) + "\n"


def write_evaluation(directory: pathlib.Path, evaluation: Evaluation) -> str:
    """Writes `results.json`, `report.md`, `scores.csv` and plots into an existing directory; the report's text."""
    summary = summarize(evaluation)
    text = as_markdown(summary)
    (directory / "results.json").write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n")
    (directory / "report.md").write_text(text)
    write_scores(directory / "scores.csv", evaluation)
    title, pairs = short_name(evaluation.name), int(evaluation.counts(0, 0).strict.sum())
    plot_accuracy_by_sigma(directory / "accuracy_by_sigma.png", title, _curves(summary), pairs)
    single = [place for place, level in enumerate(evaluation.levels) if not isinstance(level, tuple)]
    if single:
        named = f"{title}: reliability by sigma\n({likelihood_name(evaluation.likelihood)})"
        curves = [_reliability_curve(evaluation, place) for place in single]
        plot_reliability(directory / "reliability.png", named, curves, pairs)
    last = level_name(evaluation.levels[-1])
    plot_scores(directory / "scores.png", f"{title}, sigma {last}", *evaluation.pairs(len(evaluation.levels) - 1)[:2])
    return text


def write_scores(path: pathlib.Path, evaluation: Evaluation) -> None:
    """A line for every image of every ranking: its rank by people and its score at every level and seed."""
    columns = [
        f"{level_name(level)}, {'shared seed' if draw.shared else 'seed'} {draw.seed}"
        for level in evaluation.levels
        for draw in evaluation.draws
    ]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["ranking", "prompt", "image", "rank", *columns])
        for number, (ranking, scores) in enumerate(zip(evaluation.rankings, evaluation.scores)):
            for image, rank, row in zip(ranking.images, ranking.ranks, scores):
                values = ["" if np.isnan(value) else f"{value:.6g}" for value in row.ravel()]
                writer.writerow([number, ranking.prompt, image, rank, *values])


def short_name(name: str) -> str:
    """What a plot calls a benchmark: of records, the end of their directory's path."""
    directory, _, split = name.rpartition(" ")
    return f"{'/'.join(pathlib.Path(directory).parts[-2:])} {split}" if "/" in directory else name


def _curves(summary: dict[str, Any]) -> list[AccuracyCurve]:
    """By the rule of the headline and, where people tied pairs, by the released one."""
    rules = {"strict": "ties left out (M1)", "released": "released rule (M4)"}
    if not summary["pairs_tied_by_people"]:
        rules = {"strict": "all pairs"}  # the rules agree
    curves = []
    for rule, label in rules.items():
        rows = {name: row[rule] for name, row in summary["levels"].items()}
        single = {float(name): row for name, row in rows.items() if not name.startswith("ensemble")}
        curves.append(
            AccuracyCurve(
                label,
                {sigma: row["accuracy"] for sigma, row in single.items()},
                {name: row["accuracy"] for name, row in rows.items() if name.startswith("ensemble")},
                {sigma: tuple(row["interval_95"]) for sigma, row in single.items()} if rule == "strict" else None,
            )
        )
    return curves


def _reliability_curve(evaluation: Evaluation, place: int) -> ReliabilityCurve:
    found = _reliability(evaluation, place)
    label = f"{level_name(evaluation.levels[place])} (error {100 * found.calibration_error:.1f} %)"
    return ReliabilityCurve(label, found.confidence, found.accuracy)


def _reliability(evaluation: Evaluation, place: int) -> Reliability:
    """Of the probabilities at a single level, by the likelihood that the model has."""
    return reliability_of(level_pairs(evaluation, place), evaluation.likelihood or LossConfig())


def likelihood_name(config: LossConfig | None) -> str:
    """A likelihood as plots and tables write it."""
    if config is None:
        return "the paper's likelihood, as the checkpoint names none"
    if config.name == "bradley_terry":
        return "Bradley-Terry"
    if config.variance == "constant":
        return f"Thurstone, variance {config.constant_variance:g}"
    return f"Thurstone, variance {config.k:g} sigma² + {config.sigma_0**2:g}"


def _percent(value) -> float:
    return round(100 * float(value), 4)
