"""The scorer of records: a split's pairs at several noise levels and of their ensembles, on all devices."""

import collections
import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dinalrm_jax.data.images import map_ahead
from dinalrm_jax.data.loader import distinct_rows
from dinalrm_jax.data.mixture import AnyRecords
from dinalrm_jax.data.records import PairRecord, PromptRecord, RecordsError
from dinalrm_jax.devices import processes
from dinalrm_jax.devices.compilation import compile_if_it_fits, fits_beside
from dinalrm_jax.devices.mesh import row_devices
from dinalrm_jax.devices.sharding import WHOLE, local_rows, put_rows
from dinalrm_jax.evaluation.controls import exchanged
from dinalrm_jax.evaluation.scoring import Level, check_finite, level_name
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.batch import PromptEmbeds
from dinalrm_jax.model.parameters import Functional, Params
from dinalrm_jax.model.reward import RewardModule, check_levels
from dinalrm_jax.noise import NoiseDraw, draw_noise


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

    def of_pairs(self, level: Level) -> np.ndarray:
        """(P, 2) scores of the chosen and the rejected images at one level."""
        row = self.levels.index(level)
        return np.stack([self.chosen[row], self.rejected[row]], axis=1)

    def correct(self, level: Level) -> np.ndarray:
        """(P,) whether the chosen image scores higher."""
        chosen, rejected = self.of_pairs(level).T
        return chosen > rejected

    def accuracy(self, level: Level, mask: np.ndarray | None = None) -> float:
        """Share of pairs whose chosen image scores higher; equal scores count as wrong (rule M1)."""
        correct = self.correct(level)
        return float(np.mean(correct if mask is None else correct[mask]))


def score_step(module: Functional[RewardModule], mesh: Mesh) -> jax.stages.Wrapped:
    """The jitted score of rows at a level or an ensemble of them, whole on every device."""
    return jax.jit(
        lambda params, latents, prompt, levels, keys: module.bind(params).score(
            latents, prompt, levels, draw_noise(keys, latents.shape)
        ),
        out_shardings=NamedSharding(mesh, WHOLE),
    )


