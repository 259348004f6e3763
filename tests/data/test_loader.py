"""Order of the batches, what each process reads of them, and continuing."""

import json
from collections import Counter

import numpy as np
import pytest

from dinalrm_jax.data import records
from dinalrm_jax.data.loader import Schedule, TrainingBatches
from dinalrm_jax.data.records import ImageRecord, PairRecord, PromptRecord, Records, RecordsError
from dinalrm_jax.model.encoding import EncodersConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pairs of an image and the next of its bucket, 7 of 16x16 and 13 of 16x32 pixels, filled with their index.

    Prompts alternate, and are filled with theirs.
    """
    path = tmp_path_factory.mktemp("records") / "data"
    images = [ImageRecord(np.full((2, 2 if i < 7 else 4, 16), i, np.float32), f"{i}") for i in range(20)]
    records.write(
        path,
        images=images,
        prompts=[PromptRecord(f"p{i}", np.full((3, 5), i), np.full(7, -i)) for i in range(2)],
        pairs={"train": [PairRecord(i, following(i), i % 2, "") for i in (*range(15, 20), *range(15))]},
        encoders=EncodersConfig("tiny", 3),
        downsampling=8,
        source={},
    )
    return Records(path)


def following(image):
    return (image + 1) % 7 if image < 7 else 7 + (image - 7 + 1) % 13


def test_every_row_of_a_batch_is_its_pair(data):
    batches = TrainingBatches(data, 4, seed=3)
    for _ in range(10):
        batch = next(batches)
        chosen = batch.chosen[:, 0, 0, 0].astype(int)
        assert batch.rejected[:, 0, 0, 0].astype(int).tolist() == [following(image) for image in chosen]
        assert batch.prompt.prompt_embeds[:, 0, 0].tolist() == [image % 2 for image in chosen]
        assert batch.prompt.pooled_prompt_embeds[:, 0].tolist() == [-(image % 2) for image in chosen]


def values(batches, count):
    return [next(batches).chosen[:, 0, 0, 0].astype(int).tolist() for _ in range(count)]


def test_a_batch_holds_one_bucket_and_an_epoch_every_pair_once(data):
    """20 pairs in batches of 4: every 5 batches are an epoch, up to what straddles two permutations."""
    assert {name: len(rows) for name, rows in data.buckets("train").items()} == {"16x16": 7, "16x32": 13}
    batches = TrainingBatches(data, 4, seed=3)
    seen = Counter(dict.fromkeys(range(20), 0))
    for batches_of_epoch in (4, 5, 5, 6):  # 7 // 4 + 13 // 4 = 4 in the first, and so on
        for batch in values(batches, batches_of_epoch):
            assert len({value < 7 for value in batch}) == 1
            seen.update(batch)
        for bucket in (range(7), range(7, 20)):
            counts = [seen[value] for value in bucket]
            assert max(counts) - min(counts) <= 1
    assert set(seen.values()) == {4}, "after 4 epochs the batches of both buckets end with a permutation"


def test_buckets_come_in_proportion_and_shuffled():
    schedule = Schedule({"a": range(100), "b": range(100, 1000), "none": range(1000, 1000)}, 8, seed=0)
    names = [schedule.batch(step)[0] for step in range(1250)]
    assert Counter(names) == {"a": 125, "b": 1125}
    assert 8 <= names[:125].count("a") <= 16
    assert names[:125] != sorted(names[:125])
    rows = Counter(int(row) for step in range(1250) for row in schedule.batch(step)[1])
    assert set(rows.values()) == {10}


def test_order_depends_on_the_seed_only(data):
    expected = values(TrainingBatches(data, 4, seed=1), 8)
    assert values(TrainingBatches(data, 4, seed=1), 8) == expected
    assert values(TrainingBatches(data, 4, seed=2), 8) != expected


def test_processes_read_their_rows_of_the_same_batches(data):
    whole = values(TrainingBatches(data, 4, seed=1), 6)
    for rows in ([0, 1], [2, 3], [1]):
        part = values(TrainingBatches(data, 4, seed=1, rows=rows), 6)
        assert part == [[batch[row] for row in rows] for batch in whole]


def test_continues_from_its_state_with_another_number_of_processes(data):
    batches = TrainingBatches(data, 4, seed=1)
    values(batches, 3)
    state = json.loads(json.dumps(batches.get_state()))
    expected = values(batches, 5)
    again = TrainingBatches(data, 4, seed=1, rows=[2, 3])
    again.set_state(state)
    assert values(again, 5) == [batch[2:] for batch in expected]


def test_the_state_of_another_order_is_refused(data):
    state = TrainingBatches(data, 4, seed=1).get_state()
    with pytest.raises(RecordsError, match=r"batch_size changed: batch_size was 4, is 5"):
        TrainingBatches(data, 5, seed=1).set_state(state)
    state["pairs"] = {"16x16": 8, "16x32": 13}
    with pytest.raises(RecordsError, match=r"pairs was {'16x16': 8, .*Train on the records it was made with"):
        TrainingBatches(data, 4, seed=1).set_state(state)


def test_too_few_pairs(data):
    with pytest.raises(RecordsError, match="has 20 training pairs, a batch takes 21"):
        TrainingBatches(data, 21, seed=0)


def test_every_epoch_and_every_seed_puts_other_pairs_together():
    """Forty pairs in ten batches an epoch: which stand beside each other is drawn anew."""

    def together(seed, epoch):
        schedule = Schedule({"bucket": range(40)}, 4, seed)
        return {frozenset(schedule.batch(step)[1].tolist()) for step in range(10 * epoch, 10 * epoch + 10)}

    first = together(0, 0)
    assert first == together(0, 0)
    for other in (together(0, 1), together(1, 0)):
        assert set().union(*other) == set(range(40))
        assert len(first & other) <= 1
