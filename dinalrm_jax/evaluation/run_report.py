"""What a run leaves for people: tables, plots and a contact sheet of held-out pairs."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from dinalrm_jax.data.mixture import AnyRecords
from dinalrm_jax.encoders.load import ImageCodec
from dinalrm_jax.evaluation.accuracy import pair_counts
from dinalrm_jax.evaluation.comparison import Comparison
from dinalrm_jax.evaluation.controls import Standing, control_table, standing
from dinalrm_jax.evaluation.markdown import table
from dinalrm_jax.evaluation.pairs import PairScores
from dinalrm_jax.evaluation.plots import FEW, AccuracyCurve, plot_accuracy_by_sigma, plot_learning_curve, plot_pairs
from dinalrm_jax.evaluation.scoring import Level, level_name

SHARED_NOISE, EXCHANGED_PROMPTS = "all, shared noise", "all, prompts exchanged"  # columns of the table


def groups(scores: PairScores) -> dict[str, np.ndarray]:
    """Masks of all pairs and of each group; a pair's group is its kind up to the slash."""
    prefixes = np.array([kind.split("/")[0] for kind in scores.kinds])
    names = sorted(set(prefixes))
    return {"all": np.ones(len(prefixes), bool), **({name: prefixes == name for name in names} if names[1:] else {})}


def accuracy_table(scores: PairScores, others: Mapping[str, PairScores]) -> str:
    """A Markdown table, one line a level, one column a group of pairs, and one for each of `others`; per cent."""
    masks = groups(scores)
    names = [f"{name} ({mask.sum()})" for name, mask in masks.items()] + list(others)
    rows = []
    for level in scores.levels:
        found = [scores.accuracy(level, mask) for mask in masks.values()]
        found += [other.accuracy(level) for other in others.values()]
        rows.append([level_name(level), *(f"{100 * accuracy:.1f}" for accuracy in found)])
    return table(["sigma", *names], rows)


def kind_table(scores: PairScores, level: Level) -> str:
    """A Markdown table of one level's accuracy by kind of pair."""
    masks = {kind: scores.kinds == kind for kind in sorted(set(scores.kinds))}
    rows = [[kind, str(mask.sum()), f"{100 * scores.accuracy(level, mask):.1f}"] for kind, mask in masks.items()]
    return table([f"kind, at {level_name(level)}", "pairs", "accuracy"], rows)


def standings(scores: PairScores, level: Level, controls: Mapping[str, np.ndarray]) -> dict[str, dict[str, Standing]]:
    """Each control beside the model at one level, by group of pairs; controls as (P, 2) scores of the pairs."""
    ours, prompts = scores.of_pairs(level), [str(prompt) for prompt in scores.records[:, 2]]
    return {
        name: {
            group: standing([pair_counts(ours, mask)], pair_counts(theirs, mask), prompts)
            for group, mask in groups(scores).items()
        }
        for name, theirs in controls.items()
    }


