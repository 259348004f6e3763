"""Pairs of one's own, one JSON object a line.

SOURCE/pairs.jsonl    {"prompt", "chosen": file, "rejected": file, "split": "train" or "eval" (optional)}

Files are named relative to SOURCE.
"""

import pathlib
import reprlib
from collections import Counter

from dinalrm_jax.data.files import files_below
from dinalrm_jax.data.preferences import Preference, Source, hold_out
from dinalrm_jax.data.records import RecordsError
from dinalrm_jax.data.sources.json_rows import read_rows


def read(source: pathlib.Path, holdout: int) -> Source:
    """The pairs by split; where no row names one, those of `holdout` prompts are held out.

    Raises:
        RecordsError: no pairs.jsonl, or a row of another form, naming it.
    """
    counts: Counter[str] = Counter()
    rows = read_rows(source / "pairs.jsonl", ("prompt", "chosen", "rejected"), "pairs in JSON lines", counts)
    preferences = [Preference(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
    if not any("split" in row for row in rows):
        return Source(hold_out(preferences, holdout, str(source)), counts, files_below(source))
    split: dict[str, list[Preference]] = {"train": [], "eval": []}
    for index, (row, preference) in enumerate(zip(rows, preferences)):
        if row.get("split") not in list(split):  # it may be unhashable
            raise RecordsError(
                f"{source}/pairs.jsonl, row {index}: split is {reprlib.repr(row.get('split'))}; as other rows name "
                'one, every row must say "train" or "eval"'
            )
        split[row["split"]].append(preference)
    return Source(split, counts, files_below(source))
