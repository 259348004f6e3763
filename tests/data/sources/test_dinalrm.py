"""The authors' preprocessed dataset, in its real layout, becomes records without any image."""

import csv
import dataclasses
import io
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dinalrm_jax.data import records
from dinalrm_jax.data.config import PreparationConfig
from dinalrm_jax.data.records import Records, RecordsError
from dinalrm_jax.data.sources import dinalrm
from dinalrm_jax.data.sources.datasets import preprocess, read_source
from dinalrm_jax.encoders.pipeline import vae_fingerprint
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.config import RewardModelConfig
from dinalrm_jax.model.encoding import EncodersConfig
from dinalrm_jax.scenes import rehearsal
from dinalrm_jax.training.preflight import check_fit
from tests.conftest import ROOT
from tests.data.test_preparation import same_files

CONFIG = PreparationConfig(
    "dinalrm", EncodersConfig("tiny", 8), buckets=("64x64", "96x64"), min_area=1024, holdout=1, images_per_shard=3,
    prompts_per_shard=2,
)  # fmt: skip
SIZES = ((64, 64), (96, 64))


def latent(number, size, channels=16):
    shape = (channels, size[0] // 8, size[1] // 8)
    return np.random.default_rng(number).standard_normal(shape).astype(np.float32)


def npy(array):
    np.save(buffer := io.BytesIO(), array)
    return buffer.getvalue()


def write_dinalrm(directory, rows_of_files, votes=(9, 3)):
    """Rows are (prompt, (height, width)); latents 2 n and 2 n + 1 are those of row n. Groups of two rows."""
    directory.mkdir(parents=True)
    index, number = [], 0
    for rank, rows in enumerate(rows_of_files):
        columns = {name: [] for name in ("prompt", "model1", "model2", "detailed_results", "image1_path", "image2_path",
                                         "latent1", "latent2", "latent1_shape", "latent2_shape")}  # fmt: skip
        for place, (prompt, size) in enumerate(rows):
            details = {"votes_chosen": votes[0], "votes_rejected": votes[1], "confidence": 0.97,
                       "orig_chosen_hw": (1, 2), "final_chosen_hw": size}  # fmt: skip
            both = [latent(2 * number + side, size) for side in range(2)]
            values = (prompt, "flux", "sdxl", str(details), f"images/{number}a.jpg", f"images/{number}b.jpg",
                      *map(npy, both), *(list(array.shape) for array in both))  # fmt: skip
            for column, value in zip(columns.values(), values):
                column.append(value)
            index.append([number, f"/far/away/part_rank{rank:02d}.parquet", place // 2, place % 2, size[1], size[0], 0])
            number += 1
        path = directory / f"part_rank{rank:02d}.parquet"
        pq.write_table(pa.table(columns), path, row_group_size=2, compression="zstd")
    write_index(directory, index)
    return directory


def write_index(directory, rows):
    with (directory / "bucket_index.csv").open("w", newline="") as file:
        header = ["global_id", "parquet_path", "row_group", "row_index", "width", "height", "bucket_id"]
        csv.writer(file).writerows([header, *rows])


def read_index(directory):
    with (directory / "bucket_index.csv").open(newline="") as file:
        return list(csv.reader(file))[1:]


@pytest.fixture
def source(tmp_path):
    rows = [(f"prompt {n % 4}", SIZES[n % 2]) for n in range(9)]
    return write_dinalrm(tmp_path / "source", [rows[:5], rows[5:]])


def test_latents_become_records(source, tmp_path):
    manifest = preprocess(source, tmp_path / "out", CONFIG)
    assert manifest["left_out"] == {}
    assert "codec" not in manifest, "nobody said which VAE it was"
    data = Records(tmp_path / "out")
    seen = set()
    for split in ("train", "eval"):
        for bucket, places in data.buckets(split).items():
            for pair in (data.pairs(split)[place] for place in places):
                chosen, rejected = data.images[pair.chosen], data.images[pair.rejected]
                base, group, row, side = chosen.name.split(":")
                assert side == "chosen"
                assert rejected.name == f"{base}:{group}:{row}:rejected"
                number = 5 * (base == "part_rank01.parquet") + 2 * int(group) + int(row)
                size = SIZES[number % 2]
                assert bucket == f"{size[0]}x{size[1]}"
                assert data.prompts[pair.prompt].text == f"prompt {number % 4}"
                for image, which in ((chosen, 2 * number), (rejected, 2 * number + 1)):
                    expected = latent(which, size).transpose(1, 2, 0).astype(np.float16)
                    np.testing.assert_array_equal(image.latents, expected)
                seen.add(number)
    assert seen == set(range(9))
    prompts = [{data.prompts[pair.prompt].text for pair in data.pairs(split)} for split in ("train", "eval")]
    assert len(prompts[1]) == 1
    assert prompts[0].isdisjoint(prompts[1])
    every = np.concatenate([latent(n, SIZES[n // 2 % 2]).ravel() for n in range(18)])
    lost = every - every.astype(np.float16)
    assert manifest["images"]["float16_error"]["largest"] == pytest.approx(np.abs(lost).max())
    assert manifest["images"]["float16_error"]["root_mean_square"] == pytest.approx(np.sqrt(np.square(lost).mean()))


def test_votes_and_limits_apply(source, tmp_path):
    few = preprocess(source, tmp_path / "few", dataclasses.replace(CONFIG, max_rows_per_prompt=1))
    assert sum(few["pairs"]["train"].values()) == 3
    assert few["left_out"] == {"pair beyond those of a prompt": 9 - 3 - sum(few["pairs"]["eval"].values())}
    only = preprocess(source, tmp_path / "only", dataclasses.replace(CONFIG, buckets=("64x64",)))
    assert only["left_out"] == {"pair of a size that is no bucket": 4}
    with pytest.raises(RecordsError, match="no pairs are left for train; left out: .* vote share too small"):
        preprocess(source, tmp_path / "none", dataclasses.replace(CONFIG, min_vote_share=0.8))
    rows = read_source(source, CONFIG).preferences["train"]
    assert {(row.votes, row.confidence) for row in rows} == {((9, 3), 0.97)}
    unknown = write_dinalrm(tmp_path / "unknown", [[(f"p{n}", (64, 64)) for n in range(3)]], votes=(0, 0))
    rows = read_source(unknown, CONFIG).preferences["train"]
    assert {(row.votes, row.confidence) for row in rows} == {(None, 0.97)}
    assert dinalrm._votes("{'votes_chosen': 2, 'votes_rejected': 5, 'confidence': 0.0}") == ((2, 5), None)


def test_the_base_models_vae_is_named_and_none_is_loaded(source, tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("dinalrm_jax.encoders.load.load_vae", lambda _: pytest.fail("an image encoder was loaded"))
    config = dataclasses.replace(CONFIG, encoders=EncodersConfig("sd3", 8))
    manifest = preprocess(source, tmp_path / "out", config, tiny_pipeline)
    assert manifest["codec"] == vae_fingerprint(tiny_pipeline / "vae")
    model = RewardModelConfig(rehearsal.TRANSFORMER, 2, (1, 2), (1, 2), None, encoders=config.encoders)
    check_fit(
        Records(tmp_path / "out"), model.encoders, model.transformer, tiny_pipeline, ("train", "eval")
    )  # they can be trained on
    bare = shutil.copytree(tiny_pipeline, tmp_path / "bare")
    shutil.rmtree(bare / "vae")
    assert "codec" not in preprocess(source, tmp_path / "bare_out", config, bare)


def test_killed_and_continued_ends_in_the_same_bytes(source, tmp_path, monkeypatch):
    preprocess(source, tmp_path / "whole", CONFIG)
    write, written = records.write_shard, []

    def killed(path, *rest):
        if len(written) % 3 == 2:
            written.append(None)
            raise KeyboardInterrupt
        written.append(path)
        return write(path, *rest)

    monkeypatch.setattr(records, "write_shard", killed)
    kills = 0
    while not (tmp_path / "out").exists():
        try:
            preprocess(source, tmp_path / "out", CONFIG)
        except KeyboardInterrupt:
            kills += 1
    assert kills >= 3
    assert same_files(tmp_path / "whole", tmp_path / "out")


@pytest.mark.heavy
def test_processes_share_the_work(source, tmp_path):
    """By the command, in one process and in two."""
    command = ["dinalrm_jax.preprocess", "--dataset=dinalrm", f"--source={source}", "--encoders=tiny", "--holdout=1"]
    command += ["--buckets=64x64,96x64", "--min-area=1024", "--images-per-shard=3", "--prompts-per-shard=2"]
    run = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 300}
    one = subprocess.run([sys.executable, "-m", *command, f"--output={tmp_path / 'one'}"], **run)
    assert one.returncode == 0, one.stderr
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "PROCESSES": "2", "LOGS": str(tmp_path / "logs"), "PORT": str(port)}
    environment["PATH"] = f"{pathlib.Path(sys.executable).parent}:{environment['PATH']}"
    two = subprocess.run(
        ["launch/local_processes.sh", *command, f"--output={tmp_path / 'two'}"], **run, env=environment
    )
    assert two.returncode == 0, two.stderr
    assert same_files(tmp_path / "one", tmp_path / "two")


def test_what_is_not_as_the_index_says(source, tmp_path):
    """One of every kind; the other rows stay."""
    rows = read_index(source)
    index = [row for row in rows if row[0] not in ("0", "1")]
    index += [
        [20, "part_rank07.parquet", 0, 0, 64, 64, 0], [21, rows[0][1], 3, 0, 64, 64, 0],
        [22, rows[0][1], 2, 1, 64, 64, 0],
        [23, rows[0][1], "x", 0, 64, 64, 0], [24, rows[0][1], 0, 0, 60, 64, 0], rows[2],
        [25, rows[0][1], -1, 0, 64, 64, 0], [26, "", 0, 0, 64, 64, 0], [27],
    ]  # fmt: skip
    write_index(source, index)
    manifest = preprocess(source, tmp_path / "out", CONFIG)
    assert manifest["left_out"] == {
        "index row of a size that latents cannot have": 1,
        "index row that is not one": 4,
        "index row that is there twice": 1,
        "row of a missing parquet file": 1,
        "row that its parquet file does not have": 2,
    }
    assert sum(sum(split.values()) for split in manifest["pairs"].values()) == 7


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "unreadable"),
        (b"", "unreadable"),
        (b"garbage", "unreadable"),
        (npy(np.array([{}], dtype=object)), "unreadable"),
        (npy(latent(0, (64, 64)))[:-4], "unreadable"),
        (npy(latent(0, (64, 96))), "unreadable: latents of another shape"),
        (npy(latent(0, (64, 64)).transpose(1, 2, 0)), "unreadable: latents of another shape"),
        (npy(latent(0, (64, 64), channels=4)), "unreadable: latents of another shape"),
        (npy(latent(0, (64, 64)).astype(np.int32)), "unreadable: latents of another shape"),
        (npy(latent(0, (64, 64)) * np.nan), "unreadable: latents that are not finite"),
        (npy(np.full((16, 8, 8), 1e5, np.float32)), "unreadable: latents that are not finite"),
    ],
)
def test_latents_that_are_none(source, tmp_path, value, reason):
    path = source / "part_rank00.parquet"
    table = pq.read_table(path)
    column = table["latent2"].to_pylist()
    column[0] = value
    table = table.set_column(table.schema.get_field_index("latent2"), "latent2", pa.array(column, pa.binary()))
    pq.write_table(table, path, row_group_size=2)
    manifest = preprocess(source, tmp_path / "out", CONFIG)
    assert manifest["left_out"] == {f"image {reason}": 1, "pair of a missing or unreadable image": 1}
    assert manifest["examples"] == {reason: ["part_rank00.parquet:000000:000000:rejected"]}


def test_a_damaged_row_group(source, tmp_path):
    """Found when its latents are read; the file's end, which lists the groups, is whole."""
    path = source / "part_rank01.parquet"
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(6)
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset + 40 : chunk.data_page_offset + 4000] = bytes(3960)
    path.write_bytes(data)
    left_out = preprocess(source, tmp_path / "out", CONFIG)["left_out"]
    assert left_out == {"image unreadable: damaged row group": 4, "pair of a missing or unreadable image": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / "bucket_index.csv").unlink(), "it has no bucket_index.csv"),
        (lambda d: (d / "bucket_index.csv").write_text("a,b\n1,2\n"), "lacks the columns .*'height', 'parquet_path'"),
        (lambda d: (d / "bucket_index.csv").write_bytes(b"parquet_path\n\xff\xfe"), "is not a CSV file in UTF-8"),
        (lambda d: [path.unlink() for path in d.glob("*.parquet")], "holds no row of its .*9 row of a missing parquet"),
        (lambda d: (d / "part_rank01.parquet").write_bytes(b"PAR1"), "part_rank01.parquet is not a readable parquet"),
        (lambda d: pq.write_table(pa.table({"prompt": ["a"]}), d / "part_rank01.parquet"), "lacks the columns"),
        (lambda d: write_index(d, []), "holds no row of its bucket_index.csv: which is empty"),
        (
            lambda d: shutil.copytree(d, d.parent / "copy") and shutil.move(d.parent / "copy", d / "copy"),
            "have one name, by which",
        ),
    ],
)
def test_sets_that_are_not_what_they_say(source, change, message):
    change(source)
    with pytest.raises(RecordsError, match=message):
        read_source(source, CONFIG)


def test_latents_are_not_cropped():
    with pytest.raises(ConfigError, match="fit is crop, but dinalrm holds latents"):
        dataclasses.replace(CONFIG, fit="crop")


def test_row_groups_are_read_once_for_a_bucket(source, monkeypatch):
    read, seen = dinalrm.StoredLatents._read_group, []
    monkeypatch.setattr(
        dinalrm.StoredLatents,
        "_read_group",
        staticmethod(lambda path, group: seen.append((pathlib.Path(path).name, group)) or read(path, group)),
    )
    found = read_source(source, CONFIG)
    names = sorted(name for name, size in found.latents.sizes.items() if size == (64, 64))
    shards = [((64, 64), names[:3]), ((64, 64), names[3:])]
    assert len(list(found.latents.read(shards))) == len(names)
    assert seen == sorted(set(seen))
