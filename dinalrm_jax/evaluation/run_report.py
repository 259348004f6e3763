"""What a run leaves for people: tables, plots and a contact sheet of held-out pairs."""

import json
import pathlib
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np

from dinalrm_jax.data.mixture import Mixture
from dinalrm_jax.data.records import Records
from dinalrm_jax.encoders.load import ImageCodec
from dinalrm_jax.evaluation.pairs import PairScores
from dinalrm_jax.evaluation.plots import BETTER, ENSEMBLE, INK, WORSE, chance_line, new_figure, save
from dinalrm_jax.evaluation.scoring import Level, level_name


def groups(scores: PairScores) -> dict[str, np.ndarray]:
    """Masks of all pairs and of each group; a pair's group is its kind up to the slash."""
    prefixes = np.array([kind.split("/")[0] for kind in scores.kinds])
    names = sorted(set(prefixes))
    return {"all": np.ones(len(prefixes), bool), **({name: prefixes == name for name in names} if names[1:] else {})}


def accuracy_table(scores: PairScores, shared: PairScores) -> str:
    """A Markdown table, one line a level, one column a group of pairs; per cent. The last is of `shared`."""
    masks = groups(scores)
    names = [f"{name} ({mask.sum()})" for name, mask in masks.items()] + ["all, shared noise"]
    lines = ["| sigma | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for level in scores.levels:
        found = [scores.accuracy(level, mask) for mask in masks.values()] + [shared.accuracy(level)]
        lines.append(f"| {level_name(level)} | " + " | ".join(f"{100 * accuracy:.1f}" for accuracy in found) + " |")
    return "\n".join(lines)


def kind_table(scores: PairScores, level: Level) -> str:
    """A Markdown table of one level's accuracy by kind of pair."""
    kinds = sorted(set(scores.kinds))
    lines = [f"| kind, at {level_name(level)} | pairs | accuracy |", "|---|---|---|"]
    for kind in kinds:
        mask = scores.kinds == kind
        lines.append(f"| {kind} | {mask.sum()} | {100 * scores.accuracy(level, mask):.1f} |")
    return "\n".join(lines)


def file_size_accuracy(records: Records | Mixture, scores: PairScores) -> float | None:
    """Accuracy of the image file's size as a score, or None where the images came from no files."""
    sizes = {int(i): records.images[int(i)].file_bytes for i in np.unique(scores.records[:, :2])}
    if not all(sizes.values()):
        return None
    return float(np.mean([sizes[int(chosen)] > sizes[int(rejected)] for chosen, rejected, _ in scores.records]))


def write_report(
    directory: pathlib.Path,
    records: Records | Mixture,
    scores: PairScores,
    shared: PairScores,
    history: list[dict],
    codec: ImageCodec | None,
    weights: str,
    best: tuple[int, float] | None = None,
) -> str:
    """Writes tables, results.json and plots into `directory`; returns the text that `report.md` holds.

    Args:
        directory: made if it is not there.
        records: what was evaluated on, for the contact sheet and the file-size baseline.
        scores: single levels in increasing order, then ensembles; every image with its own noise.
        shared: the same with one noise for all images.
        history: the reward stage's lines of metrics.jsonl.
        codec: what draws the contact sheet's images; None: no sheet.
        weights: the model's digest.
        best: step and accuracy of the best checkpoint among those evaluated while it trained.
    """
    directory.mkdir(parents=True, exist_ok=True)
    ensemble = scores.levels[-1]
    title = f"Held-out pair accuracy, % (chance 50, {len(scores.kinds)} pairs)"
    sections = [
        f"{title}; every image has its own noise, but in the last column, where all have the same",
        accuracy_table(scores, shared),
    ]
    if len(set(scores.kinds)) > 1:
        sections.append(kind_table(scores, ensemble))
    measured = [row for row in history if "eval_accuracy" in row]
    if best is not None and measured:
        sections.append(
            f"The model (weights {weights}) is that of the last step. Of those evaluated while it trained, the first "
            f"with the highest accuracy has {100 * best[1]:.1f} % at sigma {measured[-1]['eval_sigma']:g}: "
            f"reward/best/{best[0]}"
        )
    file_size = file_size_accuracy(records, scores)
    if file_size is not None:
        sections.append(f"Baseline without a model, the larger image file wins: {100 * file_size:.1f} %")
    text = "\n\n".join(sections) + "\n"
    (directory / "report.md").write_text(text)
    results = {
        level_name(level): {name: scores.accuracy(level, mask) for name, mask in groups(scores).items()}
        | {"all, shared noise": shared.accuracy(level)}
        for level in scores.levels
    }
    baseline = {} if file_size is None else {"file size": {"all": file_size}}
    (directory / "results.json").write_text(json.dumps({**results, **baseline}, indent=1) + "\n")
    plot_learning_curve(directory / "learning_curve.png", history)
    plot_accuracy_by_sigma(directory / "accuracy_by_sigma.png", scores)
    if codec is not None:
        plot_pairs(directory / "pairs.png", records, scores, ensemble, codec)
    return text


def plot_learning_curve(path: pathlib.Path, history: list[dict]) -> None:
    """Training loss and accuracy, with held-out accuracy where it was measured."""
    figure = new_figure(9, 3.2)
    left, right = figure.subplots(1, 2)
    steps = [row["step"] for row in history if "loss" in row]
    left.plot(steps, [row["loss"] for row in history if "loss" in row], color=INK)
    left.set(xlabel="step", ylabel="training loss")
    right.plot(steps, [100 * row["accuracy"] for row in history if "loss" in row], color=INK, label="training")
    measured = [row for row in history if "eval_accuracy" in row]
    if measured:
        right.plot(
            [row["step"] for row in measured],
            [100 * row["eval_accuracy"] for row in measured],
            "o-",
            color=ENSEMBLE,
            label=f"held-out, sigma {measured[0]['eval_sigma']:g}",
        )
    chance_line(right)
    right.set(xlabel="step", ylabel="pair accuracy, %")
    _accuracy_limits(right)
    right.legend(frameon=False, loc="lower right")
    save(figure, path)


def plot_accuracy_by_sigma(path: pathlib.Path, scores: PairScores) -> None:
    """Held-out accuracy against the single level, with the ensembles as lines across."""
    figure = new_figure(5.2, 3.6)
    axes = figure.subplots()
    single = [level for level in scores.levels if not isinstance(level, tuple)]
    colors = [INK, WORSE, BETTER]
    for (name, mask), color in zip(groups(scores).items(), colors):
        accuracies = [100 * scores.accuracy(level, mask) for level in single]
        axes.plot(single, accuracies, "o-", color=color, label=name, markersize=4)
        for level in scores.levels[len(single) :]:
            axes.axhline(100 * scores.accuracy(level, mask), color=color, linestyle="--", linewidth=0.9)
    chance_line(axes)
    axes.set(xlabel="noise level sigma", ylabel="held-out pair accuracy, %")
    _accuracy_limits(axes)
    axes.set_title("dashed: " + ", ".join(level_name(level) for level in scores.levels[len(single) :]), fontsize=9)
    axes.legend(frameon=False, loc="lower left")
    save(figure, path)


def plot_pairs(
    path: pathlib.Path, records: Records | Mixture, scores: PairScores, level: Level, codec: ImageCodec, count: int = 12
) -> None:
    """A contact sheet: held-out pairs, chosen left, with their scores; wrong orders in red."""
    row = scores.levels.index(level)
    shown = np.linspace(0, len(scores.kinds) - 1, min(count, len(scores.kinds))).round().astype(int)
    columns = 3
    rows = -(-len(shown) // columns)
    figure = new_figure(3.4 * columns, 0.4 + 2.25 * rows, layout=None)
    cells = figure.add_gridspec(rows, columns, wspace=0.12, hspace=0.45, left=0.02, right=0.98, bottom=0.07, top=0.92)
    for place, pair in enumerate(shown):
        chosen, rejected, prompt = scores.records[pair]
        right = scores.chosen[row, pair] > scores.rejected[row, pair]
        halves = cells[place // columns, place % columns].subgridspec(1, 2, wspace=0.06).subplots()
        for axis, index, score in zip(halves, (chosen, rejected), (scores.chosen, scores.rejected)):
            axis.imshow(codec.decode(records.images[int(index)].latents[None])[0])
            axis.set_title(f"{score[row, pair]:+.2f}", fontsize=10, color=BETTER if right else WORSE, pad=2)
            axis.set_axis_off()
        lines = [*textwrap.wrap(records.prompts[int(prompt)].text, 52)[:2], f"({scores.kinds[pair]})"]
        halves[0].text(0, -0.05, "\n".join(lines), fontsize=7.5, va="top", transform=halves[0].transAxes)
    title = f"Held-out pairs, preferred image left; scores at {level_name(level)}, red: wrong order"
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def _accuracy_limits(axes) -> None:
    """From below chance, and below the lowest point, to the top."""
    axes.set_ylim(min(40, axes.get_ylim()[0]), 101)


def sweep_table(accuracies: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """A Markdown table of run -> one {level: accuracy} a seed: mean and standard deviation, in per cent."""
    levels, seeds = list(next(iter(accuracies.values()))[0]), len(next(iter(accuracies.values())))
    lines = [
        f"Held-out pair accuracy, %, mean ± standard deviation over {seeds} seeds",
        "",
        "| trained | " + " | ".join(f"at {level}" for level in levels) + " |",
        "|---" * (len(levels) + 1) + "|",
    ]
    for name, rows in accuracies.items():
        columns = [100 * np.array([row[level] for row in rows]) for level in levels]
        cells = [f"{column.mean():.1f} ± {column.std(ddof=min(1, seeds - 1)):.1f}" for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
