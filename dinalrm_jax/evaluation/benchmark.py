"""Scores a benchmark: every distinct (prompt, image) once, at all levels and noise draws.

Of image files, rankings are split over processes, each of which scores its own on its own devices; then every
process has all scores. What a row scores depends on nothing but the row and the draw, up to the rounding of
another batch.
"""

import dataclasses
import functools
import io
import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding

from dinalrm_jax.data.buckets import Size
from dinalrm_jax.data.files import ImageProblem
from dinalrm_jax.data.preferences import Benchmark, Ranking
from dinalrm_jax.data.records import PairRecord, Records
from dinalrm_jax.devices import processes
from dinalrm_jax.devices.local import on_every_device
from dinalrm_jax.devices.mesh import MeshConfig, make_mesh, row_devices
from dinalrm_jax.devices.placement import place
from dinalrm_jax.evaluation.accuracy import PairCounts, StrictPairs, count_pairs, strict_pairs
from dinalrm_jax.evaluation.controls import (
    BLANK,
    EXCHANGED,
    KnownImage,
    exchanged,
    no_prompt,
    ranking_controls,
    record_controls,
)
from dinalrm_jax.evaluation.pairs import PairScorer
from dinalrm_jax.evaluation.scoring import ImageModel, ImageScores, Level, score_images
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.parameters import Params, split
from dinalrm_jax.model.quantization import holds_int8
from dinalrm_jax.model.reward import is_trainable, reward_functional
from dinalrm_jax.noise import NoiseDraw
from dinalrm_jax.preference import LossConfig


