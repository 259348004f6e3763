"""Records on disk: three TFDS datasets in ArrayRecord files, written and read without TensorFlow.

    DIRECTORY/manifest.json     what made the records, and how many pairs of each bucket there are
    DIRECTORY/images/           split "rows": clean, scaled latents, once per distinct image; a shard holds one size
    DIRECTORY/prompts/          split "rows": embeddings, once per distinct prompt
    DIRECTORY/pairs/            splits "train", "eval": indices of the chosen and the rejected image and of the prompt

A pair is read by joining the three by index. Pairs of one bucket (image size) stand together.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dinalrm_jax.disk import mounted, publish, whole_directory
from dinalrm_jax.mapping import from_mapping, to_mapping
from dinalrm_jax.model.encoding import EncodersConfig

FORMAT = "dinalrm_jax/records/2"


class RecordsError(ValueError):
    """A directory that does not hold the records it should."""


@dataclasses.dataclass(frozen=True)
class ImageRecord:
    """Clean, scaled latents (H, W, C), stored in float16; the image's name, and its file's size (0: no file)."""

    latents: np.ndarray
    name: str
    file_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class PromptRecord:
    """The text and its embeddings (T, D) and (P,), stored in float16."""

    text: str
    prompt_embeds: np.ndarray
    pooled_prompt_embeds: np.ndarray


@dataclasses.dataclass(frozen=True)
class PairRecord:
    """Indices into images and prompts; `kind` groups pairs in reports.

    `label` is the probability that `chosen` is preferred: 1/2 of a tie. (Records of before it was there have 1.)
    """

    chosen: int
    rejected: int
    prompt: int
    kind: str
    label: float = 1.0


def write(
    directory: str | pathlib.Path,
    *,
    images: Iterable[ImageRecord],
    prompts: Sequence[PromptRecord],
    pairs: Mapping[str, Sequence[PairRecord]],
    encoders: EncodersConfig,
    downsampling: int,
    source: Mapping[str, Any],
) -> None:
    """Writes a whole record directory of one shard each, or nothing.

    Args:
        directory: must not exist.
        images: in index order; consumed once.
        prompts: in index order, all with embeddings of one shape.
        pairs: by split.
        encoders: what made latents and embeddings.
        downsampling: pixels along a side of one latent.
        source: JSON values that say what the records were made of.
    """
    buckets: list[str] = []

    def noting_buckets():
        for image in images:
            buckets.append(bucket_of(image.latents, downsampling))
            yield image

    with whole_directory(directory) as partial:
        for name in ("images", "prompts", "pairs"):
            (partial / name).mkdir()
        image_shard = write_shard(shard_path(partial, "images", "rows", 0, 1), image_features(), noting_buckets())
        features = prompt_features(prompts[0])
        prompt_shard = write_shard(shard_path(partial, "prompts", "rows", 0, 1), features, prompts)
        finish(
            partial,
            image_shards=[image_shard],
            prompt_shards=[prompt_shard],
            prompt_features=features,
            pairs={split: [(buckets[pair.chosen], pair) for pair in rows] for split, rows in pairs.items()},
            manifest={"encoders": to_mapping(encoders), "source": source},
        )


def finish(
    directory: pathlib.Path,
    *,
    image_shards: Sequence["Shard"],
    prompt_shards: Sequence["Shard"],
    prompt_features: Any,
    pairs: Mapping[str, Sequence[tuple[str, PairRecord]]],
    manifest: Mapping[str, Any],
) -> None:
    """Completes a directory whose image and prompt shards are written: pairs, metadata, manifest.

    `pairs` gives each pair with its bucket; they are put in order of their buckets.
    """
    (directory / "pairs").mkdir(exist_ok=True)
    pair_shards, counts = {}, {}
    for split, rows in pairs.items():
        ordered = sorted(rows, key=lambda row: row[0])
        counts[split] = dict(Counter(bucket for bucket, _ in ordered))
        path = shard_path(directory, "pairs", split, 0, 1)
        pair_shards[split] = [write_shard(path, pair_features(), (pair for _, pair in ordered))]
    _write_metadata(directory / "images", image_features(), {"rows": image_shards})
    _write_metadata(directory / "prompts", prompt_features, {"rows": prompt_shards})
    _write_metadata(directory / "pairs", pair_features(), pair_shards)
    text = json.dumps({"format": FORMAT, "pairs": counts, **manifest}, indent=1, sort_keys=True)
    (directory / "manifest.json").write_text(text + "\n")


def bucket_of(latents: np.ndarray, downsampling: int) -> str:
    """The bucket (pixels, height first) of latents (H, W, C)."""
    return f"{latents.shape[0] * downsampling}x{latents.shape[1] * downsampling}"


# ------------------------------------------------------------------------------------- shards


@dataclasses.dataclass(frozen=True)
class Shard:
    """A written file: how many records it holds, of how many bytes."""

    records: int
    num_bytes: int


def shard_path(directory: pathlib.Path, dataset: str, split: str, index: int, count: int) -> pathlib.Path:
    """TFDS's name of shard `index` of `count`."""
    return directory / dataset / f"{dataset}-{split}.array_record-{index:05d}-of-{count:05d}"


