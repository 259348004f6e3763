"""From rows that arrive one by one to batches on the device: a bounded queue and one thread.

A row's future is all that ties it to its request: a cancelled one, of a client that left or whose
deadline passed, leaves the queue at once.
"""

import contextlib
import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from typing import Any

import numpy as np

from dinalrm_jax.devices.host_memory import return_freed_memory
from dinalrm_jax.server.engine import Engine, Row
from dinalrm_jax.server.protocol import RequestError, RowShape
from dinalrm_jax.server.shapes import NewShapes
from dinalrm_jax.server.waiting import Waiting, WaitingRows

log = logging.getLogger(__name__)
LOADING, READY, DRAINING, DEAD = "loading", "ready", "draining", "dead"
IN_FLIGHT = 2  # one batch on the device, the next one stacked and dispatched behind it


@dataclasses.dataclass(frozen=True)
class Scored:
    """What became of a row: its score, seconds it waited and was computed in, rows of its batch."""

    score: float
    queued: float
    computed: float
    batch_size: int


class Batcher:
    """Puts rows of one shape together, up to `engine.max_batch`.

    A batch goes to the device when it is full, or, where the device is free, `max_wait` seconds after
    its first row came - or up to ten times that while other requests are on their way in: a burst of
    bodies takes longer to read than that, and a row that went alone would keep the others waiting.
    While the device is busy only full batches line up, in turns where several shapes wait (`WaitingRows`): a row of
    a rare shape waits for `max_wait` and the two batches that are on their way at most.

    Args:
        engine: the programs.
        shapes: compiled before the first row is taken.
        max_wait: seconds.
        max_queue: rows that may wait.
        max_new_shapes: other shapes that are compiled when they come, beside the work; the rest is refused.
        observe: called with every finished batch's size and the seconds it took; where it fails, so does the
            server.
    """

    def __init__(
        self,
        engine: Engine,
        shapes: Sequence[RowShape],
        *,
        max_wait: float = 0.01,
        max_queue: int = 512,
        max_new_shapes: int = 0,
        observe: Callable[[int, float], None] = lambda size, seconds: None,
    ):
        self.engine = engine
        self.state = LOADING
        self._shapes, self._max_wait, self._max_queue = shapes, max_wait, max_queue
        self._observe = observe
        self._changed = threading.Condition()
        self._queue = WaitingRows(engine.max_batch, max_wait)
        self._announced: dict[object, float] = {}  # requests being read: since when
        self._flying: dict[int, float] = {}  # a batch's number: when it went to the device
        self._flown, self._last_end = 0, 0.0
        self._new = NewShapes(max_new_shapes, self._compile, self._changed)
        self._never_ready = False
        self._finishers = ThreadPoolExecutor(1, "finish")
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)

    # ------------------------------------------------------------------ called by the server

    def start(self) -> None:
        """Begins to compile, then to score."""
        self._thread.start()

    def submit(self, rows: Sequence[Row]) -> list[Future]:
        """Queues rows of one shape; each future becomes a `Scored` or an exception.

        Raises:
            RequestError: not ready, the queue is full, or a shape that is not compiled here.
        """
        shape = rows[0].shape
        with self._changed:
            self.check_ready()
            if len(self._queue) + len(rows) > self._max_queue:
                raise RequestError(
                    429,
                    "queue_full",
                    f"{len(self._queue)} rows are waiting, {self._max_queue} at most; try again later",
                )
            if shape not in self.engine.shapes:
                self._new.request(shape, self.engine.shapes)
            futures = self._queue.add(rows)
            self._changed.notify_all()
        for future in futures:
            future.add_done_callback(self._forget)
        return futures

    def check_ready(self) -> None:
        """Raises RequestError 503 unless rows are scored."""
        if self.state != READY:
            message = {
                LOADING: "the server is reading its weights and compiling; /healthz says when it is ready",
                DRAINING: "the server is shutting down",
                DEAD: "the device failed; the server ends itself and is to be started again",
            }[self.state]
            raise RequestError(503, self.state, message)

    @contextlib.contextmanager
    def announced(self, soon: bool = True) -> Iterator[None]:
        """While a request is read and its rows are submitted: it has a place, and a batch may wait for it.

        Args:
            soon: whether its rows may be here before a batch has waited for long; else none waits for it.

        Raises:
            RequestError: not ready, or no place is left.
        """
        me = object()
        with self._changed:
            self.check_ready()
            taken = len(self._queue) + len(self._announced)
            if taken >= self._max_queue:
                raise RequestError(429, "queue_full", f"{taken} rows wait or are being read; try again later")
            self._announced[me] = time.monotonic() if soon else -math.inf
        try:
            yield
        finally:
            with self._changed:
                del self._announced[me]
                self._changed.notify_all()

    @property
    def waiting(self) -> int:
        """Rows in the queue."""
        return len(self._queue)

    @property
    def busy(self) -> float:
        """Seconds for which the oldest batch has been on the device; 0 where none is."""
        with self._changed:
            return time.monotonic() - min(self._flying.values()) if self._flying else 0.0

    @property
    def reading(self) -> int:
        """Requests that are being read."""
        return len(self._announced)

    @property
    def compiling(self) -> bool:
        """Of a drained batcher: whether a thread still compiles, or reads weights; nothing can interrupt it."""
        return self._never_ready or bool(self._new.pending)

    def drain(self) -> None:
        """Takes no more rows; those that wait are finished, then the thread ends. No compilation is waited for."""
        with self._changed:
            self._never_ready |= self.state == LOADING
            if self.state != DEAD:
                self.state = DRAINING
            self._fail([item for item in self._queue if item.row.shape in self._new.pending], _shut_down())
            self._changed.notify_all()

    def join(self, seconds: float) -> bool:
        """Waits for the end of a drained batcher; what is left then is answered with 503. Whether all was answered."""
        if self._never_ready:
            return True
        self._thread.join(seconds)
        with self._changed:
            self._fail(self._queue, _shut_down())
        return not self._thread.is_alive()

    # ------------------------------------------------------------------------- device thread

    def _run(self) -> None:
        try:
            self._load()
        except BaseException as error:
            log.exception("the model cannot be loaded, compiled or run")
            self._die(error)
            return
        with self._changed:
            if self.state == LOADING:
                self.state = READY
        try:
            while batch := self._next():
                self._dispatch(batch)
        except BaseException as error:
            log.exception("the thread that feeds the device failed")
            self._die(error)
        self._finishers.shutdown()

    def _load(self) -> None:
        """Compiles while weights are read, then tries the device; stops early at a drain."""
        loading = _begin(self.engine.load)
        for shape in self._shapes:
            if self.state == LOADING:
                self._compile(shape)
            if loading.done():
                loading.result()  # no use in compiling for weights that cannot be read
        while self.state == LOADING and not loading.done():
            time.sleep(0.02)
        if self.state == LOADING:
            loading.result()
        return_freed_memory()
        if self.state == LOADING:
            self._try_device()

    def _compile(self, shape: RowShape) -> None:
        started = time.monotonic()
        try:
            self.engine.compile(shape)
        except Exception:
            log.exception("shape %s cannot be compiled", shape)
            raise
        buckets = ", ".join(map(str, self.engine.buckets))
        log.info("compiled %s for %s rows in %.1f s", shape, buckets, time.monotonic() - started)

    def _try_device(self) -> None:
        """Raises unless a row of the first shape gets a finite score."""
        score = self.engine.start([self.engine.probe(self._shapes[0])])()
        if not np.isfinite(score).all():
            raise RuntimeError(f"the model scores its probe {score}; weights or compute dtype are broken")

    def _next(self) -> list[Waiting] | None:
        """Waits for a batch that may go, and takes it; None when a drained queue is empty."""
        with self._changed:
            while True:
                for item in [item for item in self._queue if item.row.shape in self._new.failed]:
                    self._fail([item], RequestError(400, "unknown_shape", self._new.reason(item.row.shape)))
                if not self._queue and self.state != READY:
                    return None
                batch, wait = [], None
                if len(self._flying) < IN_FLIGHT:
                    busy, hurry = bool(self._flying), self.state != READY
                    batch, wait = self._queue.take(busy, self._patience(), hurry, self._new.pending)
                if not batch:
                    self._changed.wait(wait)
                elif wanted := [item for item in batch if item.future.set_running_or_notify_cancel()]:
                    return wanted

    def _patience(self) -> float:
        """Seconds for which a batch's first row waits for others."""
        longest = 10 * self._max_wait
        coming = any(time.monotonic() - since < longest for since in self._announced.values())
        return longest if coming else self._max_wait

    def _dispatch(self, batch: list[Waiting]) -> None:
        with self._changed:
            self._flown += 1
            number, started = self._flown, time.monotonic()
            self._flying[number] = started
        try:
            finish = self.engine.start([item.row for item in batch])
        except Exception as error:

            def finish(error=error):
                raise error

        try:
            self._finishers.submit(self._finish, number, started, batch, finish)
        except BaseException as error:
            self._fail(batch, error)  # nobody else would
            raise

    def _finish(self, number: int, started: float, batch: list[Waiting], finish: Callable[[], np.ndarray]) -> None:
        try:
            self._settle(number, started, batch, finish)
        except BaseException as error:  # of our own code: nobody else would hear of it
            log.exception("a batch cannot be answered")
            self._die(error)
            self._fail(batch, error)

    def _settle(self, number: int, started: float, batch: list[Waiting], finish: Callable[[], np.ndarray]) -> None:
        try:
            scores, failure = finish(), None
        except Exception as error:
            failure = error
            log.exception("a batch of %d rows of %s failed", len(batch), batch[0].row.shape)
        ended = time.monotonic()
        if failure is not None:
            self._fail(batch, failure)
            try:
                self._try_device()  # whether it was the batch or the device
            except Exception as error:
                log.exception("the device does not recover")
                self._die(error)
        with self._changed:
            started = max(started, self._last_end)  # dispatched behind another batch, it began at that one's end
            self._last_end = ended
            del self._flying[number]
            self._changed.notify_all()
        if failure is not None:
            return
        self._observe(len(batch), ended - started)
        for item, score in zip(batch, scores):
            if np.isfinite(score):
                item.future.set_result(Scored(float(score), started - item.arrived, ended - started, len(batch)))
            else:
                item.future.set_exception(self._not_finite(item.row, float(score)))

    def _not_finite(self, row: Row, score: float) -> RequestError:
        """Whose fault a score is that is no number: the row's where it comes again, else the device's."""
        try:
            again = float(self.engine.start([row])()[0])
        except Exception as error:
            return RequestError(500, "device_failure", f"the device gave {score}, then failed: {error}")
        if np.isfinite(again):
            message = f"the device gave {score} for finite inputs, and {again:g} when asked again; try again"
            return RequestError(500, "device_failure", message)
        message = f"the model gives {again} for these finite inputs, every time; no reward can be made of it"
        return RequestError(422, "non_finite_score", message)

    def _die(self, error: BaseException) -> None:
        with self._changed:
            self.state = DEAD
            self._fail(self._queue, error)
            self._changed.notify_all()

    def _forget(self, future: Future) -> None:
        """Of a future that is done: its place is free."""
        with self._changed:
            self._queue.discard(future)

    @staticmethod
    def _fail(batch: Iterable[Waiting], error: BaseException) -> None:
        if not isinstance(error, RequestError):
            error = RequestError(500, "device_failure", f"the device failed: {error}")
        for item in list(batch):
            with contextlib.suppress(InvalidStateError):  # cancelled meanwhile
                item.future.set_exception(error)


def _shut_down() -> RequestError:
    return RequestError(503, DRAINING, "the server shut down before this row")


def _begin(function: Callable[[], Any]) -> Future:
    """Runs `function` in a thread that no exit waits for."""
    result = Future()

    def run() -> None:
        try:
            result.set_result(function())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="load", daemon=True).start()
    return result
