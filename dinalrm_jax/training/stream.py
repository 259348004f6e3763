"""The batches of a stage on their way to the mesh."""

import collections
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeVar

import jax
from jax.sharding import Mesh

from dinalrm_jax.data.loader import JoinedPairs, TrainingBatches
from dinalrm_jax.data.mixture import AnyRecords
from dinalrm_jax.devices import processes
from dinalrm_jax.devices.sharding import local_rows, put_rows, row_sharded
from dinalrm_jax.model.batch import PreferenceBatch

B = TypeVar("B")
Form = tuple[int, ...]  # tells batches apart that need programs of their own


class Stream(Protocol[B]):
    """What `training.loop.fit` trains on.

    Attributes:
        units: what a batch holds, over all processes, for rates: {"pairs": 32, "images": 64}.
        forms: an abstract batch, on the mesh, of every form that comes.
    """

    units: Mapping[str, int]
    forms: Mapping[Form, B]

    def restore(self, position: Mapping[str, Any]) -> None:
        """Continues after the batch that was given out with this position."""
        ...

    def __iter__(self) -> Iterator[tuple[Form, B, dict[str, Any]]]:
        """Endless: a batch's form, the batch on the mesh, and the position after it, as JSON values."""
        ...


class PairStream:
    """Preference pairs of records, one bucket a batch: a `Stream`.

    Args:
        name: of the stage, for what is said.
        records: with a split "train".
        batch_size: pairs of a batch, over all processes.
        seed: of the order.
        mesh: over whose devices rows are split.
        by_prompt: see `TrainingBatches`.
    """

    def __init__(self, name: str, records: AnyRecords, batch_size: int, seed: int, mesh: Mesh, by_prompt: bool = False):
        self.units: Mapping[str, int] = {"pairs": batch_size, "images": 2 * batch_size}
        self._batch_size, self._mesh = batch_size, mesh
        self._batches = TrainingBatches(records, batch_size, seed, local_rows(batch_size, mesh), by_prompt)
        pairs = JoinedPairs(records, "train")
        firsts = [pairs[bucket.start] for bucket in records.buckets("train").values()]
        abstract = [
            jax.tree.map(lambda x: row_sharded((batch_size, *x.shape), x.dtype, mesh), first) for first in firsts
        ]
        self.forms: Mapping[Form, PreferenceBatch] = {_form(batch): batch for batch in abstract}
        for bucket, places in self._batches.schedule.buckets.items():
            if len(places) < batch_size:
                processes.say(
                    f"{name}: bucket {bucket} has {len(places)} pairs, fewer than a batch, which will repeat them"
                )

    def restore(self, position: Mapping[str, Any]) -> None:
        self._batches.set_state(position)

    def __iter__(self) -> Iterator[tuple[Form, PreferenceBatch, dict[str, Any]]]:
        waiting = collections.deque()  # a batch is on its way while the one before it is used
        for rows in self._batches:
            batch = put_rows(rows, self._batch_size, self._mesh)
            waiting.append((_form(batch), batch, self._batches.get_state()))
            if len(waiting) == 2:
                yield waiting.popleft()


def _form(batch: PreferenceBatch) -> Form:
    return batch.chosen.shape
