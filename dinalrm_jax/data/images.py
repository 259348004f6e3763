"""Image files: reading them, and the sizes they are brought to."""

import collections
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dinalrm_jax.data.buckets import Size

# A picture, or where one is read from; a function opens a file.
ImageSource = Image.Image | np.ndarray | str | pathlib.Path | Callable[[], BinaryIO]
# What PIL raises for a damaged or hostile file.
DAMAGE = (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)
# The largest of training's buckets (1472 x 832) has 1.17 times the area of the model's own size.
LARGEST_AREA = 1.2
T, R = TypeVar("T"), TypeVar("R")


def open_image(source: ImageSource) -> Image.Image:
    """A picture of any colour mode, its pixels perhaps not read yet.

    Raises:
        ValueError: an array that is not (H, W, 3) uint8.
        one of DAMAGE: a file that is not there or not an image.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[-1] != 3:
            raise ValueError(f"an image array must be (H, W, 3) uint8, got {source.dtype} {source.shape}")
        return Image.fromarray(source)
    if isinstance(source, Image.Image):
        return source
    return Image.open(source() if callable(source) else source)


def read_rgb(source: ImageSource, size: Size | None = None, *, crop: bool = False) -> np.ndarray:
    """(H, W, 3) uint8 pixels, brought to (height, width) where given; errors as for `open_image`.

    They are resized (Lanczos), after cutting the edges to the new shape where `crop`, else distorting it.
    """
    image = open_image(source)
    rgb = image.convert("RGB")
    if image is not source:
        image.close()
    if size is not None and size != (rgb.height, rgb.width):
        width_first = (size[1], size[0])
        if crop:
            rgb = ImageOps.fit(rgb, width_first, Image.Resampling.LANCZOS)
        else:
            rgb = rgb.resize(width_first, Image.Resampling.LANCZOS)
    return np.asarray(rgb)


def scoring_size(size: Size, native_side: int, longest_side: int) -> Size:
    """The size an image is scored at: its own, to multiples of 16 pixels, unless it is too large for the model.

    Args:
        size: (height, width) of the image.
        native_side: of a square image of the model's own size (1024 for SD3.5); an image of more than 1.2
            times its area is scaled down to that.
        longest_side: what the model's position table allows.
    """
    height, width = size
    scale = min(1.0, math.sqrt(LARGEST_AREA * native_side**2 / (height * width)), longest_side / max(size))
    return tuple(min(longest_side // 16, max(1, round(scale * side / 16))) * 16 for side in size)


def map_ahead(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """`map` in the pool's threads, at most `ahead` results in advance of what was taken."""
    waiting = collections.deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
