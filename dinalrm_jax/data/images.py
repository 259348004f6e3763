"""Pictures: the one way in which every command decodes them, and the sizes they are brought to.

What may be read is PNG, JPEG, WebP, GIF, BMP, TIFF and AVIF of at most MAX_PIXELS, which the header must say
before anything is decoded. Of several frames it is the first. Pixels become 8-bit RGB:

- They are turned as EXIF says; a PNG's says it before the pixels or not at all.
- Transparency is laid over white.
- Greys of 16 bits become their high byte, as PIL does with colours of 16 bits. Those of other depths above 8 and of
  floating point are refused: nothing says which number is white.
"""

import collections
import dataclasses
import io
import logging
import math
import pathlib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, NoReturn, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from dinalrm_jax.data.buckets import Size
from dinalrm_jax.data.files import (
    MISSING,
    UNREADABLE,
    ImageProblem,
    is_of_the_file_system,
    open_file,
    patiently,
)

# A picture, or where one is read from; a function opens a file, and raises ImageProblem where there is none.
ImageSource = Image.Image | np.ndarray | str | pathlib.Path | Callable[[], BinaryIO]
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
MAX_PIXELS = 100_000_000  # 300 MB decoded
MAX_BYTES = 1 << 30  # of a file, which is read whole
# The largest of training's buckets (1472 x 832) has 1.17 times the area of the model's own size.
LARGEST_AREA = 1.2
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
SIDEWAYS = {5, 6, 7, 8}
VIEW = re.compile(r"@(\d+)(m?)/(.*)", re.DOTALL)  # names a view of an image, see `data.views`
GREY_16 = {"I;16", "I;16L", "I;16B", "I;16N"}
CHANGED_SIZE = "not a readable image: its size changes while it is decoded"
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # TIFF's tags
T = TypeVar("T")
R = TypeVar("R")

# PIL warns of large pictures and odd metadata. Here these are problems or they are nothing; and
# `warnings.catch_warnings` is not for threads.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)  # what it logs, it raises too


@dataclasses.dataclass(frozen=True)
class Header:
    """A picture's size as it is to be seen, in pixels, and PIL's name of its colours."""

    height: int
    width: int
    mode: str


def read_header(source: ImageSource) -> Header:
    """What a picture will be once decoded, from the head of its file.

    Raises:
        ImageProblem: no picture, or one that is not taken.
        OSError: the file system's.
    """
    if isinstance(source, np.ndarray | Image.Image):
        return _header(_open(source))

    def read() -> Header:
        with _opened(source) as file:
            return _header(_open(file))

    return patiently(read, _name(source))


def read_rgb(source: ImageSource, size: Size | None = None, *, crop: bool = False) -> np.ndarray:
    """(H, W, 3) uint8 pixels, brought to (height, width) where given; errors as for `read_header`.

    They are resized (Lanczos), after cutting the edges to the new shape where `crop`, else distorting it.
    """
    if isinstance(source, np.ndarray | Image.Image):
        return _decoded(source, size, crop)
    return decode(read_bytes(source), size, crop=crop)


def original(name: str) -> str:
    """The image that a view is of; of an image its own name."""
    found = VIEW.fullmatch(name)
    return name if found is None else found[3]


def read_bytes(source: str | pathlib.Path | Callable[[], BinaryIO]) -> bytes:
    """A file's bytes; errors as for `read_header`."""

    def read() -> bytes:
        with _opened(source) as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ImageProblem(f"{UNREADABLE}: too large a file", f"{_name(source)} is larger than {MAX_BYTES} bytes")
        return data

    return patiently(read, _name(source))


def decode(data: bytes, size: Size | None = None, *, crop: bool = False) -> np.ndarray:
    """`read_rgb` of a file's bytes, which are in memory: whatever goes wrong is the picture's fault."""
    try:
        return _decoded(io.BytesIO(data), size, crop)
    except OSError as error:
        raise ImageProblem(UNREADABLE, f"not a readable image: {error}") from error


def load(image: Image.Image) -> None:
    """Reads the pixels of a caller's picture, and its EXIF: PIL's lazy reading is not for threads.

    Raises:
        ImageProblem: it is damaged, or not taken.
        OSError: the file system's.
    """
    header = _header(image)
    try:
        image.load()
    except Exception as error:
        _refuse(error)
    if dataclasses.replace(_header(image), mode=header.mode) != header:
        raise ImageProblem(UNREADABLE, CHANGED_SIZE)


def _open(file: BinaryIO | Image.Image | np.ndarray) -> Image.Image:
    if isinstance(file, np.ndarray):
        if file.dtype != np.uint8 or file.ndim != 3 or file.shape[-1] != 3:
            raise ImageProblem(UNREADABLE, f"an image array must be (H, W, 3) uint8, got {file.dtype} {file.shape}")
        return Image.fromarray(file)
    if isinstance(file, Image.Image):
        return file
    try:
        return Image.open(file, formats=FORMATS)
    except Exception as error:
        _refuse(error)


def _header(image: Image.Image) -> Header:
    """Raises ImageProblem for a picture that is not taken."""
    try:
        return _taken(image)
    except Exception as error:  # a tag is decoded when it is asked for
        _refuse(error)


