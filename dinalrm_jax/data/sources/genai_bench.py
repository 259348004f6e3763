"""GenAI-Bench, image generation (TIGER-Lab/GenAI-Bench): pairwise votes in parquet files with the images.

SOURCE/[image_generation/]SPLIT-*.parquet    prompt, left_image, right_image, vote_type; SPLIT is test or test_v1
"""

import functools
import io
import pathlib
from collections import Counter

from dinalrm_jax.data.files import MISSING, UNREADABLE, ImageProblem, is_of_the_file_system
from dinalrm_jax.data.preferences import Benchmark, Ranking, Source, ranked_pairs
from dinalrm_jax.data.records import RecordsError

COLUMNS = ("prompt", "left_image", "right_image", "vote_type")
RANKS = {"leftvote": (1, 2), "rightvote": (2, 1), "tievote": (1, 1), "bothbad_vote": (1, 1)}


def read(source: pathlib.Path, split: str) -> Source:
    """The decisive votes of one of the published splits, as split "eval"; ties and "both bad" are counted.

    Raises:
        RecordsError: no such files, or files of another form.
    """
    counts: Counter[str] = Counter()
    test = benchmark(source, split)
    pairs = [pair for ranking in test.rankings for pair in ranked_pairs(ranking, counts)]
    return Source({"eval": pairs}, Counter({"tie or both bad": counts["tied rank"]}), test.open)


def benchmark(source: pathlib.Path, split: str) -> Benchmark:
    """All votes of a split; a tie and "both bad" are ties. Errors as for `read`."""
    import pyarrow
    import pyarrow.parquet as parquet

    paths = sorted([*source.glob(f"{split}-*.parquet"), *source.glob(f"image_generation/{split}-*.parquet")])
    if not paths:
        raise RecordsError(f"{source} is not a directory of GenAI-Bench: it has no {split}-*.parquet")
    rankings = []
    for path in paths:
        try:
            table = parquet.read_table(path, columns=["prompt", "vote_type"])
            if missing := set(COLUMNS) - set(parquet.read_schema(path).names):
                raise RecordsError(f"{path} lacks the columns {sorted(missing)} of GenAI-Bench")
            columns = [table[name].to_pylist() for name in ("prompt", "vote_type")]
        except (pyarrow.ArrowInvalid, pyarrow.ArrowKeyError, OSError, UnicodeDecodeError) as error:
            raise RecordsError(f"{path} is not a parquet file of GenAI-Bench: {error}") from None
        for index, (prompt, vote) in enumerate(zip(*columns)):
            if not isinstance(prompt, str):
                raise RecordsError(f"{path}, row {index}: prompt must be text, got {prompt!r}")
            if vote not in RANKS:
                raise RecordsError(f"{path}, row {index}: vote_type {vote!r}, expected one of {', '.join(RANKS)}")
            images = tuple(f"{path.relative_to(source)}:{index}:{side}" for side in ("left_image", "right_image"))
            rankings.append(Ranking(prompt, images, RANKS[vote]))

    # Images are asked for in no order, and the whole split is some 400 MB: it is read once.
    @functools.cache
    def column(path: str, side: str):
        """None where it is damaged, which only reading it shows."""
        try:
            return parquet.read_table(source / path, columns=[side])[side]
        except (pyarrow.ArrowException, OSError) as error:
            if is_of_the_file_system(error):
                raise
            return None

    def open_image(name: str) -> io.BytesIO:
        path, index, side = name.rsplit(":", 2)
        pictures = column(path, side)
        if pictures is None:
            raise ImageProblem(f"{UNREADABLE}: damaged parquet file", f"the {side} column of {path} is damaged")
        picture = pictures[int(index)].as_py()
        if picture is None or picture["bytes"] is None:
            raise ImageProblem(MISSING, f"the {side} of row {index} of {path} is empty")
        return io.BytesIO(picture["bytes"])

    return Benchmark(f"GenAI-Bench {split}", rankings, open_image)
