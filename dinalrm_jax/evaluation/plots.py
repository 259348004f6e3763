"""The plots of all reports, one a question, and how they look.

Figures are matplotlib's own objects, which need no display and no pyplot.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dinalrm_jax.data.mixture import AnyRecords
from dinalrm_jax.encoders.load import ImageCodec
from dinalrm_jax.evaluation.pairs import PairScores
from dinalrm_jax.evaluation.scoring import Level, level_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

INK, BETTER, WORSE, ENSEMBLE = "#222222", "#1b7f4b", "#b3372f", "#2c5aa0"
FEW = 50  # pairs, of which a coin flips 50 +- 14 % right in 19 of 20 cases


def new_figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    """An empty figure, in inches."""
    from matplotlib.figure import Figure  # slow to import, and needed at the end of a command, if at all

    return Figure(figsize=(width, height), layout=layout)


def colormap(name: str) -> Colormap:
    """One of matplotlib's, from [0, 1] to colours."""
    import matplotlib

    return matplotlib.colormaps[name]


def chance_line(axes: Axes) -> None:
    """Where a coin would be, in per cent."""
    axes.axhline(50, color="#999999", linewidth=0.8, linestyle=":")


def save(figure: Figure, path: pathlib.Path, texts: dict[str, str] | None = None) -> None:
    """Writes it; texts are for PNG files, the others have none."""
    figure.savefig(path, dpi=110, metadata=texts if path.suffix.lower() == ".png" else None)


@dataclasses.dataclass(frozen=True)
class AccuracyCurve:
    """What is drawn of one group of pairs, or one rule, against the noise level; per cent.

    Attributes:
        label: in the legend.
        singles: accuracy by single level.
        ensembles: accuracy by an ensemble's name.
        intervals: (low, high) by single level, where they are known.
    """

    label: str
    singles: Mapping[float, float]
    ensembles: Mapping[str, float]
    intervals: Mapping[float, tuple[float, float]] | None = None


def plot_accuracy_by_sigma(path: pathlib.Path, title: str, curves: Sequence[AccuracyCurve], pairs: int) -> None:
    """At which noise level is it right how often? Single levels as points, ensembles as dashed lines across."""
    figure = new_figure(6.4, 3.8)
    axes = figure.subplots()
    lowest = 50.0
    for curve, color in zip(curves, itertools.cycle((INK, WORSE, BETTER, ENSEMBLE, "#8a5aa0", "#a07d2c"))):
        sigmas = sorted(curve.singles)
        axes.plot(
            sigmas, [curve.singles[sigma] for sigma in sigmas], "o-", color=color, label=curve.label, markersize=4
        )
        if curve.intervals and sigmas:
            low, high = zip(*(curve.intervals[sigma] for sigma in sigmas))
            axes.fill_between(sigmas, low, high, color=color, alpha=0.12, linewidth=0)
        for name, accuracy in curve.ensembles.items():
            label = f"{curve.label}, {name}" if curves[1:] else name
            axes.axhline(accuracy, color=color, linestyle="--", linewidth=0.9, label=label)
        lowest = min([lowest, *curve.singles.values(), *curve.ensembles.values()])
    chance_line(axes)
    axes.set(xlabel="noise level sigma", ylabel="pair accuracy, %", ylim=(min(40, lowest - 5), 101))
    axes.set_title(with_warning(title, pairs), fontsize=10)
    # Beside the axes: curves may run anywhere in them.
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    save(figure, path)


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
    right.set_ylim(min(40, right.get_ylim()[0]), 101)
    right.legend(frameon=False, loc="lower right")
    save(figure, path)


def plot_pairs(
    path: pathlib.Path,
    records: AnyRecords,
    scores: PairScores,
    level: Level,
    codec: ImageCodec,
    note: str | None = None,
    count: int = 12,
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
        halves: Any = cells[place // columns, place % columns].subgridspec(1, 2, wspace=0.06).subplots()
        for axis, index, score in zip(halves, (chosen, rejected), (scores.chosen, scores.rejected)):
            axis.imshow(codec.decode(records.images[int(index)].latents[None])[0])
            axis.set_title(f"{score[row, pair]:+.2f}", fontsize=10, color=BETTER if right else WORSE, pad=2)
            axis.set_axis_off()
        lines = [*textwrap.wrap(records.prompts[int(prompt)].text, 52)[:2], f"({scores.kinds[pair]})"]
        halves[0].text(0, -0.05, "\n".join(lines), fontsize=7.5, va="top", transform=halves[0].transAxes)
    title = f"Held-out pairs, preferred image left; scores at {level_name(level)}, red: wrong order"
    figure.suptitle(title if note is None else f"{title}\n({note})", fontsize=10)
    save(figure, path)


@dataclasses.dataclass(frozen=True)
class ReliabilityCurve:
    """Of one level: how sure the likelihood is, and how often that order is people's; shares in bins of equal count.

    Attributes:
        label: in the legend.
        confidence, accuracy: (bins,) in [0, 1].
    """

    label: str
    confidence: np.ndarray
    accuracy: np.ndarray


def plot_reliability(path: pathlib.Path, title: str, curves: Sequence[ReliabilityCurve], pairs: int) -> None:
    """Is it right as often as it says? The diagonal is a likelihood that knows how sure it may be."""
    figure = new_figure(6.0, 4.2)
    axes = figure.subplots()
    axes.plot([50, 100], [50, 100], color="#999999", linewidth=0.8, linestyle=":")
    for curve, color in zip(curves, colormap("viridis")(np.linspace(0, 0.85, len(curves)))):
        axes.plot(100 * curve.confidence, 100 * curve.accuracy, "o-", color=color, label=curve.label, markersize=4)
    axes.set(xlabel="predicted probability of the order, %", ylabel="pairs in that order, %", ylim=(0, 102))
    axes.set_title(with_warning(title, pairs), fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    save(figure, path)


def plot_scores(path: pathlib.Path, title: str, chosen: np.ndarray, rejected: np.ndarray) -> None:
    """How far apart are the scores of preferred and other images? Histograms of both, and of the margins."""
    figure = new_figure(8.4, 3.2)
    left, right = figure.subplots(1, 2)
    edges = np.histogram_bin_edges(np.concatenate([chosen, rejected]), 40)
    left.hist(chosen, edges, color=BETTER, alpha=0.55, label="preferred")
    left.hist(rejected, edges, color=WORSE, alpha=0.55, label="other")
    left.set(xlabel="score", ylabel="pairs")
    left.legend(frameon=False)
    right.hist(chosen - rejected, 40, color=INK, alpha=0.7)
    right.axvline(0, color=WORSE, linewidth=1)
    right.set(xlabel="score of the preferred less the other's", ylabel="pairs")
    figure.suptitle(with_warning(title, len(chosen)), fontsize=10)
    save(figure, path)


def with_warning(title: str, pairs: int) -> str:
    """A title that says where there are too few pairs to conclude anything from."""
    return title if pairs >= FEW else f"{title}\n{pairs} pairs only: such numbers are chance"