def write_report(
    directory: pathlib.Path,
    records: AnyRecords,
    scores: PairScores,
    shared: PairScores,
    exchanged: PairScores | None,
    controls: Mapping[str, np.ndarray],
    headline: float,
    history: list[dict],
    codec: ImageCodec | None,
    weights: str,
    best: tuple[int, float] | None = None,
    note: str | None = None,
) -> str:
    """Writes tables, results.json and plots into `directory`; returns the text that `report.md` holds.

    Args:
        directory: made if it is not there.
        records: what was evaluated on, for the contact sheet.
        scores: single levels in increasing order, then ensembles; every image with its own noise.
        shared: the same with one noise for all images.
        exchanged: of every pair under another pair's prompt, images with their own noise; None: there is no other.
        controls: (P, 2) scores of the pairs by what stands beside the model,
        headline: at this level.
        history: the reward stage's lines of metrics.jsonl.
        codec: what draws the contact sheet's images; None: no sheet.
        weights: the model's digest.
        best: step and accuracy of the best checkpoint among those evaluated while it trained.
        note: what readers must know before they trust the pictures and numbers.
    """
    directory.mkdir(parents=True, exist_ok=True)
    ensemble = scores.levels[-1]
    title = f"Held-out pair accuracy, % (chance 50, {len(scores.kinds)} pairs)"
    others = {SHARED_NOISE: shared} | ({} if exchanged is None else {EXCHANGED_PROMPTS: exchanged})
    sections = [
        f"{title}; every image has its own noise, but where all share one. With prompts exchanged, every pair stands "
        "under another pair's prompt: what is still right is right by the images alone",
        accuracy_table(scores, others),
    ]
    if len(scores.kinds) < FEW:
        sections.insert(0, f"{len(scores.kinds)} pairs only: such numbers are chance.")
    if note is not None:
        sections.insert(0, f"Note: {note}.")
    if len(set(scores.kinds)) > 1:
        sections.append(kind_table(scores, ensemble))
    measured = [row for row in history if "eval_accuracy" in row]
    if best is not None and measured:
        sections.append(
            f"The model (weights {weights}) is that of the last step. Of those evaluated while it trained, the first "
            f"with the highest accuracy has {100 * best[1]:.1f} % at sigma {measured[-1]['eval_sigma']:g}: "
            f"reward/best/{best[0]}"
        )
    beside = standings(scores, headline, controls)
    if beside:
        sections.append(
            f"What orders the same pairs without reading their prompts, %; then by how much the model at {headline:g} "
            "is ahead of it (95 % interval over prompts)"
        )
        sections.append(control_table(beside, {name: int(mask.sum()) for name, mask in groups(scores).items()}))
    text = "\n\n".join(sections) + "\n"
    (directory / "report.md").write_text(text)
    results = {
        level_name(level): {name: scores.accuracy(level, mask) for name, mask in groups(scores).items()}
        | {name: other.accuracy(level) for name, other in others.items()}
        for level in scores.levels
    }
    of_controls = {
        name: {group: dataclasses.asdict(found) for group, found in by_group.items()}
        for name, by_group in beside.items()
    }
    text_of_results = json.dumps({**results, "controls, per cent": of_controls}, indent=1)
    (directory / "results.json").write_text(text_of_results + "\n")
    plot_learning_curve(directory / "learning_curve.png", history)
    curves = [_curve(name, scores, mask) for name, mask in groups(scores).items()]
    plot_accuracy_by_sigma(directory / "accuracy_by_sigma.png", "Held-out pairs", curves, len(scores.kinds))
    if codec is not None:
        plot_pairs(directory / "pairs.png", records, scores, ensemble, codec, note)
    return text


def _curve(label: str, scores: PairScores, mask: np.ndarray) -> AccuracyCurve:
    """A group's accuracies, per cent."""
    accuracies = {level: 100 * scores.accuracy(level, mask) for level in scores.levels}
    return AccuracyCurve(
        label,
        {level: accuracy for level, accuracy in accuracies.items() if not isinstance(level, tuple)},
        {level_name(level): accuracy for level, accuracy in accuracies.items() if isinstance(level, tuple)},
    )


def sweep_table(accuracies: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """A Markdown table of run -> one {level: accuracy} a seed: mean and standard deviation, in per cent."""
    levels, seeds = list(next(iter(accuracies.values()))[0]), len(next(iter(accuracies.values())))
    lines = []
    for name, rows in accuracies.items():
        columns = [100 * np.array([row[level] for row in rows]) for level in levels]
        cells = [f"{column.mean():.1f} ± {column.std(ddof=min(1, seeds - 1)):.1f}" for column in columns]
        lines.append([name, *cells])
    title = f"Held-out pair accuracy, %, mean ± standard deviation over {seeds} seeds"
    return f"{title}\n\n{table(['trained', *(f'at {level}' for level in levels)], lines)}\n"


def comparison_table(comparisons: Mapping[str, Mapping[str, Comparison]], reference: str) -> str:
    """A Markdown table of runs beside the reference: by how many points they differ, and whether that is told."""
    levels = list(dict.fromkeys(level for row in comparisons.values() for level in row))
    rows = [[name, *(str(row.get(level, "")) for level in levels)] for name, row in comparisons.items()]
    title = f"Points of accuracy more than {reference!r}, and their 95 % interval over seeds and prompts"
    return f"{title}\n\n{table(['trained', *(f'at {level}' for level in levels)], rows)}\n"
