"""Records on disk: three TFDS datasets in ArrayRecord files, written and read without TensorFlow.

    DIRECTORY/manifest.json     what made the records: codec, text encoder, their parameters
    DIRECTORY/images/           split "rows": clean, scaled latents, once per distinct image
    DIRECTORY/prompts/          split "rows": embeddings, once per distinct prompt
    DIRECTORY/pairs/            splits "train", "eval": indices of the chosen and the rejected image and of the prompt

A pair is read by joining the three by index.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dinalrm_jax.disk import whole_directory

FORMAT = "dinalrm_jax/records/1"


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
    """Indices into images and prompts; `kind` groups pairs in reports."""

    chosen: int
    rejected: int
    prompt: int
    kind: str


def write(
    directory: str | pathlib.Path,
    *,
    images: Iterable[ImageRecord],
    prompts: Sequence[PromptRecord],
    pairs: Mapping[str, Sequence[PairRecord]],
    manifest: Mapping[str, Any],
) -> None:
    """Writes a whole record directory, or nothing.

    Args:
        directory: must not exist.
        images: in index order; consumed once.
        prompts: in index order, all with embeddings of one shape.
        pairs: by split.
        manifest: JSON values that say which codec and text encoder made the records, from what.
    """
    import tensorflow_datasets as tfds

    tokens, pooled = prompts[0].prompt_embeds.shape, prompts[0].pooled_prompt_embeds.shape
    half = functools.partial(tfds.features.Tensor, dtype=np.float16, encoding="bytes")
    image_features = {"latents": half(shape=(None, None, None)), "name": tfds.features.Text(), "file_bytes": np.int64}
    prompt_features = {
        "text": tfds.features.Text(),
        "prompt_embeds": half(shape=tokens),
        "pooled_prompt_embeds": half(shape=pooled),
    }
    pair_features = {"chosen": np.int64, "rejected": np.int64, "prompt": np.int64, "kind": tfds.features.Text()}
    with whole_directory(directory) as partial:
        _write_dataset(partial / "images", image_features, {"rows": map(_half, images)})
        _write_dataset(partial / "prompts", prompt_features, {"rows": map(_half, prompts)})
        _write_dataset(partial / "pairs", pair_features, {split: map(_half, rows) for split, rows in pairs.items()})
        text = json.dumps({"format": FORMAT, **manifest}, indent=1, sort_keys=True)
        (partial / "manifest.json").write_text(text + "\n")


def _half(record) -> dict[str, Any]:
    values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    return {key: value.astype(np.float16) if isinstance(value, np.ndarray) else value for key, value in values.items()}


def _write_dataset(directory: pathlib.Path, features, splits: Mapping[str, Iterable[dict]]) -> None:
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

    directory.mkdir()
    features = tfds.features.FeaturesDict(features)
    infos = []
    for split, rows in splits.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=directory, dataset_name=directory.name, filetype_suffix="array_record", split=split
        )
        # One record a group: a random read decodes nothing but what was asked for.
        writer = ArrayRecordWriter(str(template.sharded_filepath(shard_index=0, num_shards=1)), "group_size:1")
        count = size = 0
        for row in rows:
            data = features.serialize_example(row)
            writer.write(data)
            count, size = count + 1, size + len(data)
        writer.close()
        infos.append(tfds.core.SplitInfo(name=split, shard_lengths=[count], num_bytes=size, filename_template=template))
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=features,
        split_infos=infos,
        check_data=False,  # by reading, which needs TensorFlow
        description=f"{FORMAT} {directory.name}",
    )


class Records:
    """A record directory, open for random access.

    Attributes:
        manifest: what made the records.
        images, prompts: sequences of `ImageRecord` and `PromptRecord`.

    Raises:
        RecordsError: not such a directory, an unfinished one, or one of another format.
    """

    def __init__(self, directory: str | pathlib.Path):
        self.directory = pathlib.Path(directory)
        path = self.directory / "manifest.json"
        if not path.is_file():
            raise RecordsError(
                f"{self.directory} holds no manifest.json, so it is not a directory of records; make one with "
                "python -m dinalrm_jax.preprocess"
            )
        try:
            self.manifest = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise RecordsError(f"{path} is not JSON: {error}") from None
        if self.manifest.get("format") != FORMAT:
            raise RecordsError(f"{path} has format {self.manifest.get('format')!r}, this version reads {FORMAT!r}")
        self.images = _Rows(self._source("images", "rows"), ImageRecord)
        self.prompts = _Rows(self._source("prompts", "rows"), PromptRecord)

    def pairs(self, split: str) -> Sequence[PairRecord]:
        """The pairs of a split, "train" or "eval"."""
        return _Rows(self._source("pairs", split), PairRecord)

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

    def __getitem__(self, index: int):
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row = self._source[index]
        values = {
            key: value.decode() if isinstance(value, bytes) else int(value) if np.ndim(value) == 0 else value
            for key, value in row.items()
        }
        return self._record_type(**values)
