"""Scores a benchmark's images: every distinct (prompt, image) once, at all levels and noise draws.

Rankings are split over processes, each of which scores its own on its own devices; then every process has
all scores. What a row scores depends on nothing but the row and the draw, up to the rounding of another batch.
"""

import collections
import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from dinalrm_jax import distributed
from dinalrm_jax.benchmarks.accuracy import PairCounts, count_pairs
from dinalrm_jax.config import LossConfig
from dinalrm_jax.data.batch import PromptEmbeds
from dinalrm_jax.data.buckets import Size
from dinalrm_jax.data.preferences import Benchmark, Ranking
from dinalrm_jax.data.records import Records
from dinalrm_jax.local_devices import on_every_device
from dinalrm_jax.noise import NoiseDraw
from dinalrm_jax.reward_model import RewardModel
from dinalrm_jax.scoring import LatentScorer, Level, padded, score_images


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
    """

    name: str
    levels: tuple[Level, ...]
    draws: tuple[NoiseDraw, ...]
    rankings: Sequence[Ranking]
    scores: Sequence[np.ndarray]
    problems: Mapping[str, str]
    likelihood: LossConfig | None = None
    weights: str = ""

    def counts(self, level: int, draw: int) -> PairCounts:
        """The pair counts at one level and draw, by their places in `levels` and `draws`."""
        ranks = [ranking.ranks for ranking in self.rankings]
        return count_pairs(ranks, [scores[:, level, draw] for scores in self.scores])

    def draws_of(self, shared: bool) -> list[int]:
        """The places of the draws that all images share, or of the others."""
        return [place for place, draw in enumerate(self.draws) if draw.shared == shared]


def evaluate_images(
    model: RewardModel,
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
    with distributed.progress(total=len(rows), desc=f"scoring {benchmark.name}", unit="image") as bar:
        found = score_images(
            _on_every_device(model),
            [prompt for prompt, _ in rows],
            [functools.partial(benchmark.open, image) for _, image in rows],
            levels,
            draws,
            names=[image for _, image in rows],
            size=size,
            batch_size=batch_size,
            progress=bar.update,
        )
    problems = {rows[index][1]: problem for index, problem in found.problems.items()}
    return _gathered(model, benchmark.name, benchmark.rankings, levels, draws, rows, found.scores, problems)


def evaluate_records(
    model: RewardModel,
    records: Records,
    split: str,
    levels: Sequence[Level],
    draws: Sequence[NoiseDraw],
    *,
    batch_size: int = 8,
) -> Evaluation:
    """Scores the pairs of a split of records, as rankings of two; prompts and images are named by their indices.

    An image's noise goes by its name in the records, as in a training run's own evaluation.
    """
    rows_of_pairs = records.pairs(split)
    pairs = [rows_of_pairs[index] for index in range(len(rows_of_pairs))]
    rankings = [Ranking(str(pair.prompt), (str(pair.chosen), str(pair.rejected)), (1, 2)) for pair in pairs]
    mine = _my_share(rankings)
    rows = list(dict.fromkeys((ranking.prompt, image) for ranking in mine for image in ranking.images))
    shapes = {}
    for bucket, places in records.buckets(split).items():
        shapes |= {str(image): bucket for place in places for image in (pairs[place].chosen, pairs[place].rejected)}
    by_shape = collections.defaultdict(list)
    for index, (_, image) in enumerate(rows):
        by_shape[shapes[image]].append(index)
    scorer = LatentScorer(_on_every_device(model), levels, draws)
    scores = np.empty((len(rows), len(levels), len(draws)), np.float32)
    with distributed.progress(total=len(rows), desc=f"scoring {records.directory}", unit="image") as bar:
        for indices in by_shape.values():
            for start in range(0, len(indices), batch_size):
                some = indices[start : start + batch_size]
                batch = [rows[index] for index in padded(some, min(batch_size, len(indices)))]
                prompts = [records.prompts[int(prompt)] for prompt, _ in batch]
                prompt = PromptEmbeds(
                    np.stack([row.prompt_embeds for row in prompts]),
                    np.stack([row.pooled_prompt_embeds for row in prompts]),
                )
                images = [records.images[int(image)] for _, image in batch]
                latents = np.stack([image.latents for image in images])
                scores[some] = scorer(latents, prompt, [image.name for image in images])[: len(some)]
                bar.update(len(some))
    return _gathered(model, f"{records.directory} {split}", rankings, levels, draws, rows, scores, {})


def _my_share(rankings: Sequence[Ranking]) -> Sequence[Ranking]:
    edges = np.linspace(0, len(rankings), jax.process_count() + 1).round().astype(int)
    number = jax.process_index()
    return rankings[edges[number] : edges[number + 1]]


def _on_every_device(model: RewardModel) -> RewardModel:
    if jax.local_device_count() == 1:
        return model
    return dataclasses.replace(model, params=on_every_device(model.params))


def _gathered(model, name, rankings, levels, draws, rows, scores, problems) -> Evaluation:
    """The evaluation of all processes, from each one's rows."""
    mine = json.dumps([rows, problems]).encode()
    by_row, all_problems = {}, {}
    for text, data in zip(distributed.gather_bytes(mine), distributed.gather_bytes(scores.tobytes())):
        their_rows, their_problems = json.loads(text)
        all_problems |= their_problems
        values = np.frombuffer(data, np.float32).reshape(len(their_rows), len(levels), len(draws))
        by_row |= {tuple(row): value for row, value in zip(their_rows, values)}
    by_ranking = [np.stack([by_row[ranking.prompt, image] for image in ranking.images]) for ranking in rankings]
    return Evaluation(
        name, tuple(levels), tuple(draws), rankings, by_ranking, all_problems, model.likelihood, model.digest
    )
