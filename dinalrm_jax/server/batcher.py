"""From rows that arrive one by one to batches on the device: a bounded queue and one thread.

A row's future is all that ties it to its request: a cancelled one, of a client that left or whose
deadline passed, is dropped before it reaches the device.
"""

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor

import numpy as np

from dinalrm_jax.compilation import return_freed_memory
from dinalrm_jax.server.engine import Engine, Row
from dinalrm_jax.server.protocol import RequestError, RowShape

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


@dataclasses.dataclass(frozen=True)
class _Waiting:
    row: Row
    arrived: float
    future: Future


class Batcher:
    """Puts rows of one shape together, up to `engine.max_batch`.

    A batch goes to the device when it is full, or, where the device is free, `max_wait` seconds after
    its first row came - or up to ten times that while other requests are on their way in: a burst of large
    bodies takes longer to read than that, and a row that went alone would keep the others waiting.

    Args:
        engine: the programs.
        shapes: compiled before the first row is taken.
        max_wait: seconds.
        max_queue: rows that may wait.
        allow_new_shapes: compile other shapes when they come, beside the work; else they are refused.
        observe: called with every finished batch's size and the seconds it took.
    """

    def __init__(
        self,
        engine: Engine,
        shapes: Sequence[RowShape],
        *,
        max_wait: float = 0.01,
        max_queue: int = 512,
        allow_new_shapes: bool = False,
        observe: Callable[[int, float], None] = lambda size, seconds: None,
    ):
        self.engine = engine
        self.state = LOADING
        self._shapes, self._max_wait, self._max_queue = shapes, max_wait, max_queue
        self._allow_new_shapes, self._observe = allow_new_shapes, observe
        self._changed = threading.Condition()
        self._queue: list[_Waiting] = []
        self._announced: dict[object, float] = {}  # requests being read: since when
        self._flying: dict[int, float] = {}  # a batch's number: when it went to the device
        self._flown, self._last_end = 0, 0.0
        self._compiling: set[RowShape] = set()
        self._finishers = ThreadPoolExecutor(1, "finish")
        self._compilers = ThreadPoolExecutor(1, "compile")
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)

    # ------------------------------------------------------------------ called by the server

    def start(self) -> None:
        """Begins to compile, then to score."""
        self._thread.start()

    def submit(self, rows: Sequence[Row]) -> list[Future]:
        """Queues rows of one shape; each future becomes a `Scored` or an exception.

        Raises:
            RequestError: not ready, the queue is full, or a shape that is not compiled.
        """
        shape = rows[0].shape
        with self._changed:
            self.check_ready()
            if shape not in self.engine.shapes:
                if not self._allow_new_shapes:
                    raise RequestError(
                        400,
                        "unknown_shape",
                        f"latents and tokens of shape {shape} are not compiled here; this server takes "
                        f"{', '.join(map(str, self.engine.shapes))} (more with --warmup, any with --allow-new-shapes)",
                    )
                if shape not in self._compiling:
                    self._compiling.add(shape)
                    self._compilers.submit(self._compile_new, shape)
            if len(self._queue) + len(rows) > self._max_queue:
                raise RequestError(
                    429,
                    "queue_full",
                    f"{len(self._queue)} rows are waiting, {self._max_queue} at most; try again later",
                )
            waiting = [_Waiting(row, time.monotonic(), Future()) for row in rows]
            self._queue += waiting
            self._changed.notify_all()
        return [item.future for item in waiting]

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
    def announced(self) -> Iterator[None]:
        """While a request is read and its rows are submitted: it has a place, and a batch may wait for it.

        Raises:
            RequestError: not ready, or no place is left.
        """
        me = object()
        with self._changed:
            self.check_ready()
            taken = len(self._queue) + len(self._announced)
            if taken >= self._max_queue:
                raise RequestError(429, "queue_full", f"{taken} rows wait or are being read; try again later")
            self._announced[me] = time.monotonic()
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

    def drain(self) -> None:
        """Takes no more rows; those that wait are finished, then the thread ends."""
        with self._changed:
            if self.state != DEAD:
                self.state = DRAINING
            self._changed.notify_all()

    def join(self, seconds: float) -> bool:
        """Waits for the end of a drained batcher; what is left then is answered with 503. Whether it ended."""
        self._thread.join(seconds)
        with self._changed:
            for item in self._queue:
                if item.future.set_running_or_notify_cancel():
                    item.future.set_exception(RequestError(503, DRAINING, "the server shut down before this row"))
            self._queue.clear()
        return not self._thread.is_alive()

    # ------------------------------------------------------------------------- device thread

    def _run(self) -> None:
        try:
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
        except Exception as error:
            log.exception("the model cannot be loaded, compiled or run")
            self._die(error)
            return
        with self._changed:
            if self.state == LOADING:
                self.state = READY
        while batch := self._next():
            self._dispatch(batch)
        self._finishers.shutdown()

    def _compile(self, shape: RowShape) -> None:
        started = time.monotonic()
        self.engine.compile(shape)
        buckets = ", ".join(map(str, self.engine.buckets))
        log.info("compiled %s for %s rows in %.1f s", shape, buckets, time.monotonic() - started)

    def _compile_new(self, shape: RowShape) -> None:
        """Beside the work; rows of this shape wait, and are answered with an error where it fails."""
        failure = None
        try:
            self._compile(shape)
        except Exception as error:
            failure = error
            log.exception("shape %s cannot be compiled", shape)
        with self._changed:
            self._compiling.remove(shape)
            if failure is not None:
                self._fail([item for item in self._queue if item.row.shape == shape], failure)
            self._changed.notify_all()

    def _try_device(self) -> None:
        """Raises unless a row of the first shape gets a finite score."""
        score = self.engine.start([self.engine.probe(self._shapes[0])])()
        if not np.isfinite(score).all():
            raise RuntimeError(f"the model scores its probe {score}; weights or compute dtype are broken")

    def _next(self) -> list[_Waiting] | None:
        """Waits for a batch that may go, and takes it; None when a drained queue is empty."""
        with self._changed:
            while True:
                self._queue = [item for item in self._queue if not item.future.done()]
                if not self._queue and self.state != READY:
                    return None
                batch, wait = self._choose()
                if batch:
                    taken = set(map(id, batch))
                    self._queue = [item for item in self._queue if id(item) not in taken]
                    if wanted := [item for item in batch if item.future.set_running_or_notify_cancel()]:
                        return wanted
                else:
                    self._changed.wait(wait)

    def _choose(self) -> tuple[list[_Waiting], float | None]:
        """The batch that goes now: of the oldest row if it waited enough, else a full one; or how long to wait."""
        by_shape: dict[RowShape, list[_Waiting]] = {}
        for item in self._queue:
            if item.row.shape not in self._compiling:
                by_shape.setdefault(item.row.shape, []).append(item)
        if not by_shape or len(self._flying) == IN_FLIGHT:
            return [], None
        batches = [items[: self.engine.max_batch] for items in by_shape.values()]
        wait = batches[0][0].arrived + self._patience() - time.monotonic()
        if not self._flying and (wait <= 0 or self.state != READY):
            return batches[0], None
        full = next((batch for batch in batches if len(batch) == self.engine.max_batch), [])
        return full, None if self._flying else max(wait, 0.0)  # behind a batch, only a full one lines up

    def _patience(self) -> float:
        """Seconds for which a batch's first row waits for others."""
        longest = 10 * self._max_wait
        coming = any(time.monotonic() - since < longest for since in self._announced.values())
        return longest if coming else self._max_wait

    def _dispatch(self, batch: list[_Waiting]) -> None:
        with self._changed:
            self._flown += 1
            number, started = self._flown, time.monotonic()
            self._flying[number] = started
        try:
            finish = self.engine.start([item.row for item in batch])
        except Exception as error:

            def finish(error=error):
                raise error

        self._finishers.submit(self._finish, number, started, batch, finish)

    def _finish(self, number: int, started: float, batch: list[_Waiting], finish: Callable[[], np.ndarray]) -> None:
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
                message = f"the model gave {score} for finite inputs; no reward can be made of it"
                item.future.set_exception(RequestError(500, "non_finite_score", message))

    def _die(self, error: Exception) -> None:
        with self._changed:
            self.state = DEAD
            self._fail(self._queue, error)
            self._changed.notify_all()

    @staticmethod
    def _fail(batch: Sequence[_Waiting], error: Exception) -> None:
        for item in batch:
            with contextlib.suppress(InvalidStateError):  # cancelled meanwhile
                item.future.set_exception(RequestError(500, "device_failure", f"the device failed: {error}"))


def _begin(function: Callable[[], None]) -> Future:
    """Runs `function` in a thread that no exit waits for."""
    result = Future()

    def run() -> None:
        try:
            result.set_result(function())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="load", daemon=True).start()
    return result
