"""Batching alone, with an engine that scores a row by its seed and says what it was given."""

import threading
import time

import numpy as np
import pytest

from dinalrm_jax.server.batcher import Batcher
from dinalrm_jax.server.engine import Row
from dinalrm_jax.server.protocol import RequestError, RowShape

SMALL, LARGE = RowShape(2, 2, 3), RowShape(4, 4, 3)


class FakeEngine:
    """Scores are seeds. `gate` holds results back; `broken` says what a batch of seeds raises."""

    max_batch, buckets = 4, [1, 2, 4]

    def __init__(self):
        self.shapes, self.batches = [], []
        self.gate = threading.Event()
        self.gate.set()
        self.broken = lambda seeds: None

    def load(self):
        pass

    def compile(self, shape):
        self.shapes.append(shape)

    def probe(self, shape):
        return row(0, shape)

    def start(self, rows):
        seeds = [item.seed for item in rows]
        if seeds != [0]:
            self.batches.append(seeds)

        def finish():
            assert self.gate.wait(10)
            if (error := self.broken(seeds)) is not None:
                raise error
            return np.array(seeds, np.float32)

        return finish


def row(seed, shape=SMALL):
    return Row(np.zeros((shape.height, shape.width, 1)), np.zeros((shape.tokens, 1)), np.zeros(1), 0.4, seed)


@pytest.fixture
def engine():
    return FakeEngine()


def started(engine, **options):
    batcher = Batcher(engine, [SMALL, LARGE], **{"max_wait": 0.02, **options})
    batcher.start()
    until(lambda: batcher.state == "ready")
    return batcher


@pytest.fixture
def batcher(engine):
    batcher = started(engine)
    yield batcher
    engine.gate.set()
    batcher.drain()
    assert batcher.join(10)


