"""Generated scenes with captions that must be read, and pairs of which one image is better.

A scene holds one or two groups of equal objects, each group in its own half of the picture:
"two red circles on the left and one blue star on the right". In a pair both images are drawn
afresh for one caption; the rejected one either breaks the caption in one respect (a colour, a
shape, a count, a position, or the two groups exchanged) or shows it degraded (blur, noise, JPEG,
occlusion). Some combinations of colour and shape are kept for the held-out pairs, which use no others.
"""

import dataclasses
import hashlib
import io
import itertools
import math
from collections.abc import Iterator
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from dinalrm_jax.mapping import ConfigError

COLORS = {
    "red": (214, 40, 40),
    "green": (46, 150, 60),
    "blue": (42, 80, 200),
    "yellow": (245, 205, 40),
    "purple": (140, 50, 170),
    "orange": (240, 130, 30),
}
SHAPES = ("circle", "square", "triangle", "star", "ring")
COUNTS = ("one", "two", "three")
WORDS = 6  # of a group's description: "one red circle on the left"; "and" stands between two
SIDES = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}

COMBINATIONS = tuple(itertools.product(COLORS, SHAPES))
# Two shapes of every colour and at least two colours of every shape, so that a held-out scene can break
# its caption in colour or shape without leaving the held-out combinations.
HELD_OUT = tuple(
    (color, shape)
    for color, shapes in {
        "red": ("star", "ring"),
        "green": ("square", "ring"),
        "blue": ("circle", "triangle"),
        "yellow": ("circle", "square"),
        "purple": ("triangle", "star"),
        "orange": ("star", "ring"),
    }.items()
    for shape in shapes
)
TRAINED = tuple(pair for pair in COMBINATIONS if pair not in HELD_OUT)

EXAMPLE = "two red circles on the left and one blue star on the right"

VIOLATIONS = ("color", "shape", "count", "position", "exchange")
DEGRADATIONS = ("blur", "noise", "jpeg", "occlusion")


@dataclasses.dataclass(frozen=True)
class Group:
    """Equal objects in one half of the picture."""

    count: int
    color: str
    shape: str
    side: str

    def __str__(self) -> str:
        return f"{COUNTS[self.count - 1]} {self.color} {self.shape}{'s' * (self.count > 1)} on the {self.side}"


@dataclasses.dataclass(frozen=True)
class ScenePair:
    """One preference pair before encoding.

    Attributes:
        caption: what both images were drawn for.
        chosen, rejected: (S, S, 3) uint8.
        kind: what is wrong with the rejected image: "prompt/" and one of VIOLATIONS, or "degraded/" and
            one of DEGRADATIONS.
    """

    caption: str
    chosen: np.ndarray
    rejected: np.ndarray
    kind: str


def scene_pairs(
    count: int,
    size: int,
    seed: int,
    *,
    held_out: bool,
    by: Literal["combinations", "captions"],
    two_groups: float,
) -> Iterator[ScenePair]:
    """`count` pairs, half violations and half degradations; pair i depends on i and the arguments after `count` only.

    Args:
        count: number of pairs.
        size: image side in pixels, a multiple of 8.
        seed: of everything random.
        held_out: whether the scenes are those held out.
        by: what is held out: scenes of HELD_OUT combinations, or all scenes whose caption `is_held_out`.
        two_groups: share of scenes with two groups.
    """
    combinations = COMBINATIONS if by == "captions" else HELD_OUT if held_out else TRAINED
    for index in range(count):
        rng = np.random.Generator(np.random.Philox(key=[seed, 2 * index + held_out]))
        scene = draw_scene(rng, combinations, two_groups)
        while by == "captions" and is_held_out(caption(scene)) != held_out:
            scene = draw_scene(rng, combinations, two_groups)
        if index % 2:
            defect = str(rng.choice(DEGRADATIONS))
            kind, rejected = f"degraded/{defect}", degrade(render(scene, size, rng), defect, rng)
        else:
            respect = str(rng.choice(VIOLATIONS if len(scene) == 2 else VIOLATIONS[:-1]))
            broken = violate(scene, respect, rng, combinations)
            kind, rejected = f"prompt/{respect}", render(broken, size, rng)
        yield ScenePair(caption(scene), render(scene, size, rng), rejected, kind)


