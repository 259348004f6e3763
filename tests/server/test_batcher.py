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
    with batcher.announced():  # one that takes too long is not waited for
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


def test_a_score_that_is_not_finite_is_an_error_of_its_row(engine, batcher):
    engine.start = lambda rows: lambda: np.array([np.nan if item.seed == 2 else item.seed for item in rows])
    futures = batcher.submit([row(seed) for seed in (1, 2, 3, 4)])
    assert scores([futures[0], *futures[2:]]) == [1, 3, 4]
    with pytest.raises(RequestError, match="nan for finite inputs") as error:
        futures[1].result(10)
    assert error.value.status == 500


def test_cancelled_rows_do_not_reach_the_device(engine, batcher):
    engine.gate.clear()
    first = batcher.submit([row(1)])
    until(lambda: engine.batches == [[1]])
    futures = batcher.submit([row(2), row(3)])
    assert futures[0].cancel()
    engine.gate.set()
    assert scores([*first, futures[1]]) == [1, 3]
    assert engine.batches == [[1], [3]]


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
    open_to_all = started(FakeEngine(), allow_new_shapes=True)
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
    open_to_all.engine.compile = lambda shape: (_ for _ in ()).throw(RuntimeError("too large"))
    with pytest.raises(RequestError, match="too large"):
        open_to_all.submit([row(4, RowShape(8, 8, 3))])[0].result(10)
    open_to_all.drain()
    assert open_to_all.join(10)


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


def test_a_drain_does_not_wait_for_weights(engine):
    read = threading.Event()
    engine.load = lambda: read.wait(30)
    batcher = Batcher(engine, [SMALL])
    batcher.start()
    until(lambda: engine.shapes == [SMALL])
    batcher.drain()
    assert batcher.join(5)
    read.set()
