"""ImageReward's test set (THUDM/ImageReward): rankings with ties, held out.

SOURCE/test.json       [{"id", "prompt", "generations": [n names], "ranking": [n, lower is better]}]
SOURCE/test_images/    the generations, unpacked
"""

import pathlib
from collections import Counter

from dinalrm_jax.data.files import files_below
from dinalrm_jax.data.preferences import Benchmark, Ranking, Source, ranked_pairs
from dinalrm_jax.data.sources.json_rows import read_rankings


def read(source: pathlib.Path) -> Source:
    """All strict pairs, as split "eval"; tied ones are counted.

    Raises:
        RecordsError: not such a directory, or rows of another form, naming the row.
    """
    counts: Counter[str] = Counter()
    pairs = [pair for ranking in _rankings(source, counts) for pair in ranked_pairs(ranking, counts)]
    return Source({"eval": pairs}, counts, files_below(source / "test_images"))


def benchmark(source: pathlib.Path) -> Benchmark:
    """The published rankings; errors as for `read`."""
    return Benchmark("ImageReward", _rankings(source, None), files_below(source / "test_images"))


def _rankings(source: pathlib.Path, counts: Counter | None) -> list[Ranking]:
    return read_rankings(source / "test.json", "generations", "ranking", "", "ImageReward", counts)
