"""DiNa-LRM's preprocessed HPDv3 (liuhuohuo/DiNa-LRM-SD35m-HPSv3-Preprocess-Data): latents instead of images.

    SOURCE/bucket_index.csv    parquet_path, row_group, row_index (in its group), width, height (in pixels), ...
    SOURCE/**/*.parquet        prompt, latent1 (chosen), latent2 (rejected), detailed_results (optional)

A latent is the bytes of a .npy file, (16, height / 8, width / 8) float32, a sample of the VAE's posterior,
shifted and scaled. `parquet_path` counts by its base name only. `detailed_results` spells a Python dict with
votes_chosen, votes_rejected and confidence.
"""

import csv
import dataclasses
import io
import pathlib
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from dinalrm_jax.data.buckets import Size
from dinalrm_jax.data.files import UNREADABLE, is_of_the_file_system, patiently
from dinalrm_jax.data.latents import Found, Known
from dinalrm_jax.data.preferences import Preference, Source, hold_out
from dinalrm_jax.data.records import RecordsError
from dinalrm_jax.data.sources.json_rows import parse_literal, parse_number, parse_votes

INDEX = "bucket_index.csv"
INDEX_COLUMNS = ("parquet_path", "row_group", "row_index", "width", "height")
COLUMNS = {"chosen": "latent1", "rejected": "latent2"}
VOTES = "detailed_results"
CHANNELS, DOWNSAMPLING = 16, 8  # of SD3's VAE
DATASET = "DiNa-LRM's preprocessed data"


def read(source: pathlib.Path, holdout: int, fingerprint: str | None) -> Source:
    """The pairs of the index, those of `holdout` prompts held out: the set has no split of its own.

    Rows that are not there, or not what the index says, are left out and counted. Which VAE made the latents is not
    written anywhere.

    Args:
        source: the directory.
        holdout: prompts to hold out.
        fingerprint: of the VAE that they are said to be of, if anyone says.

    Raises:
        RecordsError: not such a directory, one without any row of its index, or a damaged parquet file.
    """
    counts: Counter[str] = Counter()
    index, paths = _index(source, counts), _parquet_files(source)
    preferences, sizes = [], {}
    for base in sorted(index):
        if base not in paths:
            counts["row of a missing parquet file"] += len(index[base])
            continue
        groups = _rows(paths[base])
        for (group, row), size in sorted(index[base].items()):
            if group >= len(groups) or row >= len(groups[group]):
                counts["row that its parquet file does not have"] += 1
                continue
            prompt, details = groups[group][row]
            if prompt is None:
                counts["row without a prompt"] += 1
                continue
            chosen, rejected = (f"{base}:{group:06}:{row:06}:{side}" for side in COLUMNS)
            preferences.append(Preference(prompt, chosen, rejected, *_votes(details)))
            sizes |= {chosen: size, rejected: size}
    if not preferences:
        found = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
        raise RecordsError(f"{source} holds no row of its {INDEX}: {found or 'which is empty'}")
    counts["note: votes unknown"] = sum(row.votes is None for row in preferences)
    return Source(hold_out(preferences, holdout, str(source)), counts, latents=StoredLatents(paths, sizes, fingerprint))


def _index(source: pathlib.Path, counts: Counter) -> dict[str, dict[tuple[int, int], Size]]:
    """Size by row group and row, by parquet file."""
    path = source / INDEX
    if not path.is_file():
        raise RecordsError(f"{source} is not a directory of {DATASET}: it has no {INDEX}")
    index: dict[str, dict[tuple[int, int], Size]] = {}
    try:
        rows = csv.DictReader(io.StringIO(patiently(path.read_bytes, path).decode()))
        if missing := set(INDEX_COLUMNS) - set(rows.fieldnames or ()):
            raise RecordsError(f"{path} lacks the columns {sorted(missing)} of {DATASET}")
        for row in rows:
            numbers = [_count(row[name]) for name in INDEX_COLUMNS[1:]]
            group, number, width, height = numbers
            if None in numbers or not row["parquet_path"]:
                counts["index row that is not one"] += 1
            elif min(width, height) < 16 or width % 16 or height % 16:
                counts["index row of a size that latents cannot have"] += 1
            elif (group, number) in (of_file := index.setdefault(pathlib.PurePath(row["parquet_path"]).name, {})):
                counts["index row that is there twice"] += 1
            else:
                of_file[group, number] = height, width
    except (csv.Error, UnicodeDecodeError) as error:
        raise RecordsError(f"{path} is not a CSV file in UTF-8: {error}") from None
    return index


