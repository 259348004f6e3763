"""Several record directories as one, each with a weight."""

import bisect
import dataclasses
import hashlib
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

from dinalrm_jax.data.config import MixedConfig
from dinalrm_jax.data.records import PairRecord, Records, RecordsError


class Mixture:
    """Record directories behind each other, with the interface of one `Records`.

    Indices go on from one directory to the next. A bucket belongs to one directory, so a batch does. A pair's kind
    begins with its directory's name, so that reports tell the directories apart.

    Args:
        parts: the directories, and how often the pairs of each come in an epoch.

    Raises:
        RecordsError: a directory that is none or stands there twice, or embeddings that differ in encoders or length.
    """

    def __init__(self, parts: Sequence[MixedConfig]):
        self._records = [Records(part.data) for part in parts]
        self._weights = [part.weight for part in parts]
        self._names = _short_names([records.directory.resolve() for records in self._records])
        first = self._records[0]
        for records in self._records[1:]:
            kinds = [(one.encoders, one.manifest.get("codec"), one.manifest.get("text")) for one in (first, records)]
            lengths = [one.prompts[0].prompt_embeds.shape for one in (first, records)]
            if kinds[0] != kinds[1] or lengths[0] != lengths[1]:
                raise RecordsError(
                    f"{records.directory} was made by other encoders than {first.directory}: {kinds[1]} of embeddings "
                    f"{lengths[1]}, there {kinds[0]} of {lengths[0]}; preprocess them alike to mix them"
                )
        self.directory = " + ".join(str(records.directory) for records in self._records)
        self.encoders, self.manifest = (
            first.encoders,
            {key: first.manifest[key] for key in ("codec", "text") if key in first.manifest},
        )
        self.images = _Joined([records.images for records in self._records])
        self.prompts = _Joined([records.prompts for records in self._records])

    @property
    def fingerprint(self) -> str:
        """As of one `Records`; the weights belong to the configuration."""
        return hashlib.sha256(" ".join(records.fingerprint for records in self._records).encode()).hexdigest()[:16]

    def pairs(self, split: str) -> Sequence[PairRecord]:
        """The pairs of a split, of all directories that have it."""
        parts = []
        for number, (name, records) in enumerate(zip(self._names, self._records)):
            if records.buckets(split):
                images, prompts = self.images.starts[number], self.prompts.starts[number]
                parts.append(_Shifted(records.pairs(split), images, prompts, name))
        return _Joined(parts)

    def buckets(self, split: str) -> dict[str, range]:
        """The rows of a split's pairs by directory, whose name may change, and bucket, in order."""
        out, start = {}, 0
        for number, records in enumerate(self._records):
            for bucket, rows in records.buckets(split).items():
                out[f"{bucket} of set {number}"] = range(start, start + len(rows))
                start += len(rows)
        return out

    def weights(self, split: str) -> dict[str, float]:
        """How often a bucket's pairs come in an epoch."""
        return {
            f"{bucket} of set {number}": weight
            for number, (records, weight) in enumerate(zip(self._records, self._weights))
            for bucket in records.buckets(split)
        }


def _short_names(directories: Sequence[pathlib.Path]) -> list[str]:
    """As much of the end of each path as tells them apart: "data", or "first-data" and "second-data"."""
    if len(set(directories)) < len(directories):
        raise RecordsError(f"mixture names one directory twice: {', '.join(map(str, directories))}")
    for length in itertools.count(1):
        names = ["-".join(directory.parts[-length:]) for directory in directories]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("different paths have different names")


class _Joined(Sequence):
    """Sequences behind each other; `starts` is where each begins."""

    def __init__(self, parts: Sequence[Sequence]):
        self._parts = parts
        *self.starts, self._count = itertools.accumulate(map(len, parts), initial=0)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:  # type: ignore[override]  # no slices
        if not 0 <= index < self._count:
            raise IndexError(f"row {index} of {self._count}")
        part = bisect.bisect_right(self.starts, index) - 1
        return self._parts[part][index - self.starts[part]]


@dataclasses.dataclass(frozen=True)
class _Shifted(Sequence):
    """A directory's pairs with the mixture's indices."""

    pairs: Sequence[PairRecord]
    images: int
    prompts: int
    name: str

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> PairRecord:  # type: ignore[override]  # no slices
        pair = self.pairs[index]
        return PairRecord(
            self.images + pair.chosen,
            self.images + pair.rejected,
            self.prompts + pair.prompt,
            f"{self.name}/{pair.kind}",
            pair.label,
        )


AnyRecords = Records | Mixture