class EvaluatedModel(ImageModel, Protocol):
    """`RewardModel`, as far as it is needed here."""

    @property
    def base_model(self) -> str | pathlib.Path | None: ...

    @property
    def likelihood(self) -> LossConfig | None: ...

    @property
    def digest(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A scored benchmark.

    Attributes:
        name: of the benchmark.
        levels, draws: what was scored at, with which noise.
        rankings: all of them.
        scores: of each ranking's images (n, levels, draws), NaN where one could not be read.
        problems: why, by the image's name.
        likelihood: that the model was trained with, where it is known.
        weights: the model's digest.
        opinions: whether ranks are people's mean opinions, negated.
        controls: scores of each ranking's images by what stands beside the model, see `controls`.
        groups: which images of each ranking belong to a group that is also counted by itself, by its name.
    """

    name: str
    levels: tuple[Level, ...]
    draws: tuple[NoiseDraw, ...]
    rankings: Sequence[Ranking]
    scores: Sequence[np.ndarray]
    problems: Mapping[str, str]
    likelihood: LossConfig | None = None
    weights: str = ""
    opinions: bool = False
    controls: Mapping[str, Sequence[np.ndarray]] = dataclasses.field(default_factory=dict)
    groups: Mapping[str, Sequence[np.ndarray]] = dataclasses.field(default_factory=dict)

    def counts(self, level: int, draw: int, group: str | None = None) -> PairCounts:
        """The pair counts at one level and draw, by their places in `levels` and `draws`; of a group, where named."""
        return self._count([scores[:, level, draw] for scores in self.scores], group)

    def counts_of(self, control: str, group: str | None = None) -> PairCounts:
        """Those of a control, of the same pairs: images that the model could not read are left out."""
        read = [~np.isnan(scores[:, 0, 0]) for scores in self.scores]
        return self._count([np.where(*each, np.nan) for each in zip(read, self.controls[control])], group)

    def pairs(self, level: int, rankings: Sequence[int] | None = None) -> StrictPairs:
        """The pairs of some rankings, or all, at a level, of all draws of images' own noise; all by their places."""
        places = range(len(self.rankings)) if rankings is None else rankings
        ranks, shares = zip(*((self.rankings[place].ranks, self.rankings[place].shares) for place in places))
        draws = self.draws_of(shared=False)
        found = [
            strict_pairs(ranks, [self.scores[place][:, level, draw] for place in places], shares) for draw in draws
        ]
        return StrictPairs(*map(np.concatenate, zip(*found)))

    def _count(self, scores: Sequence[np.ndarray], group: str | None) -> PairCounts:
        if group is not None:
            scores = [np.where(mask, row, np.nan) for mask, row in zip(self.groups[group], scores)]
        return count_pairs([ranking.ranks for ranking in self.rankings], scores)

    def draws_of(self, shared: bool) -> list[int]:
        """The places of the draws that all images share, or of the others."""
        return [place for place, draw in enumerate(self.draws) if draw.shared == shared]


def evaluate_images(
    model: EvaluatedModel,
    benchmark: Benchmark,
    levels: Sequence[Level],
    draws: Sequence[NoiseDraw],
    *,
    size: Size | None = None,
    batch_size: int = 8,
) -> Evaluation:
    """Scores a benchmark from its image files; see `scoring.score_images` for the arguments."""
    mine = _my_share(benchmark.rankings)
    rows = list(dict.fromkeys((ranking.prompt, image) for ranking in mine for image in ranking.images))
    others = exchanged([ranking.prompt for ranking in benchmark.rankings])
    prompts = [prompt for prompt, _ in rows]
    with processes.progress(total=len(rows), desc=f"scoring {benchmark.name}", unit="image") as bar:
        found = score_images(
            _on_every_device(model),
            prompts,
            [functools.partial(benchmark.open, image) for _, image in rows],
            levels,
            draws,
            others=[[others[prompt] for prompt in prompts], ["" for _ in prompts]],
            names=[image for _, image in rows],
            size=size,
            batch_size=batch_size,
            progress=bar.update,
        )
    problems = {rows[index][1]: problem for index, problem in found.problems.items()}
    return _gathered(model, benchmark, levels, draws, rows, found, problems)


def evaluate_records(
    model: EvaluatedModel,
    records: Records,
    split_name: str,
    levels: Sequence[Level],
    draws: Sequence[NoiseDraw],
    *,
    batch_size: int = 8,
) -> Evaluation:
    """Scores the pairs of a split of records, as rankings of two; prompts and images are named by their indices.

    An image's noise goes by its name in the records, as in a training run's own evaluation.
    """
    mesh = make_mesh(MeshConfig())
    module, devices = reward_functional(model.config, model.execution), row_devices(mesh)
    if not len(draws):
        raise ValueError("at least one noise draw is needed to score with")
    params = dict(model.params) if mesh.size == 1 else _on_mesh(model, module.shardings(mesh))
    scorer = PairScorer(module, records, split_name, mesh, batch_size=devices * math.ceil(batch_size / devices))
    scorer.compile(params, levels)
    total = scorer.row_count() * len(levels) * len(draws)
    with processes.progress(total=total, desc=f"scoring {records.directory}", unit="image") as bar:
        found = [scorer.run(params, levels, draw, bar.update) for draw in draws]
    # (pairs, images of a pair, levels, draws)
    scores = np.stack([np.stack([one.chosen, one.rejected]) for one in found], axis=-1).transpose(2, 0, 1, 3)
    rankings = rankings_of(scorer.pairs)
    controls = {name: list(rows) for name, rows in record_controls(records, scorer.pairs).items()}
    under = {EXCHANGED: scorer.with_prompts_exchanged()}
    if (blank := no_prompt(model.config.encoders, model.base_model)) is not None:
        under[BLANK] = scorer.with_prompt(blank)
    for name, other in under.items():
        if other is not None:
            controls[name] = list(other.run(params, levels[:1], draws[0]).of_pairs(levels[0]))
    kinds = np.array([pair.kind.split("/")[0] for pair in scorer.pairs])
    groups = {kind: list(np.stack(2 * [kinds == kind], axis=1)) for kind in np.unique(kinds)}
    return Evaluation(
        f"{records.directory} {split_name}", tuple(levels), tuple(draws), rankings, list(scores), {}, model.likelihood,
        model.digest, False, controls, groups if len(groups) > 1 else {},
    )  # fmt: skip


def rankings_of(pairs: Iterable[PairRecord]) -> list[Ranking]:
    """Pairs of records as rankings of two, ties too; labels are people's shares where one is between 1/2 and 1."""
    pairs = list(pairs)
    soft = any(0.5 < pair.label < 1 for pair in pairs)
    return [
        Ranking(
            str(pair.prompt),
            (str(pair.chosen), str(pair.rejected)),
            (1, 1) if pair.label == 0.5 else (1, 2),
            ((0.5, pair.label), (1 - pair.label, 0.5)) if soft else None,
        )
        for pair in pairs
    ]


def _on_mesh(model: EvaluatedModel, shardings: Mapping[str, NamedSharding]) -> Params:
    if holds_int8(model.params):
        raise ConfigError("int8 weights lie on one device; evaluate records with another dtype, or on one device")
    trained, frozen = split(model.params, is_trainable)
    return place(frozen, model.execution.dtype, shardings) | place(trained, np.float32, shardings)


def _my_share(rankings: Sequence[Ranking]) -> Sequence[Ranking]:
    edges = np.linspace(0, len(rankings), jax.process_count() + 1).round().astype(int)
    number = jax.process_index()
    return rankings[edges[number] : edges[number + 1]]


def _on_every_device(model: EvaluatedModel) -> EvaluatedModel:
    if jax.local_device_count() == 1:
        return model
    return dataclasses.replace(model, params=on_every_device(model.params))  # type: ignore[type-var]


def _gathered(model, benchmark: Benchmark, levels, draws, rows, found: ImageScores, problems) -> Evaluation:
    """The evaluation of all processes, from each one's rows."""
    count = len(levels) * len(draws)
    sizes = np.array([_file_bytes(benchmark, image) for _, image in rows], float)[:, None]
    # (a process may have no rows)
    ours = np.concatenate([found.scores.reshape(len(rows), count), found.under_others, found.pooled, sizes], axis=1)
    by_row, all_problems = {}, {}
    texts, data = processes.gather_bytes(json.dumps([rows, problems]).encode()), processes.gather_bytes(ours.tobytes())
    for text, numbers in zip(texts, data):
        their_rows, their_problems = json.loads(text)
        all_problems |= their_problems
        by_row |= zip(map(tuple, their_rows), np.frombuffer(numbers).reshape(len(their_rows), ours.shape[1]))
    rankings, maker = benchmark.rankings, benchmark.maker
    values = [np.stack([by_row[ranking.prompt, image] for image in ranking.images]) for ranking in rankings]
    read = {row: each for row, each in by_row.items() if not np.isnan(each[0])}
    known = {row: KnownImage(each[-1], maker and maker(row[1]), each[count + 2 : -1]) for row, each in read.items()}
    controls = ranking_controls(rankings, known)
    controls[BLANK] = [row[:, count + 1] for row in values]
    if len({ranking.prompt for ranking in rankings}) > 1:
        controls[EXCHANGED] = [row[:, count] for row in values]
    groups = {}
    if maker is not None and benchmark.weak:
        name = f"without {', '.join(benchmark.weak)}"
        groups[name] = [np.array([maker(image) not in benchmark.weak for image in each.images]) for each in rankings]
    return Evaluation(
        benchmark.name, tuple(levels), tuple(draws), rankings,
        [row[:, :count].reshape(-1, len(levels), len(draws)).astype(np.float32) for row in values],
        all_problems, model.likelihood, model.digest, benchmark.opinions, controls, groups,
    )  # fmt: skip


def _file_bytes(benchmark: Benchmark, image: str) -> int:
    """0 where there is no file."""
    try:
        with benchmark.open(image) as file:
            return file.seek(0, io.SEEK_END)
    except ImageProblem:
        return 0