def _count(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() and len(text) < 10 else None


def _parquet_files(source: pathlib.Path) -> dict[str, pathlib.Path]:
    paths: dict[str, pathlib.Path] = {}
    for path in sorted(source.rglob("*.parquet")):
        if (other := paths.setdefault(path.name, path)) != path:
            raise RecordsError(f"{other} and {path} have one name, by which {INDEX} knows them; keep one of them")
    return paths


def _rows(path: pathlib.Path) -> list[list[tuple[str | None, str | None]]]:
    """Prompt and `detailed_results` of every row, by row group."""
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if missing := {"prompt", *COLUMNS.values()} - set(names):
            raise RecordsError(f"{path} lacks the columns {sorted(missing)} of {DATASET}")
        wanted = ["prompt", *([VOTES] if VOTES in names else [])]
        groups = []
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=wanted)
            nothing = table.num_rows * [None]
            groups.append(list(zip(table["prompt"].to_pylist(), table[VOTES].to_pylist() if wanted[1:] else nothing)))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise RecordsError(f"{path} is not a readable parquet file: {error}; fetch it again") from None
    return groups


def _votes(details: Any) -> tuple[tuple[int, int] | None, float | None]:
    found = parse_literal(details) if isinstance(details, str) else None
    if not isinstance(found, dict):
        return None, None
    votes = parse_votes([found.get("votes_chosen"), found.get("votes_rejected")])
    # The authors write 0 for votes and confidence that HPDv3 does not have.
    return votes if votes and any(votes) else None, parse_number(found.get("confidence")) or None


@dataclasses.dataclass(frozen=True)
class StoredLatents:
    """`Latents` as the parquet files hold them; row groups are read one after another.

    Attributes:
        paths: of the files, by base name.
        sizes: (height, width) in pixels, by image name, which is "FILE:GROUP:ROW:chosen" or "rejected".
        fingerprint: of the VAE that they are said to be of.
    """

    paths: Mapping[str, pathlib.Path]
    sizes: Mapping[str, Size]
    fingerprint: str | None
    downsampling: ClassVar[int] = DOWNSAMPLING
    without_bucket: ClassVar[str] = "pair of a size that is no bucket"

    def size(self, name: str) -> Known | str:
        return *self.sizes[name], "RGB"

    def bucket(self, size: Size, choices: Sequence[Size]) -> Size | None:
        """Their own: latents are not resized."""
        return size if size in choices else None

    def read(self, shards: Sequence[tuple[Size, Sequence[str]]]) -> Generator[Found]:
        place, rows = None, None
        for size, names in shards:
            for name in names:
                base, group, row, side = name.rsplit(":", 3)
                if place != (base, group):
                    place, rows = (base, group), self._read_group(self.paths[base], int(group))
                if rows is None:
                    yield Found(f"{UNREADABLE}: damaged row group", 0)
                else:
                    yield Found(_latents(rows[COLUMNS[side]][int(row)].as_py(), size), 0)

    @staticmethod
    def _read_group(path: pathlib.Path, group: int) -> Any:
        """The group's latents, None where they are damaged."""
        import pyarrow
        import pyarrow.parquet as parquet

        def read():
            try:
                return parquet.ParquetFile(path).read_row_group(group, columns=list(COLUMNS.values()))
            except (pyarrow.ArrowException, OSError) as error:
                if is_of_the_file_system(error):
                    raise
                return None

        return patiently(read, path)


def _latents(data: bytes | None, size: Size) -> np.ndarray | str:
    """(H/8, W/8, 16) float32 of an image of this size, or the reason why there are none."""
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception:  # of bytes that are no .npy file, of any kind; None among them
        return UNREADABLE
    shape = (CHANNELS, size[0] // DOWNSAMPLING, size[1] // DOWNSAMPLING)
    if not isinstance(array, np.ndarray) or array.shape != shape or array.dtype.kind != "f":
        return f"{UNREADABLE}: latents of another shape"
    with np.errstate(over="ignore"):
        if not np.isfinite(array.astype(np.float16)).all():
            return f"{UNREADABLE}: latents that are not finite"
    return np.ascontiguousarray(array.transpose(1, 2, 0), np.float32)
