"""From records to batches of preference pairs, in an order that depends on (seed, step) only.

Every batch holds one bucket. A bucket's pairs are one endless stream of permutations, cut into
batches: each pair comes once in every permutation, and none is dropped where a batch straddles two.
An epoch is as many whole batches of each bucket as its pairs give, the rest joining the next one's, in
shuffled order. A bucket of fewer pairs than a batch comes once in several epochs, and then repeats its
pairs within the batch: over many epochs every pair comes equally often.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dinalrm_jax.data.mixture import AnyRecords
from dinalrm_jax.data.records import PairRecord, RecordsError
from dinalrm_jax.devices import processes
from dinalrm_jax.model.batch import PreferenceBatch, PromptEmbeds
from dinalrm_jax.preference import prompt_weights


class JoinedPairs:
    """Random access to pairs with their latents and embeddings."""

    def __init__(self, records: AnyRecords, split: str):
        self.records, self.rows = records, records.pairs(split)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> PreferenceBatch:
        """One pair, without a batch axis, float16.

        Raises:
            RecordsError: the pair refers to a record that is not there, or its images differ in size.
        """
        row = self.rows[index]
        try:
            prompt = self.records.prompts[row.prompt]
            chosen, rejected = (self.records.images[image].latents for image in (row.chosen, row.rejected))
        except IndexError as error:
            raise RecordsError(
                f"{self.records.directory}: pair {index} refers to {error}, which is not there"
            ) from None
        if chosen.shape != rejected.shape:
            raise RecordsError(
                f"{self.records.directory}: pair {index} has latents of different sizes, {chosen.shape} and "
                f"{rejected.shape}; preprocess the dataset again"
            )
        embeds = PromptEmbeds(prompt.prompt_embeds, prompt.pooled_prompt_embeds)
        return PreferenceBatch(chosen, rejected, embeds, np.asarray(row.label, np.float32), np.ones((), np.float32))


class Schedule:
    """Which pairs make batch `step`: a pure function of (seed, step).

    Args:
        buckets: each bucket's rows.
        batch_size: pairs a batch.
        seed: of all permutations.
        weights: how often each bucket's pairs come in an epoch; None: once.
    """

    def __init__(
        self, buckets: Mapping[str, range], batch_size: int, seed: int, weights: Mapping[str, float] | None = None
    ):
        self.buckets = {name: rows for name, rows in buckets.items() if len(rows)}
        self.batch_size, self.seed = batch_size, seed
        weights = dict.fromkeys(self.buckets, 1.0) if weights is None else weights
        self._share = {name: len(rows) * weights[name] for name, rows in self.buckets.items()}
        self._names = tuple(self.buckets)
        self._permutation = functools.lru_cache(2 * len(self._names) + 2)(self._draw_permutation)
        self._order = functools.lru_cache(4)(self._draw_order)

    def batch(self, step: int) -> tuple[str, np.ndarray]:
        """The bucket of batch `step` (from 0), and the indices of its pairs."""
        epoch, start = self._epoch(step)
        number, position = self._order(epoch)[step - start]
        name = self._names[number]
        rows = self.buckets[name]
        stream = np.arange(self.batch_size) + position * self.batch_size
        picked = [self._permutation(number, int(place) // len(rows))[place % len(rows)] for place in stream]
        return name, rows.start + np.array(picked)

    @property
    def epoch_pairs(self) -> float:
        """Pairs an epoch."""
        return sum(self._share.values())

    def _batches_until(self, epoch: int) -> np.ndarray:
        """Batches of each bucket in all epochs before `epoch`."""
        return np.array([int(epoch * self._share[name] / self.batch_size) for name in self._names])

    def _epoch(self, step: int) -> tuple[int, int]:
        """The epoch that batch `step` is in, and the epoch's first batch."""
        epoch = int(step * self.batch_size / self.epoch_pairs)
        while int(self._batches_until(epoch + 1).sum()) <= step:
            epoch += 1
        while int(self._batches_until(epoch).sum()) > step:
            epoch -= 1
        return epoch, int(self._batches_until(epoch).sum())

    def _draw_order(self, epoch: int) -> np.ndarray:
        """(batches of the epoch, 2): the bucket's number and the batch's place in its stream, shuffled."""
        first, last = self._batches_until(epoch), self._batches_until(epoch + 1)
        order = [(number, place) for number in range(len(first)) for place in range(first[number], last[number])]
        return np.random.default_rng([self.seed, 0, epoch]).permutation(np.array(order).reshape(-1, 2))

    def _draw_permutation(self, number: int, turn: int) -> np.ndarray:
        return np.random.default_rng([self.seed, 1, number, turn]).permutation(len(self.buckets[self._names[number]]))


