"""ImageReward's test set (THUDM/ImageReward): rankings with ties, held out.

SOURCE/test.json       [{"id", "prompt", "generations": [n names], "ranking": [n, lower is better]}]
SOURCE/test_images/    the generations, unpacked
"""

import pathlib
from collections import Counter

from dinalrm_jax.data.preferences import Benchmark, Source, files_below, ranked_pairs, read_rankings


def read(source: pathlib.Path) -> Source:
    """All strict pairs, as split "eval"; tied ones are counted.

    Raises:
        RecordsError: not such a directory, or rows of another form, naming the row.
    """
    counts: Counter[str] = Counter()
    test = benchmark(source)
    pairs = [pair for ranking in test.rankings for pair in ranked_pairs(ranking, counts)]
    return Source({"eval": pairs}, counts, test.open)


def benchmark(source: pathlib.Path) -> Benchmark:
    """The published rankings; errors as for `read`."""
    rankings = read_rankings(source / "test.json", "generations", "ranking", "", "ImageReward")
    return Benchmark("ImageReward", rankings, files_below(source / "test_images"))
