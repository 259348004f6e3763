"""Human preferences as every source gives them, and what their readers share."""

import dataclasses
import hashlib
import itertools
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import BinaryIO

from dinalrm_jax.data.latents import Latents
from dinalrm_jax.data.records import RecordsError


@dataclasses.dataclass(frozen=True, slots=True)
class Preference:
    """One human preference: image `chosen` over image `rejected` for `prompt`.

    Images are named within their source. Votes (for, against) and confidence are None where unknown. `label` is the
    probability that `chosen` is preferred: 1/2 of a tie. `kind` groups pairs in reports: as a whole, and by what stands
    before its slash.
    """

    prompt: str
    chosen: str
    rejected: str
    votes: tuple[int, int] | None = None
    confidence: float | None = None
    label: float = 1.0
    kind: str = "human"


@dataclasses.dataclass(frozen=True, slots=True)
class Ranking:
    """Images of one prompt as people ranked them: lower is better, equal ranks are a tie.

    A pair with a winner is a ranking with ranks 1 and 2. `shares[i][j]` is the share of people who prefer image i to j,
    where more is known than the ranks.
    """

    prompt: str
    images: tuple[str, ...]
    ranks: tuple[float, ...]
    shares: tuple[tuple[float, ...], ...] | None = None


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A test set to evaluate on.

    Attributes:
        name: with its split, where it has several.
        rankings: ties included.
        open: as `Source.open`.
        opinions: whether ranks are people's mean opinions, negated, which compare across prompts.
        maker: which generator made an image, by its name, where that is known.
        weak: generators that pairs are also counted without.
    """

    name: str
    rankings: Sequence[Ranking]
    open: Callable[[str], BinaryIO]
    opinions: bool = False
    maker: Callable[[str], str] | None = None
    weak: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Source:
    """A dataset, read but for its images; it has either files of them or their latents.

    Attributes:
        preferences: by split, "train" and "eval".
        counts: what was left out or is odd, by reason.
        open: an image's encoded bytes, as a file, by its name; raises ImageProblem where there is none.
        latents: of the images, where the dataset holds these instead.
        images: the directory within the source that images are named in.
    """

    preferences: Mapping[str, Sequence[Preference]]
    counts: Counter
    open: Callable[[str], BinaryIO] | None = None
    latents: Latents | None = None
    images: str = "."


def ranked_pairs(ranking: Ranking, counts: Counter, ties: bool = False) -> list[Preference]:
    """All strict pairs of a ranking; ties are counted or, where asked for, pairs too."""
    pairs = []
    for (first, rank_first), (second, rank_second) in itertools.combinations(zip(ranking.images, ranking.ranks), 2):
        if rank_first == rank_second and ties:
            pairs.append(Preference(ranking.prompt, first, second, label=0.5))
        elif rank_first == rank_second:
            counts["tied rank"] += 1
        elif rank_first < rank_second:
            pairs.append(Preference(ranking.prompt, first, second))
        else:
            pairs.append(Preference(ranking.prompt, second, first))
    return pairs


def hold_out(preferences: Sequence[Preference], prompts: int, dataset: str) -> dict[str, list[Preference]]:
    """Splits off the pairs of some prompts, the smallest by a hash of the prompt.

    Raises:
        RecordsError: no prompts would be left on one of the sides.
    """
    ordered = sorted({row.prompt for row in preferences}, key=stable_hash)
    if not 0 < prompts < len(ordered):
        raise RecordsError(
            f"{dataset} has no split of its own, and holdout (--holdout) must leave prompts on both "
            f"sides: {prompts} of {len(ordered)} prompts"
        )
    if prompts > len(ordered) / 2:
        warnings.warn(
            f"{dataset}: {prompts} of {len(ordered)} prompts are held out, which leaves {len(ordered) - prompts} to "
            "train on; --holdout takes a smaller number",
            stacklevel=2,
        )
    held = set(ordered[:prompts])
    split: dict[str, list[Preference]] = {"train": [], "eval": []}
    for row in preferences:
        split["eval" if row.prompt in held else "train"].append(row)
    return split


def stable_hash(*parts: object) -> bytes:
    """Bytes to order things by, the same on every machine."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).digest()


def select(
    rows: Iterable[Preference], min_vote_share: float, min_confidence: float, counts: Counter
) -> list[Preference]:
    """The rows that people agreed on, in their order; the others are counted by reason.

    A row whose votes or confidence are unknown passes that check.

    Args:
        rows: training preferences.
        min_vote_share: votes for the chosen image over all votes must exceed this. As in the released
            filter (0.6), a row without any vote for the chosen image passes; 0 keeps all.
        min_confidence: the least annotator confidence (HPSv3's training uses 0.95).
        counts: of what is left out, by reason.
    """
    kept = []
    for row in rows:
        if row.votes is not None and 0 < row.votes[0] <= min_vote_share * sum(row.votes):
            counts["vote share too small"] += 1
        elif row.confidence is not None and row.confidence < min_confidence:
            counts["confidence too small"] += 1
        else:
            kept.append(row)
    return kept


def pick(groups: Sequence[Hashable], at_most: int, seed: int) -> list[int]:
    """Indices of at most so many members of each group, picked by a seeded hash, in order; 0: all."""
    by_group = defaultdict(list)
    for index, group in enumerate(groups):
        by_group[group].append(index)
    return sorted(
        index
        for members in by_group.values()
        for index in (sorted(members, key=lambda i: stable_hash(seed, i))[:at_most] if at_most else members)
    )
