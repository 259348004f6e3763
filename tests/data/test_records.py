import json
import shutil

import numpy as np
import pytest

from dinalrm_jax.config import ScenesConfig
from dinalrm_jax.data import records
from dinalrm_jax.data.loader import JoinedPairs, distinct_rows, training_batches
from dinalrm_jax.data.records import ImageRecord, PairRecord, PromptRecord, Records, RecordsError
from dinalrm_jax.data.scene_records import write_scene_records


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Twelve images filled with their index, three prompts, ten training pairs and two held-out ones."""
    path = tmp_path_factory.mktemp("records") / "data"
    images = [ImageRecord(np.full((4, 6, 16), i, np.float32), f"{i}.jpg", 100 + i) for i in range(12)]
    prompts = [PromptRecord(f"prompt {i} é", np.full((3, 5), i), np.full(7, -i)) for i in range(3)]
    pairs = {
        "train": [PairRecord(i, i + 1, i % 3, "a/b") for i in range(10)],
        "eval": [PairRecord(11, 10, 2, "human"), PairRecord(11, 0, 1, "human")],
    }
    records.write(path, images=iter(images), prompts=prompts, pairs=pairs, manifest={"codec": {"name": "test"}})
    return path


def test_what_was_written_is_read(directory):
    data = Records(directory)
    assert data.manifest["codec"] == {"name": "test"}
    assert (len(data.images), len(data.prompts), len(data.pairs("train"))) == (12, 3, 10)
    image = data.images[7]
    assert (image.name, image.file_bytes) == ("7.jpg", 107)
    assert (image.latents.shape, image.latents.dtype) == ((4, 6, 16), np.float16)
    assert (image.latents == 7).all()
    assert data.prompts[2].text == "prompt 2 é"
    assert list(data.pairs("eval")) == [PairRecord(11, 10, 2, "human"), PairRecord(11, 0, 1, "human")]


def test_a_pair_joins_its_images_and_prompt(directory):
    pair = JoinedPairs(Records(directory), "train")[4]
    assert (pair.chosen == 4).all()
    assert (pair.rejected == 5).all()
    assert (pair.prompt.prompt_embeds == 1).all()
    assert (pair.prompt.pooled_prompt_embeds == -1).all()


def first_values(batches, count):
    return [next(batches).chosen[:, 0, 0, 0].astype(int).tolist() for _ in range(count)]


def test_epochs_are_permutations_and_differ(directory):
    order = np.concatenate(first_values(training_batches(Records(directory), 5, seed=3), 6)).reshape(3, 10)
    for epoch in order:
        assert sorted(epoch) == list(range(10))
    assert not (order[0] == order[1]).all()
    assert not (order[1] == order[2]).all()


def test_order_depends_on_the_seed_only(directory):
    data = Records(directory)
    expected = first_values(training_batches(data, 4, seed=1), 8)
    assert first_values(training_batches(data, 4, seed=1), 8) == expected
    assert first_values(training_batches(data, 4, seed=2), 8) != expected


def test_loader_continues_from_its_state(directory):
    data = Records(directory)
    batches = training_batches(data, 4, seed=1)
    first_values(batches, 3)
    state = json.loads(json.dumps(batches.get_state()))
    expected = first_values(batches, 5)
    again = training_batches(data, 4, seed=1)
    again.set_state(state)
    assert first_values(again, 5) == expected


def test_rows_are_scored_once():
    pairs = [PairRecord(1, 2, 0, ""), PairRecord(1, 3, 0, ""), PairRecord(2, 3, 0, ""), PairRecord(1, 2, 5, "")]
    rows, chosen, rejected = distinct_rows(pairs)
    assert len(rows) == 5
    for pair, c, r in zip(pairs, chosen, rejected):
        assert tuple(rows[c]) == (pair.chosen, pair.prompt)
        assert tuple(rows[r]) == (pair.rejected, pair.prompt)


def test_directories_that_are_not_records(directory, tmp_path):
    with pytest.raises(RecordsError, match=r"holds no manifest.json.*dinalrm_jax.preprocess"):
        Records(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "other/3"}')
    with pytest.raises(RecordsError, match="has format 'other/3'"):
        Records(tmp_path)
    for damage in ("dataset_info.json", "images-rows.array_record-00000-of-00001"):
        copy = shutil.copytree(directory, tmp_path / f"copy-{damage}")
        (copy / "images" / damage).unlink()
        with pytest.raises(RecordsError, match="images has no readable split"):
            Records(copy)
    with pytest.raises(RecordsError, match="has no readable split 'test'"):
        Records(directory).pairs("test")
    with pytest.raises(RecordsError, match="has 10 training pairs, a batch takes 11"):
        training_batches(Records(directory), 11, seed=0)


def test_nothing_is_left_of_an_interrupted_write(tmp_path):
    def images():
        yield ImageRecord(np.zeros((2, 2, 16)), "0")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        records.write(
            tmp_path / "data",
            images=images(),
            prompts=[PromptRecord("a", np.zeros((1, 2)), np.zeros(2))],
            pairs={"train": []},
            manifest={},
        )
    assert list(tmp_path.iterdir()) == []


def test_scene_records(tmp_path):
    write_scene_records(tmp_path / "scenes", ScenesConfig(train_pairs=8, eval_pairs=4, image_size=32, seed=1))
    data = Records(tmp_path / "scenes")
    assert (len(data.pairs("train")), len(data.pairs("eval"))) == (8, 4)
    assert data.manifest["text"]["name"] == "hashed_words"
    assert {pair.kind.split("/")[0] for pair in data.pairs("eval")} == {"prompt", "degraded"}
    assert data.images[0].latents.shape == (4, 4, 16)