def write_shard(path: pathlib.Path, features, rows: Iterable[Any]) -> Shard:
    """Writes one ArrayRecord file, whole or not at all; arrays are stored in float16.

    Raises:
        OSError: the file could not be written, a full disk among the reasons.
        ValueError: a number that float16 cannot hold.
    """
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    serializer = ExampleSerializer(features.get_serialized_info())
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    count = size = 0
    try:
        # One record a group: a random read touches nothing but what was asked for. Float16 noise does
        # not compress.
        writer = ArrayRecordWriter(str(partial), "group_size:1,uncompressed")
        for row in rows:
            example = serializer.get_tf_example(features.encode_example(_half(row)))
            data = example.SerializeToString(deterministic=True)  # a map's order depends on the process otherwise
            _writing(path, functools.partial(writer.write, data))
            count, size = count + 1, size + len(data)
        _writing(path, writer.close)
        reader = ArrayRecordReader(str(partial))
        found = reader.num_records()
        reader.close()
        if found != count:
            raise OSError(f"cannot write {path}: it took {found} of {count} records")
        publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return Shard(count, size)


def _writing(path: pathlib.Path, action: Callable[[], None]) -> None:
    """ArrayRecord's failures as what they are."""
    try:
        action()
    except RuntimeError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def image_features():
    import tensorflow_datasets as tfds

    return _features(latents=_half_tensor((None, None, None)), name=tfds.features.Text(), file_bytes=np.int64)


def prompt_features(like: PromptRecord):
    """For embeddings of the shapes of `like`."""
    import tensorflow_datasets as tfds

    return _features(
        text=tfds.features.Text(),
        prompt_embeds=_half_tensor(like.prompt_embeds.shape),
        pooled_prompt_embeds=_half_tensor(like.pooled_prompt_embeds.shape),
    )


def pair_features():
    import tensorflow_datasets as tfds

    return _features(chosen=np.int64, rejected=np.int64, prompt=np.int64, kind=tfds.features.Text(), label=np.float32)


def _features(**features):
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(features)


def _half_tensor(shape: tuple[int | None, ...]):
    import tensorflow_datasets as tfds

    return tfds.features.Tensor(shape=shape, dtype=np.float16, encoding="bytes")


def to_half(name: str, array: np.ndarray) -> np.ndarray:
    """The array as records hold it, in float16.

    Raises:
        ValueError: a number that is not finite, or becomes infinite.
    """
    with np.errstate(over="ignore"):
        half = np.asarray(array).astype(np.float16)
    if not np.isfinite(half).all():
        raise ValueError(
            f"{name} holds numbers that are not finite in float16 (largest {np.abs(array).max():g}); the encoder that "
            "made them is broken, or its compute dtype overflows: try float32"
        )
    return half


def _half(record) -> dict[str, Any]:
    values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    return {key: to_half(key, value) if isinstance(value, np.ndarray) else value for key, value in values.items()}


