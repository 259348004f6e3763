"""Held-out evaluation of a reward model on pairs: accuracy per noise level and of the ensemble."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dinalrm_jax.config import EvaluationConfig
from dinalrm_jax.data.batch import PromptEmbeds
from dinalrm_jax.data.loader import distinct_rows
from dinalrm_jax.data.records import Records, RecordsError
from dinalrm_jax.noise import draw_noise
from dinalrm_jax.parameters import Functional, Params
from dinalrm_jax.reward_model import RewardModule
from dinalrm_jax.scoring import Level
from dinalrm_jax.training.sharding import WHOLE, local_rows, put_rows


@dataclasses.dataclass(frozen=True)
class PairScores:
    """Scores of every held-out pair.

    Attributes:
        levels: single noise levels, and tuples for ensembles.
        chosen, rejected: (len(levels), P) raw scores.
        kinds: (P,) what each pair is about.
        records: the P pairs' indices into the records, (P, 3): chosen, rejected, prompt.
    """

    levels: tuple[Level, ...]
    chosen: np.ndarray
    rejected: np.ndarray
    kinds: np.ndarray
    records: np.ndarray

    def accuracy(self, level: Level, mask: np.ndarray | None = None) -> float:
        """Share of pairs whose chosen image scores higher; equal scores count as wrong (rule M1)."""
        row = self.levels.index(level)
        correct = self.chosen[row] > self.rejected[row]
        return float(np.mean(correct if mask is None else correct[mask]))


class Evaluator:
    """Scores a split's distinct (image, prompt) rows once each, in batches of one size.

    The last batch of a bucket is padded, so there is one compilation per kind of level and bucket.
    The noise of a level is drawn from `config.seed` and is the same for every image of a bucket.
    Every process gets all scores and reads its own rows only.
    """

    def __init__(
        self,
        module: Functional[RewardModule],
        records: Records,
        split: str,
        config: EvaluationConfig,
        mesh: Mesh,
    ):
        pairs, by_bucket = records.pairs(split), records.buckets(split)
        total = sum(map(len, by_bucket.values()))
        if not total:
            raise RecordsError(f"{records.directory} has no pairs in split {split!r} to evaluate on")
        count = min(total, config.max_pairs or total)
        chosen = np.linspace(0, total - 1, count).round().astype(int)
        self.pairs = [pairs[int(index)] for index in chosen]
        ends = np.cumsum([len(rows) for rows in by_bucket.values()])
        pair_buckets = np.searchsorted(ends, chosen, side="right")
        self.config, self._records, self._mesh = config, records, mesh
        self._rows, self._chosen, self._rejected = distinct_rows(self.pairs)
        self._bucket = np.empty(len(self._rows), int)
        self._bucket[self._chosen] = self._bucket[self._rejected] = pair_buckets
        self._local = local_rows(config.batch_size, mesh)
        self._score = jax.jit(
            lambda params, *inputs: module.bind(params).score(*inputs), out_shardings=NamedSharding(mesh, WHOLE)
        )

    def run(self, params: Params, levels: Sequence[Level], progress: Callable[[int], None] | None = None) -> PairScores:
        """Scores all pairs at all levels.

        Args:
            params: of the whole reward model, on the mesh.
            levels: single levels and tuples (ensembles).
            progress: called with the number of rows after every batch.
        """
        scores = np.stack([self._score_rows(params, level, progress) for level in levels])
        return PairScores(
            tuple(levels),
            scores[:, self._chosen],
            scores[:, self._rejected],
            np.array([pair.kind for pair in self.pairs]),
            np.array([(pair.chosen, pair.rejected, pair.prompt) for pair in self.pairs]),
        )

    def row_count(self) -> int:
        """How many (image, prompt) rows one level scores."""
        return len(self._rows)

    def _score_rows(self, params: Params, level: Level, progress) -> np.ndarray:
        scores = np.empty(len(self._rows), np.float32)
        size = self.config.batch_size
        for bucket in np.unique(self._bucket):
            same = np.flatnonzero(self._bucket == bucket)
            for start in range(0, len(same), size):
                rows = same[start : start + size]
                with jax.set_mesh(self._mesh):
                    scored = self._score(params, *self._batch(np.resize(rows, size), level))
                scores[rows] = np.asarray(scored)[: len(rows)]
                if progress is not None:
                    progress(len(rows))
        return scores

    def _batch(self, rows: np.ndarray, level: Level) -> tuple[jax.Array, PromptEmbeds, np.ndarray, jax.Array]:
        local = self._rows[rows[self._local]]
        latents = np.stack([self._records.images[int(image)].latents for image, _ in local])
        prompts = [self._records.prompts[int(prompt)] for _, prompt in local]
        prompt = PromptEmbeds(
            np.stack([row.prompt_embeds for row in prompts]), np.stack([row.pooled_prompt_embeds for row in prompts])
        )
        size = self.config.batch_size
        eps = np.asarray(draw_noise(jax.random.key(self.config.seed), latents.shape))
        latents, prompt, eps = put_rows((latents, prompt, eps), size, self._mesh)
        return latents, prompt, np.asarray(level, np.float32), eps
