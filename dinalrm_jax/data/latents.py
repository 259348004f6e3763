"""Where the latents of a dataset's images come from: pictures through a VAE, or whatever offers them as they are."""

import functools
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np

from dinalrm_jax.data import buckets
from dinalrm_jax.data.buckets import Size
from dinalrm_jax.data.config import PreparationConfig
from dinalrm_jax.data.files import ImageProblem
from dinalrm_jax.data.images import decode, map_ahead, original, read_bytes, read_header
from dinalrm_jax.encoders.load import ImageCodec

Known = tuple[int, int, str]  # height, width in pixels, and PIL's name of the colours; "RGB" has none to change


class Found(NamedTuple):
    """What became of one image: its array, or the reason why there is none; and its file's size, 0 without a file."""

    array: np.ndarray | str
    file_bytes: int


class Latents(Protocol):
    """Latents of a source's images, by their names."""

    @property
    def downsampling(self) -> int:
        """Pixels along a side of one latent."""
        ...

    @property
    def fingerprint(self) -> str | None:
        """Of the VAE they are of; None where nobody says which one it was."""
        ...

    @property
    def without_bucket(self) -> str:
        """What a pair is called whose images have no bucket."""
        ...

    def size(self, name: str) -> Known | str:
        """What is known of an image before anything is decoded, or the reason why it cannot be used. For threads."""
        ...

    def bucket(self, size: Size, choices: Sequence[Size]) -> Size | None:
        """The bucket of an image of this size, None where it has none among `choices`."""
        ...

    def read(self, shards: Sequence[tuple[Size, Sequence[str]]]) -> Generator[Found]:
        """(H/8, W/8, C) float32 of all images, shard after shard, each brought to its shard's bucket.

        What a shard gives depends on nothing but the shard.
        """
        ...


class EncodedImages:
    """Latents of image files: `Latents` by a codec.

    Args:
        open_image: an image's encoded bytes, as a file, by its name; see `Source.open`.
        codec: encodes them, `config.batch_size` at a time; a last batch is filled up with repetitions, so that
            there is one program, of one rounding.
        config: how images are brought to their buckets, and how many threads decode them.
    """

    without_bucket = "pair of an image of odd aspect"

    def __init__(self, open_image: Callable[[str], BinaryIO], codec: ImageCodec, config: PreparationConfig):
        self.downsampling, self.fingerprint = codec.downsampling, codec.fingerprint
        self._open, self._codec, self._config = open_image, codec, config

    def size(self, name: str) -> Known | str:
        try:
            header = read_header(functools.partial(self._open, original(name)))
        except ImageProblem as problem:
            return problem.reason
        return header.height, header.width, header.mode

    def bucket(self, size: Size, choices: Sequence[Size]) -> Size | None:
        if self._config.fit == "crop":
            return buckets.nearest_aspect(size, choices)
        return buckets.nearest(size, choices, self._config.aspect_tolerance)

    def read(self, shards: Sequence[tuple[Size, Sequence[str]]]) -> Generator[Found]:
        batch_size = self._config.batch_size
        with ThreadPoolExecutor(self._config.threads) as pool:
            # Threads decode ahead, across shards, while the encoder runs.
            jobs = [(name, bucket) for bucket, names in shards for name in names]
            decoded = map_ahead(pool, lambda job: self._decode(*job), jobs, ahead=4 * batch_size)
            for _, names in shards:
                yield from self._encode(zip(names, itertools.islice(decoded, len(names))))

    def _decode(self, name: str, bucket: Size) -> Found:
        """An image's pixels."""
        try:
            data = read_bytes(functools.partial(self._open, name))
            return Found(decode(data, bucket, crop=self._config.fit == "crop"), len(data))
        except ImageProblem as problem:
            return Found(problem.reason, 0)

    def _encode(self, images: Iterator[tuple[str, Found]]) -> Iterator[Found]:
        """Latents of a shard's pixels, in full batches of what is readable; the problems keep their places."""
        waiting: list[tuple[str, Found]] = []
        for image in images:
            waiting.append(image)
            if sum(not isinstance(found.array, str) for _, found in waiting) == self._config.batch_size:
                yield from self._encode_batch(waiting)
                waiting = []
        yield from self._encode_batch(waiting)

    def _encode_batch(self, images: Sequence[tuple[str, Found]]) -> Iterator[Found]:
        good = [index for index, (_, found) in enumerate(images) if not isinstance(found.array, str)]
        if good:
            rows = np.resize(good, self._config.batch_size)
            pixels = np.stack([images[row][1].array for row in rows])
            latents = dict(zip(good, self._codec.encode(pixels, [images[row][0] for row in rows])))
        for index, (_, found) in enumerate(images):
            yield found._replace(array=latents[index]) if index in good else found
