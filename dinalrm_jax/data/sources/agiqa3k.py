"""AGIQA-3K: generated images with people's mean opinions of quality and of alignment with the prompt.

SOURCE/data.csv    name, prompt, .., mos_quality, std_quality, mos_align, std_align
SOURCE/images/     the images, named by generator and number

github.com/lcysyzxdxc/AGIQA-3k-Database. Pairs are two images of one prompt, in the order of their mean opinions.
"""

import csv
import itertools
import math
import pathlib
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from dinalrm_jax.data.config import OpinionConfig
from dinalrm_jax.data.files import files_below
from dinalrm_jax.data.preferences import Benchmark, Preference, Ranking, Source, hold_out, stable_hash
from dinalrm_jax.data.records import RecordsError

COLUMNS = ("name", "prompt", "mos_quality", "std_quality", "mos_align", "std_align")
RANGE = (0.0, 5.0)  # of the opinions
FAR = 1.0  # apart are opinions of pairs that are easily told
WEAK = ("AttnGAN_normal", "glide_normal", "sd1.5_lowstep")  # generators that pairs are also counted without

Opinion = tuple[float, float]  # mean, standard deviation


def read(source: pathlib.Path, holdout: int, config: OpinionConfig) -> Source:
    """Pairs within a prompt whose opinions differ, by `config.least_gap` or more; those of some prompts are held out.

    With `config.soft` a pair's label is `Phi((m1 - m2) / sqrt(s1^2 + s2^2))`, the probability that somebody's opinion
    of the first is the higher where opinions are normal (FRank's form); the held-out ones have it too.

    Raises:
        RecordsError: not that directory, or a row that is not what it should be, naming it.
    """
    counts: Counter[str] = Counter()
    pairs = []
    for prompt, images in _opinions(source, config).items():
        if len(images) == 1:
            counts["prompt of one image"] += 1
        for (one, first), (other, second) in itertools.combinations(images.items(), 2):
            gap = first[0] - second[0]
            if gap == 0 or abs(gap) < config.least_gap:
                counts["pair of opinions too near"] += 1
                continue
            label = preferred(first, second) if config.soft else float(gap > 0)
            names = (one, other) if gap > 0 else (other, one)
            kind = f"{group(one, other)}/opinions {'less' if abs(gap) < FAR else 'more'} than {FAR:g} apart"
            pairs.append(Preference(prompt, *names, label=max(label, 1 - label), kind=kind))
    return Source(hold_out(pairs, holdout, str(source)), counts, files_below(source / "images"), images="images")


def benchmark(source: pathlib.Path, config: OpinionConfig, holdout: int = 0) -> Benchmark:
    """Every prompt's images by their opinions, whose negatives are the ranks; of the prompts held out, where told.

    Errors as for `read`.
    """
    opinions = _opinions(source, config)
    prompts: Sequence[str] = sorted(opinions, key=stable_hash)[: holdout or None]
    rankings = []
    for prompt in prompts:
        images, found = zip(*opinions[prompt].items())
        shares = tuple(tuple(preferred(one, other) for other in found) for one in found)
        rankings.append(Ranking(prompt, images, tuple(-mean for mean, _ in found), shares))
    return Benchmark("AGIQA-3K", rankings, files_below(source / "images"), True, maker, WEAK)


def maker(image: str) -> str:
    """The generator's setting that made an image: its file's name up to the number."""
    return re.sub(r"_?\d+\.\w+$", "", image.rpartition("/")[2])


def group(*images: str) -> str:
    """What a pair is counted as: with an image of a weak generator, or not."""
    return "a weak generator" if any(maker(image) in WEAK for image in images) else "other generators"


def preferred(first: Opinion, second: Opinion) -> float:
    """The probability that a normal opinion of the first exceeds one of the second."""
    spread = math.hypot(first[1], second[1])
    if spread == 0:
        return float(first[0] > second[0])
    return 0.5 * (1 + math.erf((first[0] - second[0]) / spread / math.sqrt(2)))


def _opinions(source: pathlib.Path, config: OpinionConfig) -> Mapping[str, Mapping[str, Opinion]]:
    """Mean and deviation of the configured mix, by prompt and image."""
    path = source / "data.csv"
    if not path.is_file():
        raise RecordsError(f"{source} is not a directory of AGIQA-3K: it has no data.csv")
    found: dict[str, dict[str, Opinion]] = defaultdict(dict)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if missing := set(COLUMNS) - set(reader.fieldnames or ()):
                raise RecordsError(f"{path} lacks the columns {', '.join(sorted(missing))} of AGIQA-3K")
            for number, row in enumerate(reader, 2):
                quality, alignment = (_opinion(row, kind, f"{path}, line {number}") for kind in ("quality", "align"))
                weight = config.quality
                mean = weight * quality[0] + (1 - weight) * alignment[0]
                spread = math.hypot(weight * quality[1], (1 - weight) * alignment[1])  # as if independent
                found[row["prompt"]][row["name"]] = mean, spread
    except UnicodeDecodeError as error:
        raise RecordsError(f"{path} is not text in UTF-8: {error.reason}") from None
    if not found:
        raise RecordsError(f"{path} holds no rows")
    return found


def _opinion(row: Mapping[str, str], kind: str, where: str) -> Opinion:
    values = []
    for column in (f"mos_{kind}", f"std_{kind}"):
        try:
            value = float(row[column] or "")
        except (ValueError, TypeError):
            value = math.nan
        if not RANGE[0] <= value <= RANGE[1]:  # NaN is not
            raise RecordsError(
                f"{where}: {column} is {row[column]!r}, expected a number from {RANGE[0]:g} to {RANGE[1]:g}"
            )
        values.append(value)
    return values[0], values[1]
