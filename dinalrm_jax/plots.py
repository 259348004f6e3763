"""How this project's plots look. Figures are matplotlib's own objects, which need no display and no pyplot."""

import pathlib

from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, BETTER, WORSE, ENSEMBLE = "#222222", "#1b7f4b", "#b3372f", "#2c5aa0"


def chance_line(axes: Axes) -> None:
    """Where a coin would be, in per cent."""
    axes.axhline(50, color="#999999", linewidth=0.8, linestyle=":")


def save(figure: Figure, path: pathlib.Path) -> None:
    figure.savefig(path, dpi=110)
