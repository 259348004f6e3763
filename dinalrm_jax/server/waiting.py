"""Rows that wait for the device, and whose turn it is."""

import dataclasses
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future

from dinalrm_jax.server.engine import Row
from dinalrm_jax.server.protocol import RowShape


@dataclasses.dataclass(frozen=True)
class Waiting:
    """A row, when it came (monotonic seconds), and the future that is to have its score."""

    row: Row
    arrived: float
    future: Future


class WaitingRows:
    """In the order they came. Batches are of one shape, and shapes take turns.

    While the device is busy only full batches go - but in place of one goes, full or not, that of a row that has
    waited for `max_wait`, if its shape had its last batch the longest ago. So a row of a rare shape waits for
    `max_wait` and the batches that are on their way, however many rows of a common shape there are.

    Args:
        max_batch: rows of a batch.
        max_wait: seconds.
    """

    def __init__(self, max_batch: int, max_wait: float):
        self._max_batch, self._max_wait = max_batch, max_wait
        self._rows: dict[Future, Waiting] = {}
        self._taken = 0
        self._last_batch: dict[RowShape, int] = {}  # a shape's: its number

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(list(self._rows.values()))

    def add(self, rows: Sequence[Row]) -> list[Future]:
        """Appends rows; their futures."""
        futures, now = [Future() for _ in rows], time.monotonic()
        self._rows |= {future: Waiting(row, now, future) for row, future in zip(rows, futures)}
        return futures

    def discard(self, future: Future) -> None:
        """Of one that waits no longer, if it is here."""
        self._rows.pop(future, None)

    def take(
        self, busy: bool, patience: float, hurry: bool, without: Collection[RowShape]
    ) -> tuple[list[Waiting], float | None]:
        """Removes the batch that goes now; or none, and how long to wait for one.

        Args:
            busy: whether a batch is on the device.
            patience: seconds for which a batch waits to be full where none is.
            hurry: whether all that is here goes at once.
            without: shapes that cannot be scored yet.

        Returns:
            The batch and None; or [] and seconds, None where only a change can help.
        """
        by_shape: dict[RowShape, list[Waiting]] = {}
        for item in self._rows.values():
            if item.row.shape not in without:
                by_shape.setdefault(item.row.shape, []).append(item)
        if not by_shape:
            return [], None
        batches = {shape: items[: self._max_batch] for shape, items in by_shape.items()}
        full = [shape for shape, batch in batches.items() if len(batch) == self._max_batch]
        now = time.monotonic()

        def waited(seconds: float) -> list[RowShape]:
            return [shape for shape, batch in batches.items() if hurry or now - batch[0].arrived >= seconds]

        candidates = full and (waited(self._max_wait) or full)  # one that has waited goes in place of a full one
        if not full and not busy:
            candidates = waited(patience)
        if not candidates:
            oldest = next(iter(batches.values()))[0]
            return [], None if busy else max(oldest.arrived + patience - now, 0.0)
        # Of those that had none yet, the shape of the oldest row.
        shape = min(candidates, key=lambda shape: self._last_batch.get(shape, 0))
        self._taken += 1
        self._last_batch[shape] = self._taken
        for item in batches[shape]:
            del self._rows[item.future]
        return batches[shape], None
