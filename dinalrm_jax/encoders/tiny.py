"""Stand-ins for the VAE and the text encoders where no pretrained weights can be had.

Both are fixed formulas: nothing is trained, downloaded or stored. They carry what the quickstart
and the small preference runs need through the same records as the real encoders.

The codec maps each 8 x 8 block of RGB pixels to 16 channels, linearly: the block is turned to
luma and chroma (JPEG's YCbCr), each plane to its orthonormal 8 x 8 DCT, and of these the 10 lowest
luma and 3 lowest coefficients of either chroma are kept, each divided by its scale. That is
JPEG's transform with everything finer than its low frequencies dropped.
"""

import functools
import hashlib
import re
from collections.abc import Sequence
from types import ModuleType

import numpy as np

CHANNELS = 16
BLOCK = 8  # pixels along a side of one latent
TEXT_WIDTH = 64
# DCT frequencies (row, column), lowest first.
ZIGZAG = ((0, 0), (0, 1), (1, 0), (2, 0), (1, 1), (0, 2), (0, 3), (1, 2), (2, 1), (3, 0))
KEPT = (10, 3, 3)  # of luma, Cb, Cr
# Natural and drawn images alike fall off with frequency, and chroma is weaker than luma; with these
# divisors every channel of either has a standard deviation between 0.4 and 1.5.
LUMA_DC_SCALE, AC_SCALES = 3.0, (1.7, 0.9, 0.9)
# Rows: Y, Cb, Cr of RGB in [-1, 1] (ITU-R BT.601, as in JPEG).
YCBCR = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])


@functools.cache
def _codec_matrices() -> tuple[np.ndarray, np.ndarray]:
    """(192, 16) from a block's pixels to latents, and (16, 192) back."""
    position, frequency = np.arange(BLOCK), np.arange(BLOCK)
    dct = np.sqrt(2 / BLOCK) * np.cos(np.pi * (2 * position[None] + 1) * frequency[:, None] / (2 * BLOCK))
    dct[0] /= np.sqrt(2)
    forward, backward = [], []
    to_rgb = np.linalg.inv(YCBCR)
    for plane, kept in enumerate(KEPT):
        for row, column in ZIGZAG[:kept]:
            wave = np.outer(dct[row], dct[column])
            scale = LUMA_DC_SCALE if (plane, row, column) == (0, 0) else AC_SCALES[plane] / (1 + row + column)
            forward.append((wave[..., None] * YCBCR[plane]).ravel() / scale)
            backward.append((wave[..., None] * to_rgb[:, plane]).ravel() * scale)
    return np.stack(forward, axis=1).astype(np.float32), np.stack(backward).astype(np.float32)


def encode_image(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (H/8, W/8, 16) float32 latents of order one.

    Raises:
        ValueError: not an RGB byte image whose sides are multiples of 8.
    """
    if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8 or image.shape[0] % 8 or image.shape[1] % 8:
        raise ValueError(f"expected (H, W, 3) uint8 with sides divisible by 8, got {image.shape} {image.dtype}")
    rows, columns = image.shape[0] // BLOCK, image.shape[1] // BLOCK
    pixels = image.astype(np.float32) / 127.5 - 1
    blocks = pixels.reshape(rows, BLOCK, columns, BLOCK, 3).transpose(0, 2, 1, 3, 4).reshape(rows, columns, -1)
    return blocks @ _codec_matrices()[0]


def decode_latents(latents: np.ndarray) -> np.ndarray:
    """(H/8, W/8, 16) latents -> (H, W, 3) uint8: what the kept coefficients show."""
    pixels = to_pixels(latents.astype(np.float32), np)
    return np.clip(np.round((pixels + 1) * 127.5), 0, 255).astype(np.uint8)


def to_pixels(latents, xp: ModuleType):
    """(.., H/8, W/8, 16) -> (.., H, W, 3) from -1 to 1 and beyond; `xp` is numpy or jax.numpy."""
    *batch, rows, columns, _ = latents.shape
    blocks = (latents @ _codec_matrices()[1]).reshape(*batch, rows, columns, BLOCK, BLOCK, 3)
    return xp.swapaxes(blocks, -4, -3).reshape(*batch, rows * BLOCK, columns * BLOCK, 3)


def encode_prompts(prompts: Sequence[str], length: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Each word a fixed random vector, with a sinusoid of its position added.

    Args:
        prompts: any text; words beyond `length` are dropped, the rest is zero.
        length: tokens T.
        width: embedding width D, even.

    Returns:
        (B, T, D) and the pooled (B, D): the sum of the words' vectors over the root of their number. float32.
    """
    position = np.arange(length)[:, None] / 100.0 ** (np.arange(width // 2)[None] / (width // 2))
    places = np.concatenate([np.sin(position), np.cos(position)], axis=-1)
    embeds = np.zeros((len(prompts), length, width), np.float32)
    pooled = np.zeros((len(prompts), width), np.float32)
    for row, prompt in enumerate(prompts):
        known = words(prompt)[:length]
        if not known:
            continue
        vectors = np.stack([_word_vector(word, width) for word in known])
        embeds[row, : len(known)] = vectors + places[: len(known)]
        pooled[row] = vectors.sum(axis=0) / np.sqrt(len(known))
    return embeds, pooled


def words(prompt: str) -> list[str]:
    """The tokens of a prompt."""
    return re.findall(r"[a-z]+|[0-9]+", prompt.lower())


@functools.lru_cache(maxsize=100_000)
def _word_vector(word: str, width: int) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
    return np.random.Generator(np.random.Philox(seed)).standard_normal(width).astype(np.float32)
