"""Scores and ranks image files.

    python -m dinalrm_jax.score --checkpoint C [--base-model B] --prompt "a red fox" fox_1.png fox_2.png directory/

Prints a table, best image first; --json, --csv and --sheet (a contact sheet in rank order) write files, and
`--json -` and `--csv -` print to standard output instead of the table. With --prompt-file, a text file, its
one line is the prompt of all images, or each line that of one image, and images are ranked within their
prompt. A file that cannot be read is reported and the others are scored; the exit status is 1 then.
"""

import csv
import dataclasses
import io
import json
import pathlib
import sys
import textwrap
from collections.abc import Sequence

import numpy as np
from absl import app, flags, logging
from PIL import Image
from tqdm import tqdm

from dinalrm_jax.data.buckets import parse_bucket
from dinalrm_jax.data.images import read_rgb
from dinalrm_jax.devices.compilation import enable_compilation_cache
from dinalrm_jax.disk import check_writable
from dinalrm_jax.evaluation.plots import new_figure, save
from dinalrm_jax.evaluation.scoring import ImageScores, score_images
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.noise import NoiseDraw
from dinalrm_jax.reward_model import RewardModel, normalize, ranks

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}


@dataclasses.dataclass(frozen=True)
class ScoredImage:
    """An image's place among those of its prompt; `standard_error` is of the score's mean over noise draws."""

    rank: int
    score: float
    standard_error: float | None
    normalized: float
    image: str
    prompt: str


def find_images(names: Sequence[str]) -> list[str]:
    """Files as given, and the images of directories, sorted by name.

    Raises:
        ConfigError: a directory without images, or nothing at all.
    """
    found = []
    for name in names:
        path = pathlib.Path(name)
        if path.is_dir():
            inside = sorted(str(file) for file in path.iterdir() if file.suffix.lower() in EXTENSIONS)
            if not inside:
                raise ConfigError(f"the directory {name} holds no images ({', '.join(sorted(EXTENSIONS))})")
            found += inside
        else:
            found.append(name)
    if not found:
        raise ConfigError("name at least one image or directory of images to score")
    return found


def read_prompts(prompt: str | None, file: str | None, count: int) -> list[str]:
    """One prompt an image.

    Raises:
        ConfigError: not exactly one source of prompts, or a file whose lines do not match the images.
    """
    if (prompt is None) == (file is None):
        raise ConfigError("give either --prompt or --prompt-file")
    if prompt is not None:
        return count * [prompt]
    lines = pathlib.Path(file).read_text().splitlines()
    if len(lines) not in (1, count):
        raise ConfigError(f"{file} has {len(lines)} lines for {count} images; it takes one line for all, or one each")
    return lines if len(lines) == count else count * lines


def table_rows(prompts: Sequence[str], images: Sequence[str], found: ImageScores) -> list[ScoredImage]:
    """The scored images, ranked within their prompt, prompts in their order, best image first."""
    scores = found.scores[:, 0]
    mean, draws = scores.mean(axis=1), scores.shape[1]
    error = scores.std(axis=1, ddof=1) / np.sqrt(draws) if draws > 1 else np.full(len(scores), np.nan)
    rows = []
    for prompt in dict.fromkeys(prompts):
        members = [i for i in range(len(images)) if prompts[i] == prompt and i not in found.problems]
        placed = zip(ranks([mean[i] for i in members]), members)
        rows += [
            ScoredImage(
                rank,
                float(mean[i]),
                float(error[i]) if draws > 1 else None,
                float(normalize(mean[i])),
                images[i],
                prompt,
            )
            for rank, i in sorted(placed)
        ]
    return rows


def as_table(rows: Sequence[ScoredImage]) -> str:
    """For the terminal; a heading for every prompt where there are several."""
    several = len({row.prompt for row in rows}) > 1
    lines = []
    for prompt in dict.fromkeys(row.prompt for row in rows):
        lines += [shortened(prompt, 100)] if several else []
        lines.append(
            f"{'rank':>4}  {'score':>8}{'  ± s.e.' if rows[0].standard_error is not None else ''}  normalized  image"
        )
        for row in rows:
            if row.prompt == prompt:
                error = "" if row.standard_error is None else f"  {row.standard_error:6.3f}"
                lines.append(f"{row.rank:>4}  {row.score:>+8.3f}{error}  {row.normalized:>10.3f}  {row.image}")
        lines += [""] if several else []
    return "\n".join(lines).rstrip()


def shortened(text: str, length: int) -> str:
    """On one line, cut where it is longer."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 3] + "..."


def as_csv(rows: Sequence[ScoredImage]) -> str:
    """A header and a line an image."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(ScoredImage)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(dataclasses.asdict, rows))
    return text.getvalue()


