"""Further views of training images: crops, mirrored where the prompt names no side.

A view is named after its image, `@1/NAME` or, mirrored, `@1m/NAME`, and depends on nothing but that name. It goes to
its image's bucket. Both images of a pair get a view, and their order is taken to stay.
"""

import dataclasses
import functools
import io
import re
from collections.abc import Callable
from typing import BinaryIO

import numpy as np
from PIL import Image

from dinalrm_jax.data.images import VIEW, read_rgb
from dinalrm_jax.data.preferences import Source, stable_hash
from dinalrm_jax.data.records import RecordsError

LEAST_SIDE = 0.8  # of an image's, that a crop has
# What a mirror would make wrong: sides, and what is to be read.
SIDED = re.compile(
    r"""\b(left|right|clockwise|text|letters?|words?|says?|saying|written|reads?|logo|sign)\b|["“”]""", re.I
)


def with_views(source: Source, count: int) -> Source:
    """The source with `count` views of every training pair beside it; held-out pairs stay as they are.

    Raises:
        RecordsError: no training pairs.
    """
    if "train" not in source.preferences:
        raise RecordsError("views are of training pairs, and the source has none; leave --views out")
    pairs = source.preferences["train"]
    views = []
    for number in range(1, count + 1):
        for pair in pairs:
            mirrored = not SIDED.search(pair.prompt) and stable_hash(number, pair.prompt)[0] % 2
            prefix = f"@{number}{'m' if mirrored else ''}/"
            views.append(dataclasses.replace(pair, chosen=prefix + pair.chosen, rejected=prefix + pair.rejected))
    preferences = {**source.preferences, "train": [*pairs, *views]}
    return dataclasses.replace(source, preferences=preferences, open=functools.partial(open_view, source.open))


def open_view(open_image: Callable[[str], BinaryIO], name: str) -> BinaryIO:
    """An image or a view of one, as a file; errors as for `open_image` and `data.images.read_rgb`."""
    found = VIEW.fullmatch(name)
    if found is None:
        return open_image(name)
    _, mirrored, whole = found.groups()
    pixels = crop(read_rgb(functools.partial(open_image, whole)), int.from_bytes(stable_hash(name)[:8]))
    file = io.BytesIO()
    Image.fromarray(pixels[:, ::-1] if mirrored else pixels).save(file, "BMP")
    file.seek(0)
    return file


def crop(pixels: np.ndarray, seed: int) -> np.ndarray:
    """A part of (H, W, 3) pixels, of their aspect, somewhere in them."""
    rng = np.random.default_rng(seed)
    share = rng.uniform(LEAST_SIDE, 1)
    height, width = (max(1, round(share * side)) for side in pixels.shape[:2])
    top, left = (rng.integers(0, whole - part + 1) for whole, part in zip(pixels.shape, (height, width)))
    return pixels[top : top + height, left : left + width]
