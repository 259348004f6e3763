"""HPDv2 (ymhao/HPDv2): human rankings and pairs, from its published files.

SOURCE/test.json    [{"prompt", "image_path": [n names], "rank": [n ranks, lower is better], ...}]
SOURCE/test/*.jpg
SOURCE/train.json   [{"prompt", "file_path": [2 names], "human_preference": [1, 0] or [0, 1]}]   (optional)
SOURCE/train/*.jpg
"""

import pathlib
from collections import Counter

from dinalrm_jax.data.preferences import Preference, Source, files_below, hold_out, ranked_pairs, read_rows
from dinalrm_jax.data.records import RecordsError


def read(source: pathlib.Path, holdout: int) -> Source:
    """Training and held-out pairs; tied ranks give no pair and are counted.

    With a train.json, training pairs come from it and all rankings of test.json are held out.
    Without one, the rankings of `holdout` prompts are held out.

    Raises:
        RecordsError: not an HPDv2 directory, or rows of another form, naming the row.
    """
    counts: Counter[str] = Counter()
    ranked = []
    for index, row in enumerate(read_rows(source / "test.json", ("prompt", "image_path", "rank"), "HPDv2")):
        if len(row["image_path"]) != len(row["rank"]):
            raise RecordsError(
                f"{source}/test.json, row {index}: {len(row['image_path'])} images but {len(row['rank'])} ranks"
            )
        ranked += ranked_pairs(row["prompt"], [f"test/{name}" for name in row["image_path"]], row["rank"], counts)
    if (source / "train.json").exists():
        rows = read_rows(source / "train.json", ("prompt", "file_path", "human_preference"), "HPDv2")
        preferences = {"train": [_pair(source, index, row) for index, row in enumerate(rows)], "eval": ranked}
    else:
        preferences = hold_out(ranked, holdout, str(source))
    return Source(preferences, counts, files_below(source))


def _pair(source: pathlib.Path, index: int, row: dict) -> Preference:
    paths, preference = row["file_path"], row["human_preference"]
    if len(paths) != 2 or sorted(preference) != [0, 1]:
        raise RecordsError(
            f"{source}/train.json, row {index}: expected two files and a preference [1, 0] or [0, 1], "
            f"got {paths} and {preference}"
        )
    chosen = preference.index(1)
    return Preference(row["prompt"], f"train/{paths[chosen]}", f"train/{paths[1 - chosen]}")