def draw_sheet(path: pathlib.Path, rows: Sequence[ScoredImage], columns: int = 5) -> None:
    """A contact sheet: images in rank order with their scores, prompt by prompt."""
    groups = [[row for row in rows if row.prompt == prompt] for prompt in dict.fromkeys(row.prompt for row in rows)]
    heights = [-(-len(group) // columns) for group in groups]
    wide = min(columns, max(map(len, groups)))
    figure = new_figure(2.3 * max(wide, 2), 2.6 * sum(heights) + 0.5 * len(groups))
    parts = np.atleast_1d(figure.subfigures(len(groups), 1, height_ratios=[2.6 * height + 0.5 for height in heights]))
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
                error = "" if row.standard_error is None else f" ± {row.standard_error:.2f}"
                axis.set_title(f"{row.rank}.  {row.score:+.2f}{error}", fontsize=11)
                name = shortened(pathlib.Path(row.image).name, 34)
                place = {"ha": "center", "va": "top", "transform": axis.transAxes}
                axis.text(0.5, -0.03, name, fontsize=7, parse_math=False, **place)
    save(figure, path)


def write(target: str | None, text: str) -> bool:
    """Writes to a file, or to standard output for "-"; whether it was the latter."""
    if target == "-":
        print(text, end="")
    elif target is not None:
        pathlib.Path(target).write_text(text)
    return target == "-"


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    enable_compilation_cache()
    values = flags.FLAGS
    try:
        for target in (values.json, values.csv, values.sheet):
            if target not in (None, "-"):
                check_writable(target)
        if values.sheet is not None and pathlib.Path(values.sheet).suffix.lower() not in EXTENSIONS:
            raise ConfigError(f"--sheet {values.sheet} is not an image's name; try sheet.png")
        images = find_images(argv[1:])
        prompts = read_prompts(values.prompt, values["prompt-file"].value, len(images))
        size = parse_bucket(values.size) if values.size is not None else None
        levels = [tuple(map(float, values.ensemble)) if values.ensemble else values.sigma]
        model = RewardModel.from_pretrained(
            values.checkpoint, values["base-model"].value, values.dtype, revision=values.revision
        )
        with tqdm(total=len(images), desc="scoring", unit="image", disable=len(images) < 2) as bar:
            found = score_images(
                model,
                prompts,
                images,
                levels,
                [NoiseDraw(values.seed + number, shared=True) for number in range(values.samples)],
                size=size,
                batch_size=values["batch-size"].value,
                progress=bar.update,
            )
    except (ValueError, OSError) as error:  # ours are ValueErrors
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)
    for index, problem in sorted(found.problems.items()):
        print(f"not scored: {images[index]}: {problem}", file=sys.stderr)
    rows = table_rows(prompts, images, found)
    as_json = json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n"
    printed = [write(values.json, as_json), write(values.csv, as_csv(rows))]
    if rows and not any(printed):
        print(as_table(rows))
    if rows and values.sheet is not None:
        draw_sheet(pathlib.Path(values.sheet), rows)
    sys.exit(1 if found.problems else 0)


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "Checkpoint, released, native or of a training run: a directory or hub id.")
    flags.DEFINE_string("revision", None, "Commit, tag or branch of a checkpoint that is a hub id.")
    flags.DEFINE_string("base-model", None, "SD3 pipeline with VAE and text encoders; directory or hub id.")
    flags.DEFINE_string("prompt", None, "The prompt of all images.")
    flags.DEFINE_string("prompt-file", None, "A text file: one line for all images, or one line an image.")
    flags.DEFINE_float("sigma", 0.4, "Noise level in [0, 1].")
    flags.DEFINE_list("ensemble", None, "Levels of the token-level ensemble instead, for instance 0.2,0.5,0.7.")
    flags.DEFINE_integer("seed", 0, "Of the noise.")
    flags.DEFINE_integer("samples", 1, "Average over so many draws of the noise; above 1 with standard error.", 1)
    flags.DEFINE_string("size", None, "HEIGHTxWIDTH to resize all images to; else their own, large ones scaled down.")
    flags.DEFINE_integer("batch-size", 8, "Images in one program.", 1)
    flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Compute dtype.")
    flags.DEFINE_string("json", None, "Write JSON to this file; - for standard output.")
    flags.DEFINE_string("csv", None, "Write CSV to this file; - for standard output.")
    flags.DEFINE_string("sheet", None, "Draw a contact sheet in rank order to this PNG.")
    flags.mark_flag_as_required("checkpoint")
    app.run(main)