def until(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("did not happen within 5 s")


def scores(futures):
    return [future.result(10).score for future in futures]


def test_rows_keep_their_scores_and_batches_their_shape(engine, batcher):
    futures = []
    for seed in range(1, 31):
        futures += batcher.submit([row(seed, LARGE if seed % 3 == 0 else SMALL)])
    assert scores(futures) == list(range(1, 31))
    assert all(len({seed % 3 == 0 for seed in seeds}) == 1 and len(seeds) <= 4 for seeds in engine.batches)
    assert len(engine.batches) < 20  # rows were put together


def test_a_row_alone_waits_for_others_no_longer_than_max_wait(engine):
    batcher = started(engine, max_wait=1.0)
    before = time.monotonic()
    first = batcher.submit([row(1)])
    time.sleep(0.05)
    second = batcher.submit([row(2)])
    assert scores(first + second) == [1, 2]
    assert 0.9 < time.monotonic() - before < 5
    before = time.monotonic()
    assert scores(batcher.submit([row(seed) for seed in range(3, 7)])) == [3, 4, 5, 6]
    assert time.monotonic() - before < 0.9  # a full batch does not wait
    assert engine.batches == [[1, 2], [3, 4, 5, 6]]
    batcher.drain()
    assert batcher.join(10)


def test_a_row_waits_for_requests_that_are_being_read(engine):
    batcher = started(engine, max_wait=0.05)
    with batcher.announced():
        first = batcher.submit([row(1)])
        time.sleep(0.2)
        assert engine.batches == []
        second = batcher.submit([row(2)])
    assert scores(first + second) == [1, 2]
    assert engine.batches == [[1, 2]]
    with batcher.announced(soon=False):  # one that cannot be here in time is not waited for
        before = time.monotonic()
        assert scores(batcher.submit([row(3)])) == [3]
        assert time.monotonic() - before < 0.3
    with batcher.announced():  # nor one that takes too long
        time.sleep(0.6)
        before = time.monotonic()
        assert scores(batcher.submit([row(3)])) == [3]
        assert time.monotonic() - before < 0.3
    batcher.drain()
    assert batcher.join(10)


def test_while_the_device_is_busy_only_full_batches_line_up(engine, batcher):
    engine.gate.clear()
    first = batcher.submit([row(1)])
    until(lambda: engine.batches == [[1]])
    late = batcher.submit([row(2)]) + batcher.submit([row(3)])
    time.sleep(0.1)
    assert engine.batches == [[1]]
    late += batcher.submit([row(4), row(5), row(6)])
    until(lambda: engine.batches == [[1], [2, 3, 4, 5]])
    engine.gate.set()
    assert scores(first + late) == [1, 2, 3, 4, 5, 6]


def test_a_full_batch_does_not_wait_for_an_older_row_of_another_shape(engine):
    batcher = started(engine, max_wait=2.0)
    alone = batcher.submit([row(1, LARGE)])
    before = time.monotonic()
    assert scores(batcher.submit([row(seed) for seed in (2, 3, 4, 5)])) == [2, 3, 4, 5]
    assert time.monotonic() - before < 1.5
    assert not alone[0].done()
    batcher.drain()  # what waits goes at once
    assert scores(alone) == [1]
    assert batcher.join(10)


class Stepwise(FakeEngine):
    """Ends a batch at every `steps.release()`, in their order."""

    def __init__(self):
        super().__init__()
        self.steps = threading.Semaphore(1)  # for the probe

    def start(self, rows):
        finish = super().start(rows)
        return lambda: self.steps.acquire(timeout=10) and finish()


def test_a_rare_shape_is_next_once_its_wait_is_over():
    """Full batches of another shape, two on their way, older and newer ones behind, do not overtake it for ever."""
    engine = Stepwise()
    batcher = started(engine, max_wait=0.05)
    futures = batcher.submit([row(seed) for seed in range(1, 17)])
    until(lambda: len(engine.batches) == 2)
    rare = batcher.submit([row(100, LARGE)])
    time.sleep(0.06)
    futures += batcher.submit([row(seed) for seed in range(17, 25)])
    engine.steps.release()
    until(lambda: len(engine.batches) == 3)
    assert engine.batches[2] == [100]
    engine.steps.release(2)
    assert scores(rare) == [100]  # after the two that were on their way
    engine.steps.release(10)
    assert scores(futures) == list(range(1, 25))
    assert engine.batches[3:] == [[seed, seed + 1, seed + 2, seed + 3] for seed in (9, 13, 17, 21)]
    batcher.drain()
    assert batcher.join(10)


def test_a_rare_shape_is_overtaken_while_it_waits_for_others():
    engine = Stepwise()
    batcher = started(engine, max_wait=5.0)
    futures = batcher.submit([row(seed) for seed in range(1, 9)])
    until(lambda: len(engine.batches) == 2)
    rare = batcher.submit([row(100, LARGE)])
    futures += batcher.submit([row(seed) for seed in range(9, 13)])
    engine.steps.release(10)
    assert scores(futures) == list(range(1, 13))
    assert not rare[0].done()
    batcher.drain()
    assert scores(rare) == [100]
    assert batcher.join(10)


def test_a_failed_batch_fails_alone(engine, batcher):
    engine.gate.clear()
    engine.broken = lambda seeds: RuntimeError("a bit flipped") if 1 in seeds else None
    bad = batcher.submit([row(1)])
    until(lambda: engine.batches == [[1]])
    good = batcher.submit([row(2), row(3), row(4), row(5)])
    engine.gate.set()
    with pytest.raises(RequestError, match="a bit flipped") as error:
        bad[0].result(10)
    assert (error.value.status, error.value.code) == (500, "device_failure")
    assert scores(good) == [2, 3, 4, 5]
    assert batcher.state == "ready"


def test_a_device_that_stays_broken_is_the_end(engine):
    batcher = started(engine)
    engine.broken = lambda seeds: RuntimeError("no device")
    with pytest.raises(RequestError, match="no device"):
        batcher.submit([row(1)])[0].result(10)
    until(lambda: batcher.state == "dead")
    with pytest.raises(RequestError, match="the device failed") as error:
        batcher.submit([row(2)])
    assert error.value.status == 503
    assert batcher.join(10)


def test_a_score_that_is_never_finite_is_its_rows_fault(engine, batcher):
    engine.start = lambda rows: lambda: np.array([np.nan if item.seed == 2 else item.seed for item in rows])
    futures = batcher.submit([row(seed) for seed in (1, 2, 3, 4)])
    assert scores([futures[0], *futures[2:]]) == [1, 3, 4]
    with pytest.raises(RequestError, match="gives nan for these finite inputs, every time") as error:
        futures[1].result(10)
    assert (error.value.status, error.value.code) == (422, "non_finite_score")
    assert batcher.state == "ready"


def test_a_score_that_is_finite_when_asked_again_is_the_devices_fault(engine, batcher):
    engine.start = lambda rows: lambda: np.array([item.seed if len(rows) == 1 else np.inf for item in rows])
    futures = batcher.submit([row(seed) for seed in (1, 2, 3, 4)])
    for seed, future in zip((1, 2, 3, 4), futures):
        with pytest.raises(RequestError, match=f"gave inf for finite inputs, and {seed} when asked again") as error:
            future.result(10)
        assert (error.value.status, error.value.code) == (500, "device_failure")


@pytest.mark.parametrize("place", ["observe", "dispatch"])
def test_an_error_in_our_own_code_is_the_end(engine, place):
    """Rows are answered and the state says it, so that the process ends instead of going on without its threads."""
    batcher = started(engine, observe=lambda *_: 1 / 0 if place == "observe" else None)
    if place == "dispatch":
        batcher._finishers.submit = lambda *_: 1 / 0
    with pytest.raises(RequestError, match="division by zero") as error:
        batcher.submit([row(1)])[0].result(10)
    assert error.value.status == 500
    until(lambda: batcher.state == "dead")
    with pytest.raises(RequestError, match="the device failed"):
        batcher.check_ready()
    assert batcher.join(10)


def test_cancelled_rows_do_not_reach_the_device(engine, batcher):
    engine.gate.clear()
    first = batcher.submit([row(1)])
    until(lambda: engine.batches == [[1]])
    futures = batcher.submit([row(2), row(3)])
    assert futures[0].cancel()
    engine.gate.set()
    assert scores([*first, futures[1]]) == [1, 3]
    assert engine.batches == [[1], [3]]


def test_cancelled_rows_free_their_place_at_once(engine):
    batcher = started(engine, max_queue=3)
    engine.gate.clear()
    first = batcher.submit([row(1)])
    until(lambda: engine.batches == [[1]])
    waiting = batcher.submit([row(2), row(3), row(4)])
    assert [future.cancel() for future in waiting] == [True, True, True]
    assert batcher.waiting == 0
    waiting = batcher.submit([row(5), row(6), row(7)])
    engine.gate.set()
    assert scores(first + waiting) == [1, 5, 6, 7]
    batcher.drain()
    assert batcher.join(10)


def test_a_full_queue_refuses_and_recovers(engine):
    batcher = started(engine, max_queue=3)
    engine.gate.clear()
    first = batcher.submit([row(1)])
    until(lambda: engine.batches == [[1]])
    waiting = batcher.submit([row(2), row(3)])
    with pytest.raises(RequestError, match="2 rows are waiting, 3 at most") as error:
        batcher.submit([row(4), row(5)])
    assert error.value.status == 429
    with batcher.announced(), pytest.raises(RequestError, match="3 rows wait or are being read"), batcher.announced():
        pass
    engine.gate.set()
    assert scores(first + waiting) == [1, 2, 3]
    assert scores(batcher.submit([row(6), row(7)])) == [6, 7]
    batcher.drain()
    assert batcher.join(10)


def test_drain_finishes_what_waits(engine):
    batcher = started(engine, max_wait=10.0)
    engine.gate.clear()
    futures = batcher.submit([row(seed) for seed in range(1, 7)])
    batcher.drain()
    with pytest.raises(RequestError, match="shutting down"):
        batcher.submit([row(7)])
    engine.gate.set()
    assert scores(futures) == [1, 2, 3, 4, 5, 6]
    assert batcher.join(10)


def test_rows_left_at_the_end_of_the_drain_are_answered(engine):
    batcher = started(engine)
    engine.gate.clear()
    futures = batcher.submit([row(1)])
    until(lambda: engine.batches == [[1]])
    futures += batcher.submit([row(2)])
    batcher.drain()
    assert not batcher.join(0.1)
    with pytest.raises(RequestError, match="shut down before this row"):
        futures[1].result(10)
    engine.gate.set()
    assert scores(futures[:1]) == [1]
    assert batcher.join(10)


def test_new_shapes_are_refused_or_compiled_beside_the_work(engine, batcher):
    new = RowShape(6, 6, 3)
    with pytest.raises(RequestError, match="6x6x3 are not compiled here; this server takes 2x2x3, 4x4x3"):
        batcher.submit([row(1, new)])
    open_to_all = started(FakeEngine(), max_new_shapes=4)
    compiling, may_end = threading.Event(), threading.Event()
    plain = open_to_all.engine.compile

    def slow(shape):
        compiling.set()
        assert may_end.wait(10)
        plain(shape)

    open_to_all.engine.compile = slow
    waiting = open_to_all.submit([row(1, new)]) + open_to_all.submit([row(2, new)])
    assert compiling.wait(10)
    assert scores(open_to_all.submit([row(3)])) == [3]  # known shapes go on
    may_end.set()
    assert scores(waiting) == [1, 2]
    open_to_all.drain()
    assert open_to_all.join(10)


def test_a_shape_that_failed_is_remembered(engine):
    batcher = started(engine, max_new_shapes=4)
    attempts, bad = [], RowShape(8, 8, 3)

    def too_large(shape):
        attempts.append(shape)
        raise RuntimeError("too large")

    engine.compile = too_large
    for _ in range(3):
        with pytest.raises(RequestError, match="8x8x3 cannot be compiled here: RuntimeError: too large") as error:
            batcher.submit([row(1, bad)])[0].result(10)
        assert (error.value.status, error.value.code) == (400, "unknown_shape")
    assert attempts == [bad]
    assert scores(batcher.submit([row(3)])) == [3]
    batcher.drain()
    assert batcher.join(10)


def test_new_shapes_are_few_and_few_at_a_time(engine):
    batcher = started(engine, max_new_shapes=3)
    may_end, plain = threading.Event(), engine.compile
    engine.compile = lambda shape: may_end.wait(10) and plain(shape)
    shapes = [RowShape(6, width, 3) for width in (2, 4, 6, 8)]
    waiting = [batcher.submit([row(1, shape)])[0] for shape in shapes[:2]]
    with pytest.raises(RequestError, match="2 other shapes are being compiled; try 6x6x3 again later") as error:
        batcher.submit([row(1, shapes[2])])
    assert error.value.status == 503
    waiting += batcher.submit([row(2, shapes[0])])  # one that is on its way costs nothing
    may_end.set()
    assert scores(waiting) == [1, 1, 2]
    assert scores(batcher.submit([row(3, shapes[2])])) == [3]
    with pytest.raises(RequestError, match="6x8x3 are not compiled here; .*, 3 new ones are all that is taken"):
        batcher.submit([row(1, shapes[3])])
    batcher.drain()
    assert batcher.join(10)


def test_a_drain_does_not_wait_for_a_new_shape(engine):
    batcher = started(engine, max_new_shapes=1)
    may_end = threading.Event()
    engine.compile = lambda shape: may_end.wait(10)
    waiting = batcher.submit([row(1, RowShape(6, 6, 3))])
    before = time.monotonic()
    batcher.drain()
    assert batcher.join(10)
    assert time.monotonic() - before < 1
    assert batcher.compiling
    with pytest.raises(RequestError, match="shut down before this row") as error:
        waiting[0].result(0)
    assert error.value.status == 503
    may_end.set()
    until(lambda: not batcher.compiling)


@pytest.mark.parametrize("what", ["load", "compile"])
def test_a_drain_waits_for_neither_weights_nor_programs(engine, what):
    may_end, begun = threading.Event(), threading.Event()
    setattr(engine, what, lambda *_: begun.set() or may_end.wait(30))
    batcher = Batcher(engine, [SMALL])
    batcher.start()
    assert begun.wait(10)
    before = time.monotonic()
    batcher.drain()
    assert batcher.join(20)
    assert time.monotonic() - before < 1
    assert batcher.compiling
    may_end.set()


def test_programs_are_compiled_while_weights_are_read(engine):
    """And no row is scored before both are done."""
    compiled, read = threading.Event(), threading.Event()
    engine.load = lambda: compiled.wait(10) and read.wait(10)
    engine.compile = lambda shape: compiled.set()
    batcher = Batcher(engine, [SMALL])
    batcher.start()
    assert compiled.wait(10)
    time.sleep(0.05)
    assert batcher.state == "loading"
    read.set()
    until(lambda: batcher.state == "ready")
    batcher.drain()


def test_weights_that_cannot_be_placed_end_the_server(engine, caplog):
    """Before the programs that are still to be compiled for them."""

    def load():
        raise RuntimeError("RESOURCE_EXHAUSTED: weights")

    engine.load = load
    engine.compile = lambda shape: (time.sleep(0.1), engine.shapes.append(shape))
    batcher = Batcher(engine, [SMALL, LARGE])
    batcher.start()
    until(lambda: batcher.state == "dead")
    assert "RESOURCE_EXHAUSTED: weights" in caplog.text
    assert engine.shapes == [SMALL]


def test_a_batch_behind_another_is_not_charged_for_it(batcher, engine):
    """Two full batches are on their way, held back for a while: the first one's time is the first one's."""
    engine.gate.clear()
    futures = batcher.submit([row(seed) for seed in range(1, 9)])
    until(lambda: len(engine.batches) == 2)
    time.sleep(0.3)
    engine.gate.set()
    first, second = futures[0].result(5), futures[-1].result(5)
    assert first.computed >= 0.3
    assert second.computed < 0.2
    assert second.queued >= 0.3