def _write_metadata(directory: pathlib.Path, features, splits: Mapping[str, Sequence[Shard]]) -> None:
    import tensorflow_datasets as tfds

    infos = []
    for split, shards in splits.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=directory, dataset_name=directory.name, filetype_suffix="array_record", split=split
        )
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[shard.records for shard in shards],
                num_bytes=sum(shard.num_bytes for shard in shards),
                filename_template=template,
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=features,
        split_infos=infos,
        check_data=False,  # by reading, which needs TensorFlow
        description=f"{FORMAT} {directory.name}",
    )


# ------------------------------------------------------------------------------------ reading


class Records:
    """A record directory, open for random access.

    Attributes:
        manifest: what made the records.
        encoders: the encoders among it.
        images, prompts: sequences of `ImageRecord` and `PromptRecord`.

    Raises:
        RecordsError: not such a directory, an unfinished one, or one of another format.
        ConfigError: one in a bucket that is not mounted.
    """

    def __init__(self, directory: str | pathlib.Path):
        self.directory = mounted(directory)
        path = self.directory / "manifest.json"
        if not path.is_file():
            lacking = "holds no manifest.json, so it is not" if self.directory.is_dir() else "is not there, or not"
            raise RecordsError(
                f"{self.directory} {lacking} a directory of records; make one with python -m dinalrm_jax.preprocess"
            )
        try:
            self.manifest = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise RecordsError(f"{path} is not JSON: {error}") from None
        if self.manifest.get("format") != FORMAT:
            raise RecordsError(f"{path} has format {self.manifest.get('format')!r}, this version reads {FORMAT!r}")
        self.encoders = from_mapping(EncodersConfig, self.manifest["encoders"], str(path))
        self.images = _Rows(self._source("images", "rows"), ImageRecord)
        self.prompts = _Rows(self._source("prompts", "rows"), PromptRecord)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Tells contents apart, wherever they lie.

        Of the manifest, all pairs, and of every other shard name, size and some pages: to read all latents would take
        hours.
        """
        digest = hashlib.sha256((self.directory / "manifest.json").read_bytes())
        for path in sorted(self.directory.rglob("*.array_record-*")):
            digest.update(f"{path.relative_to(self.directory)} {path.stat().st_size}\0".encode())
            if path.parent.name == "pairs":
                digest.update(path.read_bytes())
            else:
                with path.open("rb") as file:
                    for place in (0, path.stat().st_size // 2):
                        file.seek(place)
                        digest.update(file.read(16384))
        return digest.hexdigest()[:16]

    def pairs(self, split: str) -> Sequence[PairRecord]:
        """The pairs of a split, "train" or "eval"."""
        return _Rows(self._source("pairs", split), PairRecord)

    def buckets(self, split: str) -> dict[str, range]:
        """The rows of a split's pairs by bucket, in order."""
        out, start = {}, 0
        for bucket, count in self.manifest["pairs"].get(split, {}).items():
            out[bucket] = range(start, start + count)
            start += count
        return out

    def weights(self, split: str) -> dict[str, float]:
        """How often a bucket's pairs come in an epoch."""
        return dict.fromkeys(self.buckets(split), 1.0)

    def _source(self, name: str, split: str):
        import tensorflow_datasets as tfds

        try:
            builder = tfds.builder_from_directory(self.directory / name)
            source = builder.as_data_source(split)
            for end in {0, len(source) - 1} if len(source) else ():
                source[end]  # opens the file, which a missing or damaged one fails
            return source
        except Exception as error:  # tfds raises many kinds for a damaged directory
            raise RecordsError(f"{self.directory / name} has no readable split {split!r}: {error}") from error


class _Rows(Sequence):
    def __init__(self, source, record_type):
        self._source, self._record_type = source, record_type

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int):  # type: ignore[override]  # no slices
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row = self._source[index]
        return self._record_type(**{key: _plain(value) for key, value in row.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    return value if np.ndim(value) else np.asarray(value).item()