class TrainingBatches:
    """Endless batches of the training pairs; `next` gives this process's rows of a batch.

    Args:
        records: with a split "train".
        batch_size: pairs of a whole batch, over all processes.
        seed: of the order.
        rows: this process's rows of every batch; None: all.
        by_prompt: weigh a batch's pairs by `preference.prompt_weights`, times their number.

    Raises:
        RecordsError: fewer pairs than a batch.
    """

    def __init__(
        self,
        records: AnyRecords,
        batch_size: int,
        seed: int,
        rows: Sequence[int] | None = None,
        by_prompt: bool = False,
    ):
        import grain  # takes a second, and brings packages that one who only aligns or scores need not have

        pairs = JoinedPairs(records, "train")
        if len(pairs) < batch_size:
            raise RecordsError(f"{records.directory} has {len(pairs)} training pairs, a batch takes {batch_size}")
        self.schedule = Schedule(records.buckets("train"), batch_size, seed, records.weights("train"))
        self._rows = tuple(range(batch_size) if rows is None else rows)
        self._identity = {
            "seed": seed,
            "batch_size": batch_size,
            "pairs": {name: len(bucket) for name, bucket in self.schedule.buckets.items()},
        }
        if any(weight != 1 for weight in records.weights("train").values()):
            self._identity["weights"] = records.weights("train")
        counts = pairs_of_prompts(pairs.rows) if by_prompt else None
        source = _BatchRows(pairs, self.schedule, self._rows, counts)
        dataset = grain.MapDataset.source(source).batch(len(self._rows), drop_remainder=True)
        # Reading releases the GIL, so threads overlap; two batches ahead hide the slowest read.
        threads = min(16, 2 * len(self._rows))
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * len(self._rows))
        self._dataset = dataset.to_iter_dataset(options)
        self.set_state({**self._identity, "step": 0})

    def __iter__(self) -> "TrainingBatches":
        return self

    def __next__(self) -> PreferenceBatch:
        batch = next(self._iterator)
        self._step += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """JSON that `set_state` continues from, whatever the number of processes then is."""
        return {**self._identity, "step": self._step}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues after batch `state["step"]`.

        Raises:
            RecordsError: the state is of another order: other pairs, batch size or seed.
        """
        if {**state, "step": 0} != {**self._identity, "step": 0}:
            changed = [key for key in self._identity if state.get(key) != self._identity[key]]
            raise RecordsError(
                f"the checkpoint's order of pairs is another one, {', '.join(changed)} changed: "
                + "; ".join(f"{key} was {state.get(key)}, is {self._identity[key]}" for key in changed)
                + ". Train on the records it was made with, or start in another --workdir"
            )
        self._step = state["step"]
        self._iterator = iter(self._dataset)
        self._iterator.set_state({"next_index": self._step})


@dataclasses.dataclass(frozen=True)
class _BatchRows:
    """Endless sequence of the rows of batch 0, then of batch 1, and so on.

    `counts` is how many pairs each pair's prompt has; None: pairs count alike.
    """

    pairs: JoinedPairs
    schedule: Schedule
    rows: tuple[int, ...]
    counts: np.ndarray | None = None

    def __len__(self) -> int:
        return 2**40 // len(self.rows) * len(self.rows)

    def __getitem__(self, index: int) -> PreferenceBatch:
        step, place = divmod(index, len(self.rows))
        _, batch = self.schedule.batch(step)
        pair = self.pairs[int(batch[self.rows[place]])]
        if self.counts is None:
            return pair
        weight = len(batch) * prompt_weights(self.counts[batch])[self.rows[place]]
        return dataclasses.replace(pair, weight=np.asarray(weight, np.float32))


def pairs_of_prompts(pairs: Sequence[PairRecord]) -> np.ndarray:
    """(P,) how many of the P pairs have the prompt that each has."""
    read = processes.progress(iterable=pairs, desc="prompts of pairs", unit="pair")
    prompts = np.array([pair.prompt for pair in read])
    return np.bincount(prompts)[prompts].astype(float)


def distinct_rows(pairs: Sequence[PairRecord]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct (image, prompt) rows of some pairs, so that each is scored once.

    Returns:
        rows (N, 2): image and prompt indices; chosen, rejected (P,): each pair's rows among them.
    """
    chosen = np.array([(pair.chosen, pair.prompt) for pair in pairs])
    rejected = np.array([(pair.rejected, pair.prompt) for pair in pairs])
    rows, inverse = np.unique(np.concatenate([chosen, rejected]), axis=0, return_inverse=True)
    chosen_row, rejected_row = np.split(inverse.ravel(), 2)
    return rows, chosen_row, rejected_row
