"""Pairs of one's own, one JSON object a line.

SOURCE/pairs.jsonl    {"prompt", "chosen": file, "rejected": file, "split": "train" or "eval" (optional),
                       "label": the probability that `chosen` is preferred, 0.5 of a tie (optional; 1)}

Files are named relative to SOURCE.
"""

import pathlib
import reprlib
from collections import Counter
from typing import Any

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
    preferences = [_preference(source, index, row) for index, row in enumerate(rows)]
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


def _preference(source: pathlib.Path, index: int, row: dict[str, Any]) -> Preference:
    label = row.get("label", 1.0)
    if not isinstance(label, (int, float)) or not 0.5 <= label <= 1:
        raise RecordsError(
            f"{source}/pairs.jsonl, row {index}: label is {reprlib.repr(label)}, expected a number from 0.5, a tie, to "
            "1; where the rejected image is preferred, exchange the two"
        )
    return Preference(row["prompt"], row["chosen"], row["rejected"], label=float(label))
