"""ImageReward's test set (THUDM/ImageReward): rankings with ties, held out.

SOURCE/test.json       [{"id", "prompt", "generations": [n names], "ranking": [n, lower is better]}]
SOURCE/test_images/    the generations, unpacked
"""

import pathlib
from collections import Counter

from dinalrm_jax.data.preferences import Source, files_below, ranked_pairs, read_rows
from dinalrm_jax.data.records import RecordsError


def read(source: pathlib.Path) -> Source:
    """All strict pairs, as split "eval"; tied ones are counted.

    Raises:
        RecordsError: not such a directory, or rows of another form, naming the row.
    """
    counts: Counter[str] = Counter()
    pairs = []
    keys = ("prompt", "generations", "ranking")
    for index, row in enumerate(read_rows(source / "test.json", keys, "ImageReward")):
        if len(row["generations"]) != len(row["ranking"]):
            raise RecordsError(
                f"{source}/test.json, row {index}: {len(row['generations'])} generations but "
                f"{len(row['ranking'])} ranks"
            )
        pairs += ranked_pairs(row["prompt"], row["generations"], row["ranking"], counts)
    return Source({"eval": pairs}, counts, files_below(source / "test_images"))
