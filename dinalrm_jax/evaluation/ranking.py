"""Scored images in their ranking: as rows, a table, CSV and a contact sheet."""

import csv
import dataclasses
import io
import json
import pathlib
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from dinalrm_jax.data.generated import KEYWORD, SHEET
from dinalrm_jax.data.images import read_rgb
from dinalrm_jax.evaluation.plots import new_figure, save
from dinalrm_jax.evaluation.scoring import ImageScores, normalize, ranks


@dataclasses.dataclass(frozen=True)
class RankedImage:
    """An image's place among those of its prompt."""

    rank: int
    score: float
    image: str
    prompt: str


@dataclasses.dataclass(frozen=True)
class ScoredImage(RankedImage):
    """By a reward model; `standard_error` is of the score's mean over noise draws, where there are several."""

    standard_error: float | None
    normalized: float


HEADINGS = {"standard_error": "± s.e."}  # of what a table shows under another name


def in_order(prompts: Sequence[str], scores: Sequence[float] | np.ndarray) -> list[tuple[int, int]]:
    """(rank, index) of images, ranked within their prompt, prompts in their order; without those scored NaN."""
    placed = []
    for prompt in dict.fromkeys(prompts):
        members = [i for i, each in enumerate(prompts) if each == prompt and not np.isnan(scores[i])]
        placed += sorted(zip(ranks([scores[i] for i in members]), members))
    return placed


def scored_rows(prompts: Sequence[str], images: Sequence[str], found: ImageScores) -> list[ScoredImage]:
    """A reward model's scores, ranked."""
    scores = found.scores[:, 0]
    mean, draws = scores.mean(axis=1), scores.shape[1]
    error = scores.std(axis=1, ddof=1) / np.sqrt(draws) if draws > 1 else np.full(len(scores), np.nan)
    return [
        ScoredImage(
            rank, float(mean[i]), images[i], prompts[i], float(error[i]) if draws > 1 else None,
            float(normalize(mean[i])),
        )
        for rank, i in in_order(prompts, mean)
    ]  # fmt: skip


def as_table(rows: Sequence[RankedImage]) -> str:
    """For the terminal; a heading for every prompt where there are several."""
    several = len({row.prompt for row in rows}) > 1
    known = [field.name for field in dataclasses.fields(RankedImage)]
    more = [field.name for field in dataclasses.fields(rows[0]) if field.name not in known]
    more = [name for name in more if getattr(rows[0], name) is not None]
    headings = "".join(f"  {HEADINGS.get(name, name):>8}" for name in more)
    lines = []
    for prompt in dict.fromkeys(row.prompt for row in rows):
        lines += [shortened(prompt, 100)] if several and prompt else []
        lines.append(f"{'rank':>4}  {'score':>8}{headings}  image")
        for row in rows:
            if row.prompt == prompt:
                values = "".join(f"  {getattr(row, name):>{max(8, len(HEADINGS.get(name, name)))}.3f}" for name in more)
                lines.append(f"{row.rank:>4}  {row.score:>+8.3f}{values}  {row.image}")
        lines += [""] if several else []
    return "\n".join(lines).rstrip()


def shortened(text: str, length: int) -> str:
    """On one line, cut where it is longer."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 3] + "..."


def as_csv(rows: Sequence[RankedImage]) -> str:
    """A header and a line an image."""
    text = io.StringIO()
    names = [field.name for field in dataclasses.fields(rows[0])] if rows else []
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(dataclasses.asdict, rows))
    return text.getvalue()


def draw_sheet(path: pathlib.Path, rows: Sequence[RankedImage], columns: int = 5, scored: bool = True) -> None:
    """A contact sheet: images in rank order, prompt by prompt, with their scores where they are `scored`."""
    groups = [[row for row in rows if row.prompt == prompt] for prompt in dict.fromkeys(row.prompt for row in rows)]
    heights = [-(-len(group) // columns) for group in groups]
    wide = min(columns, max(map(len, groups)))
    figure = new_figure(2.3 * max(wide, 2), 2.6 * sum(heights) + 0.5 * len(groups))
    ratios = [2.6 * height + 0.5 for height in heights]
    parts: Any = figure.subfigures(len(groups), 1, squeeze=False, height_ratios=ratios)[:, 0]
    for part, group, height in zip(parts, groups, heights):
        title = textwrap.fill(shortened(group[0].prompt, 60 * max(wide, 2)), 32 * max(wide, 2))
        part.suptitle(title, x=0.01, ha="left", fontsize=10, parse_math=False)
        for place, axis in enumerate(part.subplots(height, wide, squeeze=False).flat):
            axis.set_axis_off()
            if place < len(group):
                row = group[place]
                thumbnail = Image.fromarray(read_rgb(row.image))
                thumbnail.thumbnail((320, 320))
                axis.imshow(thumbnail)
                spread = row.standard_error if isinstance(row, ScoredImage) else None
                error = "" if spread is None else f" ± {spread:.2f}"
                axis.set_title(f"{row.rank}.  {row.score:+.2f}{error}" if scored else f"{row.rank}", fontsize=11)
                name = shortened(pathlib.Path(row.image).name, 34)
                below: dict[str, Any] = {"ha": "center", "va": "top", "transform": axis.transAxes}
                axis.text(0.5, -0.03, name, fontsize=7, parse_math=False, **below)
    save(figure, path, {KEYWORD: json.dumps(SHEET)})
