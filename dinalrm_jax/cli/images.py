"""What `score` and `judge` share: the images and prompts that they are told, and the ranking that they write."""

import dataclasses
import json
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence

from dinalrm_jax.cli.options import ImageOptions
from dinalrm_jax.data.files import ImageProblem
from dinalrm_jax.data.generated import SHEET, how_made
from dinalrm_jax.data.images import read_header
from dinalrm_jax.disk import check_writable
from dinalrm_jax.evaluation.ranking import RankedImage, as_csv, as_table, draw_sheet
from dinalrm_jax.mapping import ConfigError

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}


def check_outputs(options: ImageOptions) -> None:
    """Raises ConfigError or OSError where a file could not be written in the end."""
    for target in (options.json, options.csv, options.sheet):
        if target not in (None, "-"):
            check_writable(target)
    if options.sheet is not None and pathlib.Path(options.sheet).suffix.lower() not in EXTENSIONS:
        raise ConfigError(f"--sheet {options.sheet} is not an image's name; try sheet.png")


def find_images(names: Sequence[str]) -> list[str]:
    """Files as given, and the images of directories, sorted by name, without contact sheets of ours.

    Raises:
        ConfigError: a directory without images, or nothing at all.
    """
    found = []
    for name in names:
        path = pathlib.Path(name)
        if path.is_dir():
            inside = sorted(str(file) for file in path.iterdir() if file.suffix.lower() in EXTENSIONS)
            inside = [file for file in inside if how_made(file) != SHEET]
            if not inside:
                raise ConfigError(f"the directory {name} holds no images ({', '.join(sorted(EXTENSIONS))})")
            found += inside
        else:
            found.append(name)
        if not path.exists() and re.fullmatch(r"[\d.]+", name):
            raise ConfigError(f"there is no image {name}; several levels stand between commas: --sigma 0.2,{name}")
    if not found:
        raise ConfigError("name at least one image or directory of images to score")
    return found


def prompts_of(options: ImageOptions, images: Sequence[str]) -> list[str]:
    """One prompt an image: those of the flags, or where there are none, what `generate` wrote into its images.

    An image that cannot be read has an empty one; it will be reported.

    Raises:
        ConfigError: a prompt without text, a file whose lines do not match the images, or an image that says none.
    """
    if options.prompt is not None:
        if not options.prompt.strip():
            raise ConfigError("--prompt is empty; give the text that the images are to show")
        return len(images) * [options.prompt]
    if options.prompt_file is None:
        return [_own_prompt(image) for image in images]
    lines = pathlib.Path(options.prompt_file).read_text().splitlines()
    if empty := [number for number, line in enumerate(lines, 1) if not line.strip()]:
        raise ConfigError(f"{options.prompt_file}, line {empty[0]}: an empty prompt")
    if len(lines) not in (1, len(images)):
        raise ConfigError(
            f"{options.prompt_file} has {len(lines)} lines for {len(images)} images; it takes one line for all, or "
            "one each"
        )
    return lines if len(lines) == len(images) else len(images) * lines


def _own_prompt(image: str) -> str:
    made = how_made(image)
    if made is not None and made != SHEET:
        return made["prompt"]
    try:
        read_header(image)
    except ImageProblem:
        return ""
    raise ConfigError(f"{image} does not say its prompt, as images of `generate` do; give --prompt or --prompt-file")


def write_ranking(
    options: ImageOptions, images: Sequence[str], rows: Sequence[RankedImage], problems: Mapping[int, str]
) -> int:
    """Writes and prints what the options ask for; the exit status, 1 where an image could not be read."""
    for index, problem in sorted(problems.items()):
        print(f"not scored: {images[index]}: {problem}", file=sys.stderr)
    as_json = json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n"
    printed = [_write(options.json, as_json), _write(options.csv, as_csv(rows))]
    if rows and not any(printed):
        print(as_table(rows))
    if rows and options.sheet is not None:
        draw_sheet(pathlib.Path(options.sheet), rows)
    return 1 if problems else 0


def _write(target: str | None, text: str) -> bool:
    """Writes to a file, or to standard output for "-"; whether it was the latter."""
    if target == "-":
        print(text, end="")
    elif target is not None:
        pathlib.Path(target).write_text(text)
    return target == "-"