class PairScorer:
    """Scores a split's distinct (image, prompt) rows once each, in batches of one size a bucket.

    The last batch of a bucket is padded, so there is one program per size of latents and number of levels. Every
    process gets all scores and reads its own rows only.

    Args:
        module: the reward model.
        records: what is scored.
        split: of them.
        mesh: over whose devices rows are split.
        batch_size: images a batch, at most; see `compile`.
        max_pairs: at most so many pairs, spread evenly; 0: all.

    Raises:
        RecordsError: a split without pairs.
    """

    def __init__(
        self,
        module: Functional[RewardModule],
        records: AnyRecords,
        split: str,
        mesh: Mesh,
        *,
        batch_size: int,
        max_pairs: int = 0,
    ):
        pairs, by_bucket = records.pairs(split), records.buckets(split)
        total = sum(map(len, by_bucket.values()))
        if not total:
            raise RecordsError(f"{records.directory} has no pairs in split {split!r} to evaluate on")
        count = min(total, max_pairs or total)
        chosen = np.linspace(0, total - 1, count).round().astype(int)
        ends = np.cumsum([len(rows) for rows in by_bucket.values()])
        self._pair_buckets = np.searchsorted(ends, chosen, side="right")
        self._batch_size, self._records, self._mesh = batch_size, records, mesh
        self._prompt: PromptRecord | None = None  # of all pairs, in the place of their own
        self._take([pairs[int(index)] for index in chosen])
        self._score = score_step(module, mesh)
        self._shapes = {
            bucket: records.images[int(self._rows[np.flatnonzero(self._bucket == bucket)[0], 0])].latents.shape
            for bucket in np.unique(self._bucket)
        }
        self._programs: dict[tuple, tuple[int, jax.stages.Compiled]] = {}

    def _take(self, pairs: list[PairRecord]) -> None:
        """Sets the pairs, as many as there are buckets of theirs, and their distinct rows."""
        self.pairs = pairs
        self._rows, self._chosen, self._rejected = distinct_rows(pairs)
        self._bucket = np.empty(len(self._rows), int)
        self._bucket[self._chosen] = self._bucket[self._rejected] = self._pair_buckets

    def with_prompts_exchanged(self) -> "PairScorer | None":
        """The same pairs, those of a prompt under another one, by the same programs; None where all have one prompt.

        What is right there is right without reading: how far the accuracy falls says what the prompts are worth.
        """
        others = exchanged([pair.prompt for pair in self.pairs])
        if len(others) == 1:
            return None
        other = copy.copy(self)
        other._take([dataclasses.replace(pair, prompt=others[pair.prompt]) for pair in self.pairs])
        return other

    def with_prompt(self, prompt: PromptRecord) -> "PairScorer":
        """The same pairs, all under one prompt, by the same programs; of the records' own length."""
        other = copy.copy(self)
        other._prompt = prompt
        return other

    def compile(
        self, params: Params, levels: Sequence[Level], fits: Callable[[jax.stages.Compiled], bool] = fits_beside
    ) -> None:
        """Compiles what `run` needs for these levels.

        Batches have `batch_size` rows or, where that does not fit the devices, half as many, and so on.

        Args:
            params: of the whole reward model, on the mesh.
            levels: as for `run`.
            fits: whether there is memory for a program.

        Raises:
            ConfigError: not even one row a device fits.
            ValueError: a level outside [0, 1], or none.
        """
        if not levels:
            raise ValueError("at least one noise level is needed to score at")
        for level in levels:
            check_levels(level)
        for bucket in np.unique(self._bucket):
            for level in levels:
                key = self._key(bucket, level)
                if key not in self._programs:
                    self._programs[key] = self._largest(params, bucket, level, fits)

    def run(
        self,
        params: Params,
        levels: Sequence[Level],
        draw: NoiseDraw,
        progress: Callable[[int], None] = lambda count: None,
    ) -> PairScores:
        """Scores all pairs at all levels, which were compiled for.

        Args:
            params: of the whole reward model, on the mesh.
            levels: single levels and tuples (ensembles).
            draw: of the noise; by the images' names in the records.
            progress: called with the number of rows after every batch.

        Raises:
            NonFiniteScores: a score that is not finite.
        """
        scores = np.empty((len(levels), len(self._rows)), np.float32)
        with ThreadPoolExecutor(1) as pool:
            for bucket in np.unique(self._bucket):
                same = np.flatnonzero(self._bucket == bucket)
                by_size = collections.defaultdict(list)
                for place, level in enumerate(levels):
                    size, program = self._programs[self._key(bucket, level)]
                    by_size[size].append((place, program))
                for size, programs in by_size.items():
                    batches = [same[start : start + size] for start in range(0, len(same), size)]
                    # Each batch is read once for all of its levels, while the one before it is scored.
                    read = functools.partial(self._read, size=size, draw=draw)
                    for rows, inputs in zip(batches, map_ahead(pool, read, batches, ahead=1)):
                        latents, prompt, keys = put_rows(inputs, size, self._mesh)
                        for place, program in programs:
                            with jax.set_mesh(self._mesh):
                                scored = program(params, latents, prompt, np.asarray(levels[place], np.float32), keys)
                            scores[place, rows] = np.asarray(scored)[: len(rows)]
                            check_finite(scores[place, rows])
                            progress(len(rows))
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
        size, devices = self._batch_size, row_devices(self._mesh)
        first = np.flatnonzero(self._bucket == bucket)[0]
        while True:
            latents, prompt, keys = put_rows(self._read(np.array([first]), size, NoiseDraw(0)), size, self._mesh)
            with jax.set_mesh(self._mesh):
                lowered = self._score.lower(params, latents, prompt, np.asarray(level, np.float32), keys)
            compiled = compile_if_it_fits(lowered, fits)
            if processes.all_agree(compiled is not None):
                return size, compiled
            what = f"evaluation at {level_name(level)} of {size} latents {latents.shape[1:]}"
            if size == devices:
                raise ConfigError(
                    f"{what} does not fit the devices' memory beside what they hold, and is one row a device "
                    "already; evaluate smaller images, or, in training, split the parameters (mesh.fsdp)"
                )
            size = devices * (size // devices // 2)
            processes.say(f"{what} does not fit beside what the devices hold; trying {size}")

    def _read(self, rows: np.ndarray, size: int, draw: NoiseDraw):
        """Latents, prompts and noise keys of this process's part of a batch, repeated to fill it; on the host."""
        rows = np.resize(rows, size)[local_rows(size, self._mesh)]
        images = [self._records.images[int(image)] for image, _ in self._rows[rows]]
        prompts = [self._prompt or self._records.prompts[int(prompt)] for _, prompt in self._rows[rows]]
        prompt = PromptEmbeds(
            np.stack([row.prompt_embeds for row in prompts]), np.stack([row.pooled_prompt_embeds for row in prompts])
        )
        keys = np.ascontiguousarray(draw.keys([image.name for image in images]))
        return np.stack([image.latents for image in images]), prompt, keys


@dataclasses.dataclass(frozen=True)
class HeldOutPairs:
    """What a reward stage is judged by while it trains.

    Attributes:
        scorer: of the held-out pairs.
        frozen: parameters, on the mesh.
        levels: the first stands for the run.
        draw: of the noise.
    """

    scorer: PairScorer
    frozen: Params
    levels: tuple[Level, ...]
    draw: NoiseDraw

    headline = "eval_accuracy"

    def compile(self, trained: Params) -> None:
        """Before the first step; see `PairScorer.compile`."""
        self.scorer.compile({**self.frozen, **trained}, self.levels)

    def __call__(self, trained: Params, step: int) -> dict[str, float]:
        """Named accuracies: `eval_accuracy` at `eval_sigma`, and each further level's."""
        scores = self.scorer.run({**self.frozen, **trained}, self.levels, self.draw)
        values: dict[str, Any] = {self.headline: scores.accuracy(self.levels[0]), "eval_sigma": self.levels[0]}
        return values | {f"eval_accuracy/{level_name(level)}": scores.accuracy(level) for level in self.levels[1:]}

    def enough(self, rows: Sequence[Mapping[str, float]]) -> str | None:
        """A reward's stage lasts to its last step."""
        return None
