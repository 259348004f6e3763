"""Held-out evaluation of a reward model on pairs: accuracy per noise level and of the ensemble."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dinalrm_jax import distributed
from dinalrm_jax.config import ConfigError, EvaluationConfig
from dinalrm_jax.data.batch import PromptEmbeds
from dinalrm_jax.data.loader import distinct_rows
from dinalrm_jax.data.records import Records, RecordsError
from dinalrm_jax.noise import NoiseDraw, draw_noise
from dinalrm_jax.parameters import Functional, Params
from dinalrm_jax.reward_model import RewardModule
from dinalrm_jax.scoring import Level, level_name
from dinalrm_jax.training.ahead import compile_if_it_fits, fits_beside
from dinalrm_jax.training.sharding import WHOLE, local_rows, put_rows, row_devices
from dinalrm_jax.training.step import TrainState


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
    """Scores a split's distinct (image, prompt) rows once each, in batches of one size a bucket.

    The last batch of a bucket is padded, so there is one program per size of latents and number of levels. Every
    image has noise of its own, from `config.seed` and its name, or all the same where `shared` is asked for.
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
        self._score = jax.jit(
            lambda params, latents, prompt, levels, keys: module.bind(params).score(
                latents, prompt, levels, draw_noise(keys, latents.shape)
            ),
            out_shardings=NamedSharding(mesh, WHOLE),
        )
        self._shapes = {
            bucket: records.images[int(self._rows[np.flatnonzero(self._bucket == bucket)[0], 0])].latents.shape
            for bucket in np.unique(self._bucket)
        }
        self._programs: dict[tuple, tuple[int, jax.stages.Compiled]] = {}

    def compile(
        self, params: Params, levels: Sequence[Level], fits: Callable[[jax.stages.Compiled], bool] = fits_beside
    ) -> None:
        """Compiles what `run` needs for these levels.

        Batches have `config.batch_size` rows or, where that does not fit the devices, half as many, and so on.

        Args:
            params: of the whole reward model, on the mesh.
            levels: as for `run`.
            fits: whether there is memory for a program.

        Raises:
            ConfigError: not even one row a device fits.
        """
        for bucket in np.unique(self._bucket):
            for level in levels:
                key = self._key(bucket, level)
                if key not in self._programs:
                    self._programs[key] = self._largest(params, bucket, level, fits)

    def run(
        self,
        params: Params,
        levels: Sequence[Level],
        progress: Callable[[int], None] = lambda count: None,
        *,
        shared: bool = False,
    ) -> PairScores:
        """Scores all pairs at all levels, which were compiled for.

        Args:
            params: of the whole reward model, on the mesh.
            levels: single levels and tuples (ensembles).
            progress: called with the number of rows after every batch.
            shared: one noise for all images.
        """
        draw = NoiseDraw(self.config.seed, shared)
        scores = np.stack([self._score_rows(params, level, draw, progress) for level in levels])
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

    def _key(self, bucket: int, level: Level) -> tuple:
        """What a program is for: the latents' size, and the number of levels."""
        return self._shapes[bucket], np.shape(level)

    def _largest(self, params: Params, bucket: int, level: Level, fits) -> tuple[int, jax.stages.Compiled]:
        """The largest batch that fits, and its program."""
        size, devices = self.config.batch_size, row_devices(self._mesh)
        first = np.flatnonzero(self._bucket == bucket)[0]
        while True:
            rows = np.full(len(local_rows(size, self._mesh)), first)
            inputs = self._inputs(rows, size, level, NoiseDraw(self.config.seed))
            with jax.set_mesh(self._mesh):
                compiled = compile_if_it_fits(self._score.lower(params, *inputs), fits)
            if distributed.all_agree(compiled is not None):
                return size, compiled
            what = f"evaluation at {level_name(level)} of {size} latents {inputs[0].shape[1:]}"
            if size == devices:
                raise ConfigError(
                    f"{what} does not fit the devices' memory beside the training state, and is one row a device "
                    "already; split the parameters (mesh.fsdp), or evaluate smaller images"
                )
            size = devices * (size // devices // 2)
            distributed.say(f"{what} does not fit beside the training state; trying {size}")

    def _score_rows(self, params: Params, level: Level, draw: NoiseDraw, progress) -> np.ndarray:
        scores = np.empty(len(self._rows), np.float32)
        for bucket in np.unique(self._bucket):
            size, program = self._programs[self._key(bucket, level)]
            same, local = np.flatnonzero(self._bucket == bucket), local_rows(size, self._mesh)
            for start in range(0, len(same), size):
                rows = same[start : start + size]
                inputs = self._inputs(np.resize(rows, size)[local], size, level, draw)
                with jax.set_mesh(self._mesh):
                    scored = program(params, *inputs)
                scores[rows] = np.asarray(scored)[: len(rows)]
                progress(len(rows))
        return scores

    def _inputs(self, rows: np.ndarray, size: int, level: Level, draw: NoiseDraw):
        """Latents, prompts, levels and noise keys of this process's rows of a batch, on the mesh."""
        images = [self._records.images[int(image)] for image, _ in self._rows[rows]]
        prompts = [self._records.prompts[int(prompt)] for _, prompt in self._rows[rows]]
        prompt = PromptEmbeds(
            np.stack([row.prompt_embeds for row in prompts]), np.stack([row.pooled_prompt_embeds for row in prompts])
        )
        keys = np.ascontiguousarray(draw.keys([image.name for image in images]))
        latents, prompt, keys = put_rows(
            (np.stack([image.latents for image in images]), prompt, keys), size, self._mesh
        )
        return latents, prompt, np.asarray(level, np.float32), keys


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """What a reward stage is judged by while it trains.

    Attributes:
        evaluator: of the held-out pairs.
        frozen: parameters, on the mesh.
        levels: the first stands for the run.
    """

    evaluator: Evaluator
    frozen: Params
    levels: tuple[Level, ...]

    def compile(self, state: TrainState) -> None:
        """Before the first step; see `Evaluator.compile`."""
        self.evaluator.compile({**self.frozen, **state.result}, self.levels)

    def __call__(self, state: TrainState) -> dict[str, float]:
        """Named accuracies of a state: `eval_accuracy` at `eval_sigma`, and each further level's."""
        scores = self.evaluator.run({**self.frozen, **state.result}, self.levels)
        values = {"eval_accuracy": scores.accuracy(self.levels[0]), "eval_sigma": self.levels[0]}
        return values | {f"eval_accuracy/{level_name(level)}": scores.accuracy(level) for level in self.levels[1:]}
