"""Scores in bulk: any number of images or latents of any sizes, at several levels and noise draws.

Rows of one shape are put into batches, the last of which is padded, so that a shape compiles once or twice;
the order stays. Images are read by threads ahead of the VAE, and a prompt is encoded once while it is kept.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import jax
import numpy as np
from PIL import Image

from dinalrm_jax.data.buckets import Size
from dinalrm_jax.data.files import ImageProblem
from dinalrm_jax.data.images import ImageSource, load, map_ahead, read_header, read_rgb, scoring_size, trained_size
from dinalrm_jax.devices.local import split_locally
from dinalrm_jax.encoders.load import ImageCodec
from dinalrm_jax.model.batch import PromptEmbeds
from dinalrm_jax.model.config import RewardModelConfig
from dinalrm_jax.model.execution import ExecutionConfig
from dinalrm_jax.model.parameters import Params
from dinalrm_jax.model.reward import check_levels, jitted_score
from dinalrm_jax.noise import NoiseDraw, draw_noise

THREADS = 8  # that read and decode images
PROMPTS_KEPT = 8  # batches of embeddings, 3 MB a prompt for SD3.5

Level = float | tuple[float, ...]  # a single one, or those of an ensemble


def level_name(level: Level) -> str:
    """How a level is written in tables: "0.4", or "ensemble 0.2 0.5 0.7"."""
    return "ensemble " + " ".join(f"{sigma:g}" for sigma in level) if isinstance(level, tuple) else f"{level:g}"


def normalize(raw):
    """The score as the published model's users show it: `(raw + 10) / 10`; of a number, an array or a list."""
    return ((np.asarray(raw) if isinstance(raw, (list, tuple)) else raw) + 10) / 10


def ranks(scores: Sequence[float]) -> list[int]:
    """1 for the highest score; equal scores share the better rank."""
    return [1 + int(np.sum(np.asarray(scores) > score)) for score in scores]


class ImageModel(Protocol):
    """What scores images: `RewardModel`, as far as it is needed here."""

    @property
    def config(self) -> RewardModelConfig: ...

    @property
    def params(self) -> Params: ...

    @property
    def execution(self) -> ExecutionConfig: ...

    @property
    def image_sizes(self) -> tuple[Size, ...]: ...

    @property
    def image_codec(self) -> ImageCodec: ...

    def encode_prompt(self, prompts: Sequence[str]) -> PromptEmbeds: ...


@dataclasses.dataclass(frozen=True)
class ImageScores:
    """Scores of N images.

    Attributes:
        scores: (N, levels, draws) float32, NaN for an image that could not be read.
        problems: why, by the image's index.
        under_others: (N, others) float32, scores under other prompts, at the first level and draw.
        pooled: (N, 2 C) float32, see `pooled`.
    """

    scores: np.ndarray
    problems: dict[int, str]
    under_others: np.ndarray
    pooled: np.ndarray


def pooled(latents: np.ndarray) -> np.ndarray:
    """(..., 2 C) float32: the channels' means and standard deviations over (..., H, W, C) latents."""
    latents = np.asarray(latents, np.float32)
    return np.concatenate([latents.mean(axis=(-3, -2)), latents.std(axis=(-3, -2))], axis=-1)


class LatentScorer:
    """Scores batches of latents at all levels with the noise of all draws.

    Args:
        model: what scores; where its parameters lie on several devices, rows are split over those of
            this process.
        levels: single levels, and tuples for ensembles.
        draws: of the noise.
    """

    def __init__(self, model: ImageModel, levels: Sequence[Level], draws: Sequence[NoiseDraw]):
        if not len(levels) or not len(draws):
            raise ValueError(f"at least one level and one noise draw are needed, got {levels} and {draws}")
        self._levels, self._draws = [check_levels(level) for level in levels], draws
        self._params = model.params
        self._score = jitted_score(model.config, model.execution)
        self._several = len(jax.tree.leaves(model.params)[0].sharding.device_set) > 1

    def __call__(self, latents: np.ndarray, prompt: PromptEmbeds, names: Sequence[str]) -> np.ndarray:
        """(B, levels, draws) float32 of (B, H, W, C) latents, B prompts and the images' names.

        Raises:
            ValueError: a score that is not finite.
        """
        rows = (latents, prompt, [np.asarray(draw_noise(draw.keys(names), latents.shape)) for draw in self._draws])
        *inputs, noises = split_locally(rows) if self._several else jax.device_put(rows)
        scores = [[self._score(self._params, *inputs, levels, eps) for eps in noises] for levels in self._levels]
        found = np.stack([np.stack([np.asarray(one) for one in row]) for row in scores]).transpose(2, 0, 1)
        check_finite(found)
        return found


class NonFiniteScores(ValueError):
    """A model that scores NaN or infinity."""


def check_finite(scores: np.ndarray) -> None:
    """Raises NonFiniteScores unless all scores are finite."""
    if not np.isfinite(scores).all():
        raise NonFiniteScores(
            "the model scores NaN or infinity; its weights are broken, or the compute dtype overflows (try float32)"
        )


def padded(rows: Sequence[int] | np.ndarray, batch_size: int) -> np.ndarray:
    """Rows repeated to the next power of two, at most `batch_size`."""
    return np.resize(rows, min(batch_size, 1 << (len(rows) - 1).bit_length()))


