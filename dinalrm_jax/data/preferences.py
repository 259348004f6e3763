"""Human preferences as every source gives them, and what their readers share."""

import dataclasses
import hashlib
import itertools
import json
import pathlib
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, BinaryIO

from dinalrm_jax.data.records import RecordsError

TEXT_KEYS = {"prompt", "path1", "path2", "chosen", "rejected"}


@dataclasses.dataclass(frozen=True, slots=True)
class Preference:
    """One strict human preference: image `chosen` over image `rejected` for `prompt`.

    Images are named within their source. Votes (for, against) and confidence are None where unknown.
    """

    prompt: str
    chosen: str
    rejected: str
    votes: tuple[int, int] | None = None
    confidence: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Ranking:
    """Images of one prompt as people ranked them: lower is better, equal ranks are a tie.

    A pair with a winner is a ranking with ranks 1 and 2.
    """

    prompt: str
    images: tuple[str, ...]
    ranks: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A test set to evaluate on.

    Attributes:
        name: with its split, where it has several.
        rankings: ties included.
        open: as `Source.open`.
    """

    name: str
    rankings: Sequence[Ranking]
    open: Callable[[str], BinaryIO]


@dataclasses.dataclass(frozen=True)
class Source:
    """A dataset, read but for its images.

    Attributes:
        preferences: by split, "train" and "eval".
        counts: what was left out or is odd, by reason.
        open: an image's encoded bytes, as a file, by its name; raises FileNotFoundError.
    """

    preferences: Mapping[str, Sequence[Preference]]
    counts: Counter
    open: Callable[[str], BinaryIO]


def files_below(root: pathlib.Path) -> Callable[[str], BinaryIO]:
    """`Source.open` of image files named relative to `root`."""
    return lambda name: (root / name).open("rb")


def read_rows(path: pathlib.Path, keys: Sequence[str], dataset: str) -> list[dict[str, Any]]:
    """The rows of a JSON array, or of JSON lines, each holding at least `keys`; errors count rows from 0.

    What is named "prompt", "path1", "path2", "chosen" or "rejected" must be text.

    Raises:
        RecordsError: not that, naming file and row.
    """
    if not path.parent.is_dir():
        raise RecordsError(f"{path.parent} is not a directory")
    if not path.is_file():
        raise RecordsError(f"{path.parent} is not a directory of {dataset}: it has no {path.name}")
    text = path.read_text()
    lines = [text] if text.lstrip().startswith("[") else text.split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            where = f", line {number}" if len(lines) > 1 else ""
            raise RecordsError(f"{path}{where} is neither a JSON array nor JSON lines: {error}") from None
    if text.lstrip().startswith("["):
        (rows,) = rows
    if not rows:
        raise RecordsError(f"{path} holds no rows")
    for index, row in enumerate(rows):
        if not isinstance(row, dict) or any(key not in row for key in keys):
            found = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise RecordsError(f"{path}, row {index}: expected the keys {', '.join(keys)} of {dataset}, found {found}")
        for key in TEXT_KEYS & row.keys():
            if not isinstance(row[key], str):
                raise RecordsError(f"{path}, row {index}: {key} must be text, got {row[key]!r}")
    return rows


def read_rankings(path: pathlib.Path, names: str, ranks: str, prefix: str, dataset: str) -> list[Ranking]:
    """The rankings of a JSON file.

    Args:
        path: of the file.
        names, ranks: the keys of a row's image names and of their ranks.
        prefix: of the image names.
        dataset: what errors call it.

    Raises:
        RecordsError: rows of another form, naming the row.
    """
    rankings = []
    for index, row in enumerate(read_rows(path, ("prompt", names, ranks), dataset)):
        if not _list_of(row[names], str) or not _list_of(row[ranks], int | float):
            raise RecordsError(f"{path}, row {index}: {names} must be a list of texts and {ranks} one of numbers")
        if len(row[names]) != len(row[ranks]):
            raise RecordsError(f"{path}, row {index}: {len(row[names])} {names} but {len(row[ranks])} ranks")
        rankings.append(Ranking(row["prompt"], tuple(prefix + name for name in row[names]), tuple(row[ranks])))
    return rankings


def _list_of(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) and value == value for value in values)


def ranked_pairs(ranking: Ranking, counts: Counter) -> list[Preference]:
    """All strict pairs of a ranking; ties are counted."""
    pairs = []
    for (first, rank_first), (second, rank_second) in itertools.combinations(zip(ranking.images, ranking.ranks), 2):
        if rank_first == rank_second:
            counts["tied rank"] += 1
        elif rank_first < rank_second:
            pairs.append(Preference(ranking.prompt, first, second))
        else:
            pairs.append(Preference(ranking.prompt, second, first))
    return pairs


def hold_out(preferences: Sequence[Preference], prompts: int, dataset: str) -> dict[str, list[Preference]]:
    """Splits off the pairs of some prompts, the smallest by a hash of the prompt.

    Raises:
        RecordsError: no prompts would be left on one of the sides.
    """
    ordered = sorted({row.prompt for row in preferences}, key=stable_hash)
    if not 0 < prompts < len(ordered):
        raise RecordsError(
            f"{dataset} has no split of its own, and holdout (--holdout) must leave prompts on both "
            f"sides: {prompts} of {len(ordered)} prompts"
        )
    held = set(ordered[:prompts])
    split: dict[str, list[Preference]] = {"train": [], "eval": []}
    for row in preferences:
        split["eval" if row.prompt in held else "train"].append(row)
    return split


def stable_hash(*parts: object) -> bytes:
    """Bytes to order things by, the same on every machine."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).digest()


def select(
    rows: Iterable[Preference], min_vote_share: float, min_confidence: float, counts: Counter
) -> list[Preference]:
    """The rows that people agreed on, in their order; the others are counted by reason.

    A row whose votes or confidence are unknown passes that check.

    Args:
        rows: training preferences.
        min_vote_share: votes for the chosen image over all votes must exceed this. As in the released
            filter (0.6), a row without any vote for the chosen image passes; 0 keeps all.
        min_confidence: the least annotator confidence (HPSv3's training uses 0.95).
        counts: of what is left out, by reason.
    """
    kept = []
    for row in rows:
        if row.votes is not None and 0 < row.votes[0] <= min_vote_share * sum(row.votes):
            counts["vote share too small"] += 1
        elif row.confidence is not None and row.confidence < min_confidence:
            counts["confidence too small"] += 1
        else:
            kept.append(row)
    return kept


def pick(groups: Sequence[Hashable], at_most: int, seed: int) -> list[int]:
    """Indices of at most so many members of each group, picked by a seeded hash, in order; 0: all."""
    by_group = defaultdict(list)
    for index, group in enumerate(groups):
        by_group[group].append(index)
    return sorted(
        index
        for members in by_group.values()
        for index in (sorted(members, key=lambda i: stable_hash(seed, i))[:at_most] if at_most else members)
    )