def _taken(image: Image.Image) -> Header:
    width, height = image.size
    if width * height > MAX_PIXELS:
        _too_large(f"{width} x {height}")
    tags = getattr(image, "tag_v2", {})
    odd_grey = image.mode in GREY_16 and (tags.get(BITS_PER_SAMPLE, (16,)) != (16,) or tags.get(PHOTOMETRIC, 1) != 1)
    if image.mode in ("I", "F") or odd_grey:
        raise ImageProblem(
            f"{UNREADABLE}: greys without a white",
            f"its greys ({image.mode}) do not say which number is white; save it with 8 or 16 bits",
        )
    if _orientation(image) in SIDEWAYS:
        width, height = height, width
    return Header(height, width, image.mode)


def _orientation(image: Image.Image) -> int:
    """EXIF's number of how the pixels are to be turned; 1 for not at all.

    PIL turns TIFF by itself. It would decode a PNG to look behind its pixels.
    """
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    try:
        found = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF says nothing
        return 1
    return found if isinstance(found, int) else 1


def _decoded(source: BinaryIO | Image.Image | np.ndarray, size: Size | None, crop: bool) -> np.ndarray:
    image = _open(source)
    header = _header(image)
    turn = TURNS.get(_orientation(image))
    try:
        rgb = _rgb(image)
        rgb = rgb if turn is None else rgb.transpose(turn)
        if (rgb.height, rgb.width) != (header.height, header.width):
            raise ImageProblem(UNREADABLE, CHANGED_SIZE)
        if size is not None and size != (rgb.height, rgb.width):
            width_first = (size[1], size[0])
            if crop:
                rgb = ImageOps.fit(rgb, width_first, Image.Resampling.LANCZOS)
            else:
                rgb = rgb.resize(width_first, Image.Resampling.LANCZOS)
        return np.asarray(rgb)
    except Exception as error:
        _refuse(error)
    finally:
        if image is not source:
            image.close()


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in GREY_16:
        values = np.asarray(image)
        high = np.where(values == image.info.get("transparency"), 255, values >> 8)
        return Image.fromarray(high.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _refuse(error: Exception) -> NoReturn:
    """A decoder's error as what it is: decoders raise every kind there is, MemoryError among them."""
    if is_of_the_file_system(error) or isinstance(error, ImageProblem):
        raise error
    if isinstance(error, Image.DecompressionBombError):
        _too_large("more than PIL opens")
    if isinstance(error, UnidentifiedImageError):
        raise ImageProblem(UNREADABLE, f"not a readable image: none of {', '.join(FORMATS)}") from error
    raise ImageProblem(UNREADABLE, f"not a readable image: {error or type(error).__name__}") from error


def _too_large(what: str) -> NoReturn:
    raise ImageProblem(f"{UNREADABLE}: too many pixels", f"too many pixels: {what}, and {MAX_PIXELS} are the most")


def _opened(source: str | pathlib.Path | Callable[[], BinaryIO]) -> BinaryIO:
    if not callable(source):
        return open_file(source)
    try:
        return source()
    except FileNotFoundError as error:
        raise ImageProblem(MISSING, f"there is no file {error.filename or 'to read'}") from None


def _name(source: object) -> str:
    """Of what is read, for messages; what `functools.partial` opens is named by its arguments."""
    if callable(source):
        return ", ".join(map(str, getattr(source, "args", ()))) or "an image"
    return str(source)


def scoring_size(size: Size, native_side: int, longest_side: int, unit: int) -> Size:
    """The size an image is scored at: its own, to multiples of `unit`, unless it is too large for the model.

    Args:
        size: (height, width) of the image.
        native_side: of a square image of the model's own size (1024 for SD3.5); an image of more than 1.2
            times its area is scaled down to that.
        longest_side: what the model's position table allows.
        unit: pixels that sides are multiples of (16 for SD3.5).
    """
    height, width = size
    scale = min(1.0, math.sqrt(LARGEST_AREA * native_side**2 / (height * width)), longest_side / max(size))
    return _scaled(size, scale, longest_side, unit)


def trained_size(size: Size, trained: Sequence[Size], longest_side: int, unit: int) -> Size:
    """The size an image is scored at by a model that knows what it was trained on.

    One of the training sizes as it is; any other keeps its shape, at the area of the nearest of them.

    Args:
        size: (height, width) of the image.
        trained: sizes that the model was trained on.
        longest_side, unit: as for `scoring_size`.
    """
    if size in trained:
        return size
    height, width = size
    area = min((h * w for h, w in trained), key=lambda area: abs(math.log(area / (height * width))))
    scale = min(math.sqrt(area / (height * width)), longest_side / max(size))
    return _scaled(size, scale, longest_side, unit)


def _scaled(size: Size, scale: float, longest_side: int, unit: int) -> Size:
    height, width = (min(longest_side // unit, max(1, round(scale * side / unit))) * unit for side in size)
    return height, width


def map_ahead(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """`map` in the pool's threads, at most `ahead` results in advance of what was taken."""
    waiting = collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # nobody waits for what an error leaves
        for future in waiting:
            future.cancel()
