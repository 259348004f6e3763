"""Scores and ranks image files.

    python -m dinalrm_jax.score --checkpoint C [--base-model B] --prompt "a red fox" fox_1.png fox_2.png directory/

Prints a table, best image first; --json, --csv and --sheet (a contact sheet in rank order) write files, and
`--json -` and `--csv -` print to standard output instead of the table. With --prompt-file, a text file, its
one line is the prompt of all images, or each line that of one image, and images are ranked within their
prompt. A file that cannot be read is reported and the others are scored; the exit status is 1 then.
"""

from dinalrm_jax.cli.command import answer_help, run_command
from dinalrm_jax.cli.options import ScoreOptions

answer_help(__name__, __doc__, ScoreOptions)  # before the imports that take a second

import dataclasses
import json
import pathlib
import re
import sys
from collections.abc import Sequence

from tqdm import tqdm

from dinalrm_jax.data.buckets import parse_bucket
from dinalrm_jax.devices.compilation import enable_compilation_cache
from dinalrm_jax.disk import check_writable
from dinalrm_jax.evaluation.ranking import as_csv, as_table, draw_sheet, table_rows
from dinalrm_jax.evaluation.scoring import score_images
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.noise import NoiseDraw
from dinalrm_jax.reward_model import RewardModel

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}


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
        if not path.exists() and re.fullmatch(r"[\d.]+", name):
            raise ConfigError(f"there is no image {name}; several levels stand between commas: --sigma 0.2,{name}")
    if not found:
        raise ConfigError("name at least one image or directory of images to score")
    return found


def read_prompts(prompt: str | None, file: str | None, count: int) -> list[str]:
    """One prompt an image.

    Raises:
        ConfigError: a prompt without text, or a file whose lines do not match the images.
    """
    if prompt is not None:
        if not prompt.strip():
            raise ConfigError("--prompt is empty; give the text that the images are to show")
        return count * [prompt]
    lines = pathlib.Path(file).read_text().splitlines()
    if len(lines) not in (1, count):
        raise ConfigError(f"{file} has {len(lines)} lines for {count} images; it takes one line for all, or one each")
    return lines if len(lines) == count else count * lines


def write(target: str | None, text: str) -> bool:
    """Writes to a file, or to standard output for "-"; whether it was the latter."""
    if target == "-":
        print(text, end="")
    elif target is not None:
        pathlib.Path(target).write_text(text)
    return target == "-"


def main(options: ScoreOptions) -> int:
    """Scores what the options name; 1 where a file could not be read."""
    enable_compilation_cache()
    for target in (options.json, options.csv, options.sheet):
        if target not in (None, "-"):
            check_writable(target)
    if options.sheet is not None and pathlib.Path(options.sheet).suffix.lower() not in EXTENSIONS:
        raise ConfigError(f"--sheet {options.sheet} is not an image's name; try sheet.png")
    images = find_images(options.images)
    prompts = read_prompts(options.prompt, options.prompt_file, len(images))
    size = parse_bucket(options.size) if options.size is not None else None
    model = RewardModel.from_pretrained(
        options.checkpoint, options.base_model, options.dtype, revision=options.revision
    )
    with tqdm(total=len(images), desc="scoring", unit="image", disable=len(images) < 2) as bar:
        found = score_images(
            model,
            prompts,
            images,
            [options.level],
            [NoiseDraw(options.seed + number, shared=True) for number in range(options.samples)],
            size=size,
            batch_size=options.batch_size,
            progress=bar.update,
        )
    for index, problem in sorted(found.problems.items()):
        print(f"not scored: {images[index]}: {problem}", file=sys.stderr)
    rows = table_rows(prompts, images, found)
    as_json = json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n"
    printed = [write(options.json, as_json), write(options.csv, as_csv(rows))]
    if rows and not any(printed):
        print(as_table(rows))
    if rows and options.sheet is not None:
        draw_sheet(pathlib.Path(options.sheet), rows)
    return 1 if found.problems else 0


if __name__ == "__main__":
    # Ours are ValueErrors.
    run_command(main, ScoreOptions, errors=(ValueError, OSError), interrupted="nothing was written")