def score_images(
    model: ImageModel,
    prompts: Sequence[str],
    images: Sequence[ImageSource],
    levels: Sequence[Level],
    draws: Sequence[NoiseDraw],
    *,
    others: Sequence[Sequence[str]] = (),
    names: Sequence[str] | None = None,
    size: Size | None = None,
    batch_size: int = 8,
    progress: Callable[[int], None] = lambda count: None,
) -> ImageScores:
    """Scores images under their prompts; one that cannot be read is reported and the others are scored.

    Args:
        model: with the base model that its encoders come from, if it needs one.
        prompts: one an image.
        images: see `data.images.ImageSource`.
        levels, draws: see `LatentScorer`.
        others: further prompts, one an image each, under which images are scored too.
        names: of the images, from which a draw that is not shared makes each one's noise; None: their places.
        size: (height, width) that images are resized to; None: `data.images.trained_size` where the model knows what
            sizes it was trained on, else `data.images.scoring_size`.
        batch_size: images in one program.
        progress: called with the number of images after each batch, read or not.

    Raises:
        ValueError: arguments that do not fit each other, or a score that is not finite.
        OSError: an error of the file system, which is none of the image.
    """
    if not len(prompts) == len(images) == min(map(len, others), default=len(images)):
        raise ValueError(
            f"{len(prompts)} prompts but {len(images)} images; give one prompt an image, or one text for all"
        )
    spec = model.config.transformer.latents
    unit = spec.unit
    if size is not None:
        if np.shape(size) != (2,) or any(side < unit or side % unit for side in size):
            raise ValueError(f"size must be (height, width) in positive multiples of {unit} pixels, got {size!r}")
        size = (size[0], size[1])
    longest = spec.downsampling * spec.largest_side

    def target(found: Size) -> Size:
        if size is not None:
            return size
        if model.image_sizes:
            return trained_size(found, model.image_sizes, longest, unit)
        return scoring_size(found, spec.downsampling * spec.trained_side, longest, unit)

    scorer, codec = LatentScorer(model, levels, draws), model.image_codec
    once = LatentScorer(model, levels[:1], draws[:1])  # under the other prompts
    names = list(map(str, range(len(images)))) if names is None else names
    scores = np.full((len(images), len(levels), len(draws)), np.nan, np.float32)
    under_others = np.full((len(images), len(others)), np.nan, np.float32)
    features = np.full((len(images), 2 * spec.channels), np.nan, np.float32)
    problems: dict[int, str] = {}
    for index, image in enumerate(images):
        if isinstance(image, Image.Image):
            try:
                load(image)  # here, as one picture may stand in several rows
            except ImageProblem as problem:
                problems[index] = str(problem)
    with ThreadPoolExecutor(THREADS) as pool:
        by_size: dict[Size, list[int]] = collections.defaultdict(list)
        for index, found in enumerate(pool.map(_size, images)):
            if isinstance(found, str) or index in problems:
                problems.setdefault(index, str(found))
                progress(1)
            else:
                by_size[target(found)].append(index)
        order = [(index, target) for target, indices in by_size.items() for index in indices]
        pixels = map_ahead(pool, lambda job: _pixels(images[job[0]], job[1]), order, ahead=4 * batch_size)
        asked = [texts[index] for index, _ in order for texts in (prompts, *others)]
        embeddings = _Embeddings(model, asked, batch_size)
        for indices in by_size.values():
            for start in range(0, len(indices), batch_size):
                some = indices[start : start + batch_size]
                read = dict(zip(some, pixels))
                problems |= {index: found for index, found in read.items() if isinstance(found, str)}
                if good := [index for index in some if index not in problems]:
                    rows = padded(good, min(batch_size, len(indices)))
                    latents = codec.encode(np.stack([read[index] for index in rows]))
                    named = [names[index] for index in rows]
                    embeds = embeddings([prompts[index] for index in rows])
                    scores[good] = scorer(latents, embeds, named)[: len(good)]
                    for place, other in enumerate(others):
                        embeds = embeddings([other[index] for index in rows])
                        under_others[good, place] = once(latents, embeds, named)[: len(good), 0, 0]
                    features[good] = pooled(latents)[: len(good)]
                progress(len(some))
    return ImageScores(scores, problems, under_others, features)


def _size(image: ImageSource) -> Size | str:
    try:
        header = read_header(image)
    except ImageProblem as problem:
        return str(problem)
    return header.height, header.width


def _pixels(image: ImageSource, size: Size) -> np.ndarray | str:
    try:
        return read_rgb(image, size)
    except ImageProblem as problem:
        return str(problem)


class _Embeddings:
    """Prompts to embeddings on the host, each encoded once while it is kept, several at a time.

    Args:
        order: the prompts in the order in which they will be asked for.
    """

    def __init__(self, model: ImageModel, order: Sequence[str], batch_size: int):
        self._model, self._batch_size = model, batch_size
        self._upcoming = collections.deque(dict.fromkeys(order))
        self._kept: collections.OrderedDict[str, PromptEmbeds] = collections.OrderedDict()

    def __call__(self, prompts: Sequence[str]) -> PromptEmbeds:
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._kept]
        while missing and self._upcoming and len(missing) < self._batch_size:
            prompt = self._upcoming.popleft()
            if prompt not in self._kept and prompt not in missing:
                missing.append(prompt)
        if missing:
            rows = padded(np.arange(len(missing)), self._batch_size)
            embeds = jax.tree.map(np.asarray, self._model.encode_prompt([missing[row] for row in rows]))
            self._kept |= {prompt: embeds[row] for row, prompt in enumerate(missing)}
        for prompt in prompts:
            self._kept.move_to_end(prompt)
        found = [self._kept[prompt] for prompt in prompts]
        while len(self._kept) > PROMPTS_KEPT * self._batch_size:
            self._kept.popitem(last=False)
        return jax.tree.map(lambda *arrays: np.stack(arrays), *found)