def caption(scene: tuple[Group, ...]) -> str:
    """The sentence that a scene is drawn for."""
    return " and ".join(map(str, scene))


def parse(text: str) -> tuple[Group, ...]:
    """The scene of a caption, `caption` backwards.

    Raises:
        ValueError: no caption of a scene.
    """
    groups = []
    for part in text.split(" and "):
        words = part.split()
        try:
            count, color, shape, side = COUNTS.index(words[0]) + 1, words[1], words[2], words[-1]
            group = Group(count, color, shape.removesuffix("s") if count > 1 else shape, side)
        except (IndexError, ValueError):
            break
        groups.append(group)
    if (
        not groups
        or caption(tuple(groups)) != text
        or any(group.color not in COLORS or group.shape not in SHAPES or group.side not in SIDES for group in groups)
    ):
        raise ValueError(f"{text!r} is no caption of a scene; one reads {EXAMPLE!r}")
    return tuple(groups)


def is_held_out(text: str) -> bool:
    """Whether a caption is one of the fifth that is kept from training, where captions are held out."""
    return hashlib.sha256(text.encode()).digest()[0] % 5 == 0


def draw_captions(count: int, seed: int, *, held_out: bool, two_groups: float) -> list[str]:
    """`count` captions of all combinations, different ones, of those held out or of the others.

    Raises:
        ConfigError: there are hardly so many.
    """
    rng, found = np.random.default_rng([seed, held_out]), {}
    for drawn in itertools.count():
        if len(found) == count:
            break
        if drawn > 100 * count + 10_000:
            raise ConfigError(
                f"there are hardly {count} captions of scenes {'held out' if held_out else 'to train on'}, with a "
                f"share of {two_groups} of two groups: {len(found)} were found; ask for fewer"
            )
        text = caption(draw_scene(rng, COMBINATIONS, two_groups))
        if is_held_out(text) == held_out:
            found[text] = None
    return list(found)


def draw_scene(
    rng: np.random.Generator, combinations: tuple[tuple[str, str], ...], two_groups: float
) -> tuple[Group, ...]:
    """One group, or two different ones in opposite halves."""
    side = str(rng.choice(list(SIDES)))
    chosen = rng.choice(len(combinations), size=1 + int(rng.random() < two_groups), replace=False)
    sides = (side, SIDES[side])
    groups = []
    for index, place in zip(chosen, sides):
        colour, shape = combinations[index]
        groups.append(Group(int(rng.integers(1, len(COUNTS) + 1)), colour, shape, place))
    return tuple(groups)


def violate(
    scene: tuple[Group, ...], kind: str, rng: np.random.Generator, combinations: tuple[tuple[str, str], ...]
) -> tuple[Group, ...]:
    """The scene with one respect changed; a group that changes its look stays within `combinations`."""
    if kind == "exchange":
        first, second = scene
        return dataclasses.replace(first, side=second.side), dataclasses.replace(second, side=first.side)
    index = int(rng.integers(len(scene)))
    group = scene[index]
    if kind == "position":
        if len(scene) == 2:  # turn the picture by a quarter: both groups leave their halves
            turned = {"left": "top", "right": "bottom", "top": "left", "bottom": "right"}
            return tuple(dataclasses.replace(each, side=turned[each.side]) for each in scene)
        others = [side for side in SIDES if side != group.side]
        return (dataclasses.replace(group, side=str(rng.choice(others))),)
    if kind == "count":
        other = rng.choice([count for count in range(1, len(COUNTS) + 1) if count != group.count])
        changed = dataclasses.replace(group, count=int(other))
    elif kind == "color":
        options = [color for color, shape in combinations if shape == group.shape and color != group.color]
        changed = dataclasses.replace(group, color=str(rng.choice(options)))
    else:
        options = [shape for color, shape in combinations if color == group.color and shape != group.shape]
        changed = dataclasses.replace(group, shape=str(rng.choice(options)))
    return tuple(changed if i == index else each for i, each in enumerate(scene))


