"""Resolution buckets: which size an image, and a pair of images, is brought to."""

import math
from collections.abc import Sequence

Size = tuple[int, int]  # height, width, in pixels

# The paper's.
BUCKETS: tuple[Size, ...] = (
    (256, 256), (512, 512), (1024, 1024), (1248, 832), (832, 1248), (1344, 896), (896, 1344),
    (1024, 768), (768, 1024), (1472, 832), (832, 1472), (1152, 832), (832, 1152),
)  # fmt: skip
PAIR_ASPECT_LIMIT = 0.05


def bucket_name(size: Size) -> str:
    """How a bucket is written, height first: "1248x832"."""
    return f"{size[0]}x{size[1]}"


def parse_bucket(name: str) -> Size:
    """The inverse of `bucket_name`.

    Raises:
        ValueError: not two positive multiples of 16, which latents need.
    """
    try:
        height, width = map(int, name.split("x"))
    except ValueError:
        raise ValueError(f"a size in pixels is written HEIGHTxWIDTH, for instance 1248x832; got {name!r}") from None
    if height < 16 or width < 16 or height % 16 or width % 16:
        raise ValueError(
            f"a size is HEIGHTxWIDTH in positive multiples of 16 pixels, for instance 1248x832; got {name!r}"
        )
    return height, width


def nearest(size: Size, buckets: Sequence[Size], aspect_tolerance: float) -> Size | None:
    """The bucket of nearest area among those of the image's shape, or None.

    A bucket has the image's shape if `|ln(h/w) - ln(H/W)|` is at most `aspect_tolerance`; nearest is
    meant in log area (docs/method.md, training).
    """
    height, width = size
    aspect, area = math.log(height / width), math.log(height * width)
    fitting = [b for b in buckets if abs(aspect - math.log(b[0] / b[1])) <= aspect_tolerance]
    return min(fitting, key=lambda b: abs(area - math.log(b[0] * b[1])), default=None)


def nearest_aspect(size: Size, buckets: Sequence[Size]) -> Size:
    """The bucket nearest in log aspect ratio, then in log area: for images that are cropped to it."""
    height, width = size
    return min(
        buckets,
        key=lambda b: (abs(math.log(height / width * b[1] / b[0])), abs(math.log(height * width / (b[0] * b[1])))),
    )


def align(first: Size, second: Size, buckets: Sequence[Size], aspect_tolerance: float) -> Size | None:
    """One bucket for two images whose own buckets are these, or None where their shapes differ.

    Equal buckets stay. Otherwise widths over heights may differ by less than 5%; both are scaled to
    the larger long side, and the smaller height and width of the two decide (released preprocessing).
    """
    if first == second:
        return first
    ratios = sorted(width / height for height, width in (first, second))
    if (ratios[1] - ratios[0]) / ratios[1] >= PAIR_ASPECT_LIMIT:
        return None
    long_side = max(*first, *second)
    scaled = [[side * long_side / max(size) for side in size] for size in (first, second)]
    return nearest(tuple(map(min, *scaled)), buckets, aspect_tolerance)
