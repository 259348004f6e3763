"""Held-out evaluation of a reward model on pairs: accuracy per noise level and of the ensemble."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from dinalrm_jax.config import EvaluationConfig
from dinalrm_jax.data.batch import PromptEmbeds
from dinalrm_jax.data.loader import distinct_rows
from dinalrm_jax.data.records import Records, RecordsError
from dinalrm_jax.parameters import Functional, Params
from dinalrm_jax.reward_model import RewardModule, draw_noise

Level = float | tuple[float, ...]


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

    The last batch is padded, so there is one compilation per kind of level and latent size. The
    noise of a level is drawn from `config.seed` and is the same for every image of a size.
    """

    def __init__(self, module: Functional[RewardModule], records: Records, split: str, config: EvaluationConfig):
        self.pairs = list(records.pairs(split))
        if not self.pairs:
            raise RecordsError(f"{records.directory} has no pairs in split {split!r} to evaluate on")
        self.config = config
        self._rows, self._chosen, self._rejected = distinct_rows(self.pairs)
        self._latents = [records.images[int(image)].latents for image, _ in self._rows]
        prompts = {int(prompt): records.prompts[int(prompt)] for _, prompt in self._rows}
        self._prompts = [prompts[int(prompt)] for _, prompt in self._rows]
        self._score = jax.jit(lambda params, *inputs: module.bind(params).score(*inputs))

    def run(self, params: Params, levels: Sequence[Level], progress: Callable[[int], None] | None = None) -> PairScores:
        """Scores all pairs at all levels.

        Args:
            params: of the whole reward model.
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
        shapes = np.array([latents.shape for latents in self._latents])
        for shape in np.unique(shapes, axis=0):
            same = np.flatnonzero((shapes == shape).all(axis=1))
            for start in range(0, len(same), size):
                rows = same[start : start + size]
                padded = np.resize(rows, size)
                scored = self._score(params, *self._batch(padded, level))
                scores[rows] = np.asarray(scored)[: len(rows)]
                if progress is not None:
                    progress(len(rows))
        return scores

    def _batch(self, rows: np.ndarray, level: Level) -> tuple[np.ndarray, PromptEmbeds, np.ndarray, jax.Array]:
        latents = np.stack([self._latents[row] for row in rows])
        prompt = PromptEmbeds(
            np.stack([self._prompts[row].prompt_embeds for row in rows]),
            np.stack([self._prompts[row].pooled_prompt_embeds for row in rows]),
        )
        eps = draw_noise(jax.random.key(self.config.seed), latents.shape)
        return latents, prompt, np.asarray(level, np.float32), eps
