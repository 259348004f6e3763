"""Reads a picture of a scene by rules, and says which respects of a caption it shows.

A judge that no reward can fool: objects are what stands out from the ground, labelled and measured (scipy.ndimage);
a colour is the nearest of the palette, a shape the nearest of templates that are drawn and pass the tiny codec as
every picture does. Nothing here is learned, and nothing is shared with the reward.
"""

import dataclasses
import functools
import itertools

import numpy as np
from scipy import ndimage
from scipy.cluster.vq import kmeans2

from dinalrm_jax.encoders import tiny
from dinalrm_jax.scenes import draw

SIZE = 64  # pixels along a side that templates are drawn for, and that areas below are stated at
LEAST_CONTRAST = 45.0  # distance in RGB from the ground of what is no ground; the palest object has 150
LEAST_AREA = 0.004  # of the picture: what is smaller is a codec's ringing (an object has at least 0.02)
WIDEST = 0.36  # of the picture's side: what is longer is several objects that touch
DIAMETER = 0.29
WIDEST_COLOR = 75.0  # distance in RGB from the palette of what has no colour of it
WIDEST_SHAPE = 0.17  # mean squared difference from the nearest template of what has no shape of them
GRID, REACH = 15, 2.2  # an object's crop: GRID x GRID points, REACH radii of gyration to every side
DRAWN = 12  # objects a template is the mean of
EDGE = 0.42  # an object "on the left" has its centre left of this


