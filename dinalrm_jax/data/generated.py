"""Images that `generate` made: a PNG among whose texts is how it was made."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

KEYWORD = "dinalrm"  # of the text
SHEET = {"sheet": True}  # what a contact sheet says, which is no image of anything


def save_generated(path: pathlib.Path, pixels: np.ndarray, made: Mapping[str, Any]) -> None:
    """Writes pixels (H, W, 3) uint8, and how they were made as JSON: prompt, seed, settings."""
    info = PngInfo()
    info.add_itxt(KEYWORD, json.dumps(made, ensure_ascii=False))
    Image.fromarray(pixels).save(path, pnginfo=info)


def how_made(path: str | pathlib.Path) -> dict[str, Any] | None:
    """What `save_generated` wrote, or SHEET; None of any other file, and of one that cannot be read."""
    try:
        with Image.open(path) as image:
            text = image.info.get(KEYWORD)
        return None if text is None else json.loads(text)
    except (OSError, UnidentifiedImageError, ValueError):
        return None