def render(scene: tuple[Group, ...], size: int, rng: np.random.Generator) -> np.ndarray:
    """(size, size, 3) uint8: objects without overlap on a light ground, smoothed by supersampling."""
    scale = 2
    side = size * scale
    ground = rng.integers(215, 250, 3)
    image = Image.new("RGB", (side, side), tuple(int(value) for value in ground))
    draw = ImageDraw.Draw(image)
    for group in scene:
        for x, y in _places(group, rng):
            radius = side * rng.uniform(0.125, 0.15)
            _draw_object(draw, group, x * side, y * side, radius, tuple(int(v) for v in ground), rng)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))


def _places(group: Group, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Centres in the unit square: slots along the half, jittered."""
    slots = np.array([1 / 6, 1 / 2, 5 / 6])
    along = rng.permutation(slots)[: group.count] + rng.uniform(-0.03, 0.03, group.count)
    across = rng.uniform(0.19, 0.31, group.count)
    if group.side in ("right", "bottom"):
        across = 1 - across
    pairs = zip(across, along) if group.side in ("left", "right") else zip(along, across)
    return [(float(x), float(y)) for x, y in pairs]


def _draw_object(draw, group: Group, x: float, y: float, radius: float, ground, rng: np.random.Generator) -> None:
    fill = tuple(int(np.clip(value + rng.integers(-12, 13), 0, 255)) for value in COLORS[group.color])
    box = (x - radius, y - radius, x + radius, y + radius)
    if group.shape == "circle":
        draw.ellipse(box, fill)
    elif group.shape == "square":
        draw.rectangle((x - 0.9 * radius, y - 0.9 * radius, x + 0.9 * radius, y + 0.9 * radius), fill)
    elif group.shape == "ring":
        draw.ellipse(box, fill)
        draw.ellipse((x - 0.5 * radius, y - 0.5 * radius, x + 0.5 * radius, y + 0.5 * radius), ground)
    else:
        corners, inner = (3, 0.5) if group.shape == "triangle" else (5, 0.42)
        radii = itertools.cycle((1.15 * radius, 1.15 * radius * inner))
        angles = [math.pi * i / corners - math.pi / 2 for i in range(2 * corners)]
        draw.polygon([(x + r * math.cos(a), y + r * math.sin(a)) for a, r in zip(angles, radii)], fill)


def degrade(image: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """A visibly worse copy of the image: blurred, noisy, over-compressed, or partly covered."""
    size = len(image)
    if kind == "blur":
        radius = size * rng.uniform(0.035, 0.07)
        return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))
    if kind == "noise":
        noisy = image + rng.normal(0, rng.uniform(40, 80), image.shape)
        return np.clip(noisy, 0, 255).astype(np.uint8)
    if kind == "jpeg":
        # Compressed at half size, so that blocks and ringing are as coarse as on a large picture.
        small = Image.fromarray(image).resize((size // 2, size // 2), Image.Resampling.BOX)
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=int(rng.integers(1, 8)))
        return np.asarray(Image.open(buffer).convert("RGB").resize((size, size), Image.Resampling.NEAREST))
    covered = image.copy()
    height, width = (int(size * rng.uniform(0.35, 0.6)) for _ in range(2))
    top, left = int(rng.integers(0, size - height)), int(rng.integers(0, size - width))
    covered[top : top + height, left : left + width] = rng.integers(60, 200)
    return covered
