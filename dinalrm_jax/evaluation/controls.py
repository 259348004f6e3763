"""Controls: what orders images without reading a prompt, and how far a model is ahead of it.

A headline says little beside them. All score images as a model does, so all are counted as it is:

- the file's size: what is rich in detail is large (or what is small wins, where that orders more of other pairs);
- the generator: the share of other pairs that its pictures won;
- a linear probe: of the means and deviations of the latents' channels, fitted to other pairs;
- the model itself under other prompts: another pair's, and none.

"Other pairs" are the training split's of records, and in a benchmark those of other prompts (`FOLDS` parts).
"""

import collections
import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from dinalrm_jax.data.mixture import AnyRecords
from dinalrm_jax.data.preferences import Ranking, stable_hash
from dinalrm_jax.data.records import PairRecord, PromptRecord, to_half
from dinalrm_jax.data.sources.datasets import maker_of
from dinalrm_jax.encoders.load import load_prompt_encoder
from dinalrm_jax.evaluation.accuracy import PairCounts, accuracies, resampled
from dinalrm_jax.evaluation.markdown import table
from dinalrm_jax.evaluation.scoring import pooled
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.encoding import EncodersConfig

FILE_SIZE, MAKER, PROBE = "file size", "its generator's share of won pairs", "linear probe of pooled latents"
EXCHANGED, BLANK = "this model, prompts exchanged", "this model, no prompt"
FOLDS = 5
MOST_PAIRS = 10_000  # that a control is fitted to
RIDGE = 1e-3

T = TypeVar("T", bound=Hashable)


