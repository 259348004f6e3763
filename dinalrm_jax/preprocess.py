"""Turns a preference dataset into records to train on.

    python -m dinalrm_jax.preprocess --dataset hpdv2 --source DIR --output DIR [--size 128] [--holdout 10]

Images are cropped at the centre to a square, resized (Lanczos) and encoded by the tiny linear codec;
prompts by the tiny frozen text embedding (dinalrm_jax.data.tiny_encoders). A missing or unreadable
image is skipped with its pairs, and counted. The output appears whole or not at all.
"""

import pathlib
import sys
from collections import Counter

import numpy as np
from absl import app, flags, logging
from PIL import Image, ImageOps
from tqdm import tqdm

from dinalrm_jax.data import hpdv2, records, tiny_encoders
from dinalrm_jax.data.records import RecordsError
from dinalrm_jax.data.scene_records import prompt_records, tiny_manifest


def preprocess_hpdv2(
    source: str | pathlib.Path, output: str | pathlib.Path, *, size: int, text_length: int, holdout: int
) -> dict[str, int]:
    """Writes HPDv2 records with the tiny encoders.

    Args:
        source: an HPDv2 directory (`dinalrm_jax.data.hpdv2`).
        output: record directory to write; must not exist.
        size: side of the square images in pixels, a multiple of 16.
        text_length: prompt tokens.
        holdout: prompts to hold out where the source has no train.json.

    Returns:
        Counts: pairs by split, and what was left out by reason.

    Raises:
        RecordsError: the source is not what it claims; FileExistsError: the output exists.
    """
    if size <= 0 or size % 16:
        raise RecordsError(f"size must be a positive multiple of 16 pixels, got {size}")
    if pathlib.Path(output).exists():
        raise FileExistsError(f"{output} exists already; choose another output or remove it first")
    preferences, left_out = hpdv2.read_preferences(source, holdout)
    paths = sorted({path for rows in preferences.values() for row in rows for path in (row.chosen, row.rejected)})
    images: list[records.ImageRecord] = []
    index_of: dict[pathlib.Path, int] = {}
    for path in tqdm(paths, desc="encoding images", unit="image"):
        pixels = _read_image(path, size, left_out)
        if pixels is not None:
            index_of[path] = len(images)
            latents = tiny_encoders.encode_image(pixels)
            images.append(records.ImageRecord(latents, str(path.relative_to(source)), path.stat().st_size))
    prompts: dict[str, int] = {}
    pairs: dict[str, list[records.PairRecord]] = {}
    for split, rows in preferences.items():
        pairs[split] = []
        for row in rows:
            if row.chosen not in index_of or row.rejected not in index_of:
                left_out["pair of a skipped image"] += 1
                continue
            prompt = prompts.setdefault(row.prompt, len(prompts))
            pairs[split].append(records.PairRecord(index_of[row.chosen], index_of[row.rejected], prompt, "human"))
    empty = [split for split, rows in pairs.items() if not rows]
    if empty:
        raise RecordsError(f"{source} leaves no pairs for {', '.join(empty)}; left out: {dict(left_out)}")
    counts = {**{f"{split} pairs": len(rows) for split, rows in pairs.items()}, **dict(sorted(left_out.items()))}
    records.write(
        output,
        images=images,
        prompts=prompt_records(list(prompts), text_length),
        pairs=pairs,
        manifest=tiny_manifest(text_length, dataset="hpdv2", size=size, holdout=holdout, counts=counts),
    )
    return counts


def _read_image(path: pathlib.Path, size: int, left_out: Counter) -> np.ndarray | None:
    """(size, size, 3) uint8, or None after counting why not."""
    try:
        with Image.open(path) as image:
            return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS))
    except FileNotFoundError:
        left_out["missing image"] += 1
    except OSError:
        left_out["unreadable image"] += 1
    return None


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    logging.set_verbosity(logging.WARNING)
    values = flags.FLAGS
    try:
        counts = preprocess_hpdv2(
            values.source,
            values.output,
            size=values.size,
            text_length=values["text-length"].value,
            holdout=values.holdout,
        )
    except (RecordsError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {values.output}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))


if __name__ == "__main__":
    flags.DEFINE_enum("dataset", None, ["hpdv2"], "Format of the source.")
    flags.DEFINE_string("source", None, "The dataset's directory.")
    flags.DEFINE_string("output", None, "Record directory to write; must not exist.")
    flags.DEFINE_integer("size", 128, "Side of the square images, pixels.")
    flags.DEFINE_integer("text-length", 32, "Prompt tokens.")
    flags.DEFINE_integer("holdout", 10, "Prompts held out where the source has no train.json.")
    flags.mark_flags_as_required(["dataset", "source", "output"])
    app.run(main)
