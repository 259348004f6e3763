"""HPDv3 (MizzenAI/HPDv3): pairs from its published files.

SOURCE/train.json    [{"prompt", "path1": the preferred image, "path2", "choice_dist", "confidence", ...}]
SOURCE/test.json     the same without votes
SOURCE/images/*.jpg
"""

import pathlib
from collections import Counter
from typing import Any

from dinalrm_jax.data.files import files_below
from dinalrm_jax.data.preferences import Benchmark, Preference, Ranking, Source
from dinalrm_jax.data.sources.json_rows import parse_number, parse_votes, read_rows

KEYS = ("prompt", "path1", "path2")


def read(source: pathlib.Path) -> Source:
    """All rows of both files; path1 is the preferred image, always.

    Rows without votes or confidence (Midjourney's and HPDv2's) are kept as unknown. Where votes
    contradict or tie the published order, the row stays and is counted.

    Raises:
        RecordsError: not an HPDv3 directory, or rows of another form, naming the row.
    """
    counts: Counter[str] = Counter()
    preferences = {
        split: [_preference(row, counts) for row in read_rows(source / f"{name}.json", KEYS, "HPDv3", counts)]
        for split, name in (("train", "train"), ("eval", "test"))
    }
    return Source(preferences, counts, files_below(source))


def benchmark(source: pathlib.Path) -> Benchmark:
    """The pairs of test.json; errors as for `read`."""
    rows = read_rows(source / "test.json", KEYS, "HPDv3", None)
    rankings = [Ranking(row["prompt"], (row["path1"], row["path2"]), (1, 2)) for row in rows]
    return Benchmark("HPDv3", rankings, files_below(source))


def _preference(row: dict[str, Any], counts: Counter) -> Preference:
    votes, confidence = parse_votes(row.get("choice_dist")), parse_number(row.get("confidence"))
    if votes is None:
        counts["note: votes unknown"] += 1
    elif votes[0] < votes[1]:
        counts["note: votes against the published order"] += 1
    elif votes[0] == votes[1]:
        counts["note: votes tied"] += 1
    return Preference(row["prompt"], row["path1"], row["path2"], votes, confidence)
