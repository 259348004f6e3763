"""HPDv2 (ymhao/HPDv2): human rankings and pairs, from its published files.

SOURCE/test.json    [{"prompt", "image_path": [n names], "rank": [n ranks, lower is better], ...}]
SOURCE/test/*.jpg
SOURCE/train.json   [{"prompt", "file_path": [2 names], "human_preference": [1, 0] or [0, 1]}]   (optional)
SOURCE/train/*.jpg
"""

import dataclasses
import hashlib
import itertools
import json
import pathlib
from collections import Counter
from collections.abc import Sequence

from dinalrm_jax.data.records import RecordsError


@dataclasses.dataclass(frozen=True)
class Preference:
    """One strict human preference: `chosen` over `rejected` for `prompt`; paths of image files."""

    prompt: str
    chosen: pathlib.Path
    rejected: pathlib.Path


def read_preferences(source: str | pathlib.Path, holdout: int) -> tuple[dict[str, list[Preference]], Counter]:
    """Training and held-out pairs, and how many were left out and why.

    With a train.json, training pairs come from it and all rankings of test.json are held out.
    Without one, the rankings are split: those of `holdout` prompts, the smallest by a hash of the
    prompt, are held out. Tied ranks give no pair and are counted.

    Raises:
        RecordsError: not an HPDv2 directory, or rows of another form, naming the row.
    """
    source = pathlib.Path(source)
    rankings = _read_rows(source / "test.json", ("prompt", "image_path", "rank"))
    left_out: Counter[str] = Counter()
    expanded = [_expand(source, index, row, left_out) for index, row in enumerate(rankings)]
    if (source / "train.json").exists():
        rows = _read_rows(source / "train.json", ("prompt", "file_path", "human_preference"))
        train = [_pair(source, index, row) for index, row in enumerate(rows)]
        return {"train": train, "eval": list(itertools.chain(*expanded))}, left_out
    order = sorted(range(len(rankings)), key=lambda i: hashlib.sha256(rankings[i]["prompt"].encode()).digest())
    if not 0 < holdout < len(order):
        raise RecordsError(f"holdout must leave prompts on both sides: {holdout} of {len(order)} prompts")
    split = {"train": sorted(order[holdout:]), "eval": sorted(order[:holdout])}
    return {name: [pair for i in rows for pair in expanded[i]] for name, rows in split.items()}, left_out


def _read_rows(path: pathlib.Path, keys: Sequence[str]) -> list[dict]:
    if not path.is_file():
        raise RecordsError(f"{path.parent} is not an HPDv2 directory: it has no {path.name}")
    try:
        rows = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise RecordsError(f"{path} is not JSON: {error}") from None
    if not isinstance(rows, list) or not rows:
        raise RecordsError(f"{path} must be a non-empty JSON array of rows")
    for index, row in enumerate(rows):
        if not isinstance(row, dict) or any(key not in row for key in keys):
            found = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise RecordsError(f"{path}, row {index}: expected the keys {', '.join(keys)}, found {found}")
    return rows


def _expand(source: pathlib.Path, index: int, row: dict, left_out: Counter) -> list[Preference]:
    paths, ranks = [source / "test" / name for name in row["image_path"]], row["rank"]
    if len(paths) != len(ranks):
        raise RecordsError(f"{source}/test.json, row {index}: {len(paths)} images but {len(ranks)} ranks")
    pairs = []
    for (path_a, rank_a), (path_b, rank_b) in itertools.combinations(zip(paths, ranks), 2):
        if rank_a == rank_b:
            left_out["tied rank"] += 1
        else:
            chosen, rejected = (path_a, path_b) if rank_a < rank_b else (path_b, path_a)
            pairs.append(Preference(row["prompt"], chosen, rejected))
    return pairs


def _pair(source: pathlib.Path, index: int, row: dict) -> Preference:
    paths, preference = row["file_path"], row["human_preference"]
    if len(paths) != 2 or sorted(preference) != [0, 1]:
        raise RecordsError(
            f"{source}/train.json, row {index}: expected two files and a preference [1, 0] or [0, 1], "
            f"got {paths} and {preference}"
        )
    chosen = preference.index(1)
    return Preference(row["prompt"], *(source / "train" / paths[i] for i in (chosen, 1 - chosen)))
