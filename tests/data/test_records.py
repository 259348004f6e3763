import shutil

import numpy as np
import pytest

from dinalrm_jax.data import records
from dinalrm_jax.data.loader import JoinedPairs, distinct_rows
from dinalrm_jax.data.records import ImageRecord, PairRecord, PromptRecord, Records, RecordsError
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.encoding import EncodersConfig
from dinalrm_jax.scenes.config import ScenesConfig
from dinalrm_jax.scenes.records import write_scene_records

TINY = EncodersConfig("tiny", 6)


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
    records.write(
        path,
        images=iter(images),
        prompts=prompts,
        pairs=pairs,
        encoders=EncodersConfig("tiny", 3),
        downsampling=8,
        source={"of": "test"},
    )
    return path


def test_what_was_written_is_read(directory):
    data = Records(directory)
    assert data.manifest["source"] == {"of": "test"}
    assert data.encoders == EncodersConfig("tiny", 3)
    assert data.buckets("train") == {"32x48": range(10)}
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
    with pytest.raises(RecordsError, match=r"nowhere is not there, or not a directory of records.*preprocess"):
        Records(tmp_path / "nowhere")
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
            encoders=EncodersConfig("tiny", 1),
            downsampling=8,
            source={},
        )
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_float16_cannot_hold_are_refused(tmp_path):
    rows = [ImageRecord(np.full((2, 2, 16), 1e5, np.float32), "0")]
    with pytest.raises(ValueError, match="latents holds numbers that are not finite in float16 .largest 100000"):
        records.write_shard(tmp_path / "shard", records.image_features(), rows)
    assert list(tmp_path.iterdir()) == []


def test_scene_records(tmp_path):
    write_scene_records(tmp_path / "scenes", ScenesConfig(8, 4, 32, seed=1, two_groups=0.0), TINY)
    data = Records(tmp_path / "scenes")
    assert (len(data.pairs("train")), len(data.pairs("eval"))) == (8, 4)
    assert data.encoders == TINY
    with pytest.raises(ConfigError, match="scenes are encoded by the tiny encoders"):
        write_scene_records(tmp_path / "other", ScenesConfig(), EncodersConfig("sd3"))
    assert {pair.kind.split("/")[0] for pair in data.pairs("eval")} == {"prompt", "degraded"}
    assert data.images[0].latents.shape == (4, 4, 16)