def linear_probe(chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    """(F,) weights of a score that is linear in the features, by ridge-penalised logistic regression on pairs.

    Args:
        chosen, rejected: (P, F) features of the preferred and of the other images.
    """
    from scipy import optimize  # here, as it takes a second

    scale = np.concatenate([chosen, rejected]).std(axis=0) + 1e-6
    difference = (chosen - rejected) / scale

    def loss(weights):
        margin = difference @ weights
        slope = -1 / (1 + np.exp(np.clip(margin, -50, 50)))
        value = np.logaddexp(0, -margin).mean() + RIDGE * weights @ weights
        return value, slope @ difference / len(margin) + 2 * RIDGE * weights

    return optimize.minimize(loss, np.zeros(len(scale)), jac=True, method="L-BFGS-B").x / scale


def _spread(count: int) -> list[int]:
    """Of so many pairs those that controls are fitted to."""
    return np.linspace(0, count - 1, min(count, MOST_PAIRS)).round().astype(int).tolist()


class KnownImage(NamedTuple):
    """What controls know of an image."""

    file_bytes: int
    maker: str | None
    pooled: np.ndarray


def record_controls(records: AnyRecords, pairs: Sequence[PairRecord]) -> dict[str, np.ndarray]:
    """Scores (P, 2) of pairs' chosen and rejected images, by control: those that the records allow.

    Fitted to the records' training pairs of other prompts, `MOST_PAIRS` at most, spread evenly.
    """
    rows, judged = records.pairs("train") if records.buckets("train") else (), {pair.prompt for pair in pairs}
    training = [row for row in (rows[place] for place in _spread(len(rows))) if row.label != 0.5]
    training = [row for row in training if row.prompt not in judged]
    maker = maker_of(records)
    images = {}
    for index in sorted({index for pair in (*pairs, *training) for index in (pair.chosen, pair.rejected)}):
        image = records.images[index]
        images[index] = KnownImage(image.file_bytes, maker and maker(image.name), pooled(image.latents))
    held_out = [(images[pair.chosen], images[pair.rejected]) for pair in pairs]
    fitted = [(images[pair.chosen], images[pair.rejected]) for pair in training]
    return {
        name: np.array([[score(image) for image in pair] for pair in held_out])
        for name, score in _controls(fitted, [image for pair in held_out for image in pair]).items()
    }


def ranking_controls(
    rankings: Sequence[Ranking], images: Mapping[tuple[str, str], KnownImage]
) -> dict[str, list[np.ndarray]]:
    """Scores of each ranking's images, by control, NaN of images that are not there; fitted to other prompts' pairs.

    Args:
        rankings: of people.
        images: what is known of a (prompt, image).
    """
    found: dict[str, list[np.ndarray]] = {}
    fold_of = {ranking.prompt: stable_hash(ranking.prompt)[0] % FOLDS for ranking in rankings}
    for fold in range(FOLDS):
        fitted = [
            (images[ranking.prompt, first], images[ranking.prompt, second])
            for ranking in rankings
            if fold_of[ranking.prompt] != fold
            for (first, one), (second, other) in itertools.permutations(zip(ranking.images, ranking.ranks), 2)
            if one < other and {(ranking.prompt, first), (ranking.prompt, second)} <= images.keys()
        ]
        controls = _controls([fitted[place] for place in _spread(len(fitted))], list(images.values()))
        for place, ranking in enumerate(rankings):
            if fold_of[ranking.prompt] == fold:
                known = [images.get((ranking.prompt, image)) for image in ranking.images]
                for name, score in controls.items():
                    if name not in found:
                        found[name] = [np.full(len(each.images), np.nan) for each in rankings]
                    found[name][place] = np.array([np.nan if image is None else score(image) for image in known])
    return found


def _controls(
    fitted: Sequence[tuple[KnownImage, KnownImage]], scored: Sequence[KnownImage]
) -> dict[str, Callable[[KnownImage], float]]:
    """Scores by control, fitted to pairs of the preferred and the other image; those that the images allow."""
    controls: dict[str, Callable[[KnownImage], float]] = {}
    if all(image.file_bytes for image in scored):
        larger = sum(np.sign(chosen.file_bytes - rejected.file_bytes) for chosen, rejected in fitted)
        controls[FILE_SIZE] = lambda image: image.file_bytes if larger >= 0 else -image.file_bytes
    if fitted and all(image.maker is not None for image in scored):
        won, lost = (collections.Counter(image.maker for image in side) for side in zip(*fitted))
        controls[MAKER] = lambda image: (won[image.maker] + 1) / (won[image.maker] + lost[image.maker] + 2)
    if fitted:
        weights = linear_probe(*(np.stack([image.pooled for image in side]) for side in zip(*fitted)))
        controls[PROBE] = lambda image: float(image.pooled @ weights)
    return controls


def no_prompt(encoders: EncodersConfig, base_model: str | pathlib.Path | None) -> PromptRecord | None:
    """The empty prompt as records hold prompts, by the text encoders.

    None where these are not at hand, or are SD3's: beside a model there may be no room for 10 GB of encoders.
    """
    if encoders.kind == "sd3":
        return None
    try:
        encoded = load_prompt_encoder(encoders, base_model, "float32")([""])
    except (ConfigError, FileNotFoundError):
        return None
    arrays = (np.asarray(array)[0] for array in (encoded.prompt_embeds, encoded.pooled_prompt_embeds))
    return PromptRecord("", *(to_half("the empty prompt", array) for array in arrays))


def exchanged(prompts: Sequence[T]) -> dict[T, T]:
    """For each distinct prompt another one; itself where there is no other.

    From half a list away, where the kinds of pairs and their prompts are likely to be others.
    """
    distinct = list(dict.fromkeys(prompts))
    return {prompt: distinct[(place + len(distinct) // 2) % len(distinct)] for place, prompt in enumerate(distinct)}


@dataclasses.dataclass(frozen=True)
class Standing:
    """A control's strict accuracy, and by how much a model is ahead of it, with the 95 % interval over prompts; %."""

    accuracy: float
    ahead: float
    interval: tuple[float, float]

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.accuracy:.1f}; {self.ahead:+.1f} ({low:+.1f} to {high:+.1f})"


def standing(model: Sequence[PairCounts], control: PairCounts, prompts: Sequence[str]) -> Standing:
    """A control beside a model on the same rankings; a model's accuracy is the mean over its noise draws."""
    ours, theirs = np.mean([accuracies(one)["strict"] for one in model]), accuracies(control)["strict"]
    ahead = resampled(model, prompts)["strict"] - resampled([control], prompts)["strict"]
    low, high = np.nanpercentile(ahead, [2.5, 97.5])
    accuracy, difference, low, high = (round(100 * float(share), 4) for share in (theirs, ours - theirs, low, high))
    return Standing(accuracy, difference, (low, high))


def control_table(
    standings: Mapping[str, Mapping[str, Standing]],
    counts: Mapping[str, int],
    people: Mapping[str, float] | None = None,
) -> str:
    """A Markdown table, a control a line.

    Args:
        standings: by control and group of pairs.
        counts: the pairs of each group.
        people: the share who agree with the order of a pair, per cent, by group.
    """
    rows = [[name, *(str(by_group.get(group, "")) for group in counts)] for name, by_group in standings.items()]
    if people is not None:
        rows.append(["share of people who agree with the order", *(f"{people[group]:.1f}" for group in counts)])
    return table(["control", *(f"{group} ({count})" for group, count in counts.items())], rows)
