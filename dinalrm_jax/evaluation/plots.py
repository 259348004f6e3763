"""How this project's plots look. Figures are matplotlib's own objects, which need no display and no pyplot."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

INK, BETTER, WORSE, ENSEMBLE = "#222222", "#1b7f4b", "#b3372f", "#2c5aa0"


def new_figure(width: float, height: float, layout: str | None = "constrained") -> Figure:
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


def save(figure: Figure, path: pathlib.Path) -> None:
    figure.savefig(path, dpi=110)
