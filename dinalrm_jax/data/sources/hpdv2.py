"""HPDv2 (ymhao/HPDv2): human rankings and pairs, from its published files.

SOURCE/test.json    [{"prompt", "image_path": [n names], "rank": [n ranks, lower is better], ...}]
SOURCE/test/*.jpg
SOURCE/train.json   [{"prompt", "file_path": [2 names], "human_preference": [1, 0] or [0, 1]}]   (optional)
SOURCE/train/*.jpg
"""

import pathlib
import reprlib
from collections import Counter

from dinalrm_jax.data.files import files_below
from dinalrm_jax.data.preferences import Benchmark, Preference, Ranking, Source, hold_out, ranked_pairs
from dinalrm_jax.data.records import RecordsError
from dinalrm_jax.data.sources.json_rows import list_of, read_rankings, read_rows


def read(source: pathlib.Path, holdout: int, ties: bool = False) -> Source:
    """Training and held-out pairs; tied ranks give no pair and are counted, unless `ties` asks for them.

    With a train.json, training pairs come from it, without ties, and all rankings of test.json are held out.
    Without one, the rankings of `holdout` prompts are held out.

    Raises:
        RecordsError: not an HPDv2 directory, or rows of another form, naming the row.
    """
    counts: Counter[str] = Counter()
    ranked = [pair for ranking in _rankings(source, counts) for pair in ranked_pairs(ranking, counts, ties)]
    if (source / "train.json").exists():
        rows = read_rows(source / "train.json", ("prompt", "file_path", "human_preference"), "HPDv2", counts)
        preferences = {"train": [_pair(source, index, row) for index, row in enumerate(rows)], "eval": ranked}
    else:
        preferences = hold_out(ranked, holdout, str(source))
    return Source(preferences, counts, files_below(source))


def benchmark(source: pathlib.Path) -> Benchmark:
    """The published rankings of test.json; errors as for `read`."""
    return Benchmark("HPDv2", _rankings(source, None), files_below(source))


def _rankings(source: pathlib.Path, counts: Counter | None) -> list[Ranking]:
    return read_rankings(source / "test.json", "image_path", "rank", "test/", "HPDv2", counts)


def _pair(source: pathlib.Path, index: int, row: dict) -> Preference:
    paths, preference = row["file_path"], row["human_preference"]
    if not list_of(paths, str) or len(paths) != 2 or preference not in ([0, 1], [1, 0]):
        raise RecordsError(
            f"{source}/train.json, row {index}: expected two files and a preference [1, 0] or [0, 1], "
            f"got {reprlib.repr(paths)} and {reprlib.repr(preference)}"
        )
    chosen = preference.index(1)
    return Preference(row["prompt"], f"train/{paths[chosen]}", f"train/{paths[1 - chosen]}")