@dataclasses.dataclass(frozen=True)
class Seen:
    """One object of a picture: its colour and shape, None where it has none of ours, its centre in [0, 1]."""

    color: str | None
    shape: str | None
    x: float
    y: float

    def is_on(self, side: str) -> bool:
        return {"left": self.x, "right": 1 - self.x, "top": self.y, "bottom": 1 - self.y}[side] < EDGE


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How much of every respect of its caption a picture shows, from 0 to 1.

    Attributes:
        count: 1 less the share by which a group's number is off, the mean of the groups.
        color, shape, position: the share of objects that have their group's.
    """

    count: float
    color: float
    shape: float
    position: float

    @property
    def correct(self) -> bool:
        """Whether it shows all of it, and nothing else."""
        return self.share == 1

    @property
    def share(self) -> float:
        """The mean of the four."""
        return sum(dataclasses.astuple(self)) / 4


def verify(caption: str, image: np.ndarray) -> Verdict:
    """What an image (S, S, 3) uint8 shows of a scene's caption.

    Raises:
        ValueError: no caption of a scene.
    """
    scene, objects = draw.parse(caption), read_scene(image)
    members: list[list[Seen]] = [[] for _ in scene]
    for each in objects:  # an object belongs to the group that it looks like, then to that whose side it is on
        likeness = [(each.color == g.color) + (each.shape == g.shape) + 0.5 * each.is_on(g.side) for g in scene]
        members[int(np.argmax(likeness))].append(each)
    pairs = [(each, group) for group, found in zip(scene, members) for each in found]
    off = [abs(len(found) - group.count) / group.count for group, found in zip(scene, members)]

    def share(right: list[bool]) -> float:
        return sum(right) / len(right) if right else 0.0

    return Verdict(
        count=sum(max(0.0, 1 - each) for each in off) / len(off),
        color=share([each.color == group.color for each, group in pairs]),
        shape=share([each.shape == group.shape for each, group in pairs]),
        position=share([each.is_on(group.side) for each, group in pairs]),
    )


def read_scene(image: np.ndarray) -> list[Seen]:
    """The objects of an image (S, S, 3) uint8."""
    ground = np.median(image.reshape(-1, 3), axis=0)
    away = np.linalg.norm(image.astype(np.float64) - ground, axis=-1)
    labels, count = ndimage.label(away > LEAST_CONTRAST)
    objects = []
    for label in range(1, count + 1):
        contrast = np.percentile(away[labels == label], 90)
        parts, _ = ndimage.label((labels == label) & (away > contrast / 2))
        for part in range(1, parts.max() + 1):
            for mask in _apart(parts == part):
                if mask.sum() >= LEAST_AREA * mask.size:
                    objects.append(_seen(image, ground, away, mask))
    return objects


def _apart(mask: np.ndarray) -> list[np.ndarray]:
    """The mask, or the masks of the objects that touch in it."""
    rows, columns = np.nonzero(mask)
    points = np.stack([rows, columns], axis=1).astype(np.float64)
    longest = max(np.ptp(rows), np.ptp(columns)) + 1
    if longest <= WIDEST * len(mask):
        return [mask]
    count = round(longest / (DIAMETER * len(mask)))
    axis = int(np.ptp(columns) > np.ptp(rows))
    start = np.tile(points.mean(axis=0), (max(count, 2), 1))
    steps = (np.arange(len(start)) + 0.5) / len(start)
    start[:, axis] = points[:, axis].min() + steps * np.ptp(points[:, axis])
    _, owner = kmeans2(points, start, minit="matrix")
    apart = []
    for number in range(len(start)):
        own = np.zeros_like(mask)
        own[rows[owner == number], columns[owner == number]] = True
        apart.append(own)
    return apart


def _seen(image: np.ndarray, ground: np.ndarray, away: np.ndarray, mask: np.ndarray) -> Seen:
    size = len(mask)
    core = mask & (away >= np.percentile(away[mask], 60))
    found = np.median(image[core], axis=0)
    gaps = {name: np.linalg.norm(found - value) for name, value in draw.COLORS.items()}
    color = min(gaps, key=gaps.__getitem__)
    crop, (y, x) = _crop(away, mask)
    templates = _templates()
    misfit = {shape: np.square(crop - templates[color, shape]).mean() for shape in draw.SHAPES}
    shape = min(misfit, key=misfit.__getitem__)
    return Seen(
        color if gaps[color] < WIDEST_COLOR else None,
        shape if misfit[shape] < WIDEST_SHAPE else None,
        (x + 0.5) / size,
        (y + 0.5) / size,
    )


def _crop(away: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How much of an object is where, on a grid that moves and grows with it; and its centre (y, x)."""
    near = ndimage.binary_dilation(mask, iterations=2)
    cover = np.where(near, away, 0) / np.percentile(away[mask], 75)
    points = np.stack(np.nonzero(mask), axis=-1).astype(np.float64)
    centre = points.mean(axis=0)
    radius = np.sqrt(np.square(points - centre).sum(axis=-1).mean())
    steps = np.linspace(-REACH, REACH, GRID) * max(radius, 1.0)
    grid = np.stack(np.meshgrid(centre[0] + steps, centre[1] + steps, indexing="ij"))
    return ndimage.map_coordinates(np.clip(cover, 0, 1.2), grid, order=1), centre


@functools.cache
def _templates() -> dict[tuple[str, str], np.ndarray]:
    """The mean crop of objects of every colour and shape, drawn alone and passed through the codec."""
    templates = {}
    for number, (color, shape) in enumerate(itertools.product(draw.COLORS, draw.SHAPES)):
        rng = np.random.default_rng(number)
        crops = []
        for _ in range(DRAWN):
            group = draw.Group(1, color, shape, str(rng.choice(list(draw.SIDES))))
            image = tiny.decode_latents(tiny.encode_image(draw.render((group,), SIZE, rng)))
            away = np.linalg.norm(image - np.median(image.reshape(-1, 3), axis=0), axis=-1)
            labels, count = ndimage.label(away > np.percentile(away, 99) / 2)
            sizes = ndimage.sum_labels(labels > 0, labels, range(1, count + 1))
            crops.append(_crop(away, labels == 1 + int(np.argmax(sizes)))[0])
        templates[color, shape] = np.mean(crops, axis=0)
    return templates
