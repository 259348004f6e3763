"""Preprocessing: what is kept and why not, what is stored, and that nothing is lost or half done."""

import dataclasses
import filecmp
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dinalrm_jax.data import files, records
from dinalrm_jax.data.config import PreparationConfig
from dinalrm_jax.data.preparation import report
from dinalrm_jax.data.records import Records, RecordsError
from dinalrm_jax.data.sources.datasets import preprocess
from dinalrm_jax.disk import Locked, lock
from dinalrm_jax.encoders import tiny
from dinalrm_jax.encoders.load import SD3Codec
from dinalrm_jax.model.encoding import EncodersConfig
from tests.conftest import ROOT
from tests.data.source_files import ranking, write_hpdv2
from tests.data.sources.test_sources import write_hpdv3

TINY = PreparationConfig(
    "hpdv3", EncodersConfig("tiny", 8), buckets=("64x64", "96x64", "128x128"), min_area=1024, images_per_shard=3,
    prompts_per_shard=2, batch_size=2, threads=2,
)  # fmt: skip


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "path1": f"images/{chosen}.png", "path2": f"images/{rejected}.png"}


def picture(path, height, width, seed=0):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    small.resize((width, height), Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def source(tmp_path):
    """Five good pairs of three prompts, and one of every kind that is left out."""
    rows = [pair("a", 0, 1), pair("a", 1, 2), pair("b", 3, 4), pair("b", 4, 3), pair("c", 5, 6), pair("c", 5, 5)]
    bad = ("missing", "truncated", "tiny", "panorama", "other_shape")
    directory = write_hpdv3(tmp_path / "source", rows + [pair("d", 0, name) for name in bad], [pair("e", "grey", 0)])
    (directory / "images").mkdir()
    for i in range(7):
        size = (128, 128) if i == 6 else (96, 64) if i in (3, 4) else (64, 64)
        picture(directory / "images" / f"{i}.png", *size, seed=i)
    picture(directory / "images" / "truncated.png", 64, 64)
    data = (directory / "images" / "truncated.png").read_bytes()
    (directory / "images" / "truncated.png").write_bytes(data[: len(data) // 2])
    picture(directory / "images" / "tiny.png", 31, 33)
    picture(directory / "images" / "panorama.png", 64, 200)
    picture(directory / "images" / "other_shape.png", 96, 64)
    Image.new("L", (64, 64), 128).save(directory / "images" / "grey.png")
    return directory


def test_what_is_kept_and_why_not(source, tmp_path):
    manifest = preprocess(source, tmp_path / "out", TINY)
    assert manifest["left_out"] == {
        "image missing": 1,
        "image unreadable": 1,
        "note: image converted to RGB": 1,
        "note: votes unknown": 12,
        "pair of a missing or unreadable image": 2,
        "pair of an image of odd aspect": 1,
        "pair of an image with itself": 1,
        "pair of an image too small": 1,
        "pair of different aspects": 1,
    }
    assert manifest["pairs"] == {"train": {"128x128": 1, "64x64": 2, "96x64": 2}, "eval": {"64x64": 1}}
    lines = report(manifest)
    assert "5 train pairs (128x128: 1, 64x64: 2, 96x64: 2)" in lines
    assert "1 image unreadable (images/truncated.png)" in lines
    data = Records(tmp_path / "out")
    joined = {
        tuple(data.images[i].name[7:-4] for i in (row.chosen, row.rejected)) + (data.prompts[row.prompt].text,)
        for row in data.pairs("train")
    }
    assert joined == {("0", "1", "a"), ("1", "2", "a"), ("3", "4", "b"), ("4", "3", "b"), ("5", "6", "c")}
    # 5 is stored once at its own size for nothing, and once at the size of its pair: 64 and 128 make 128.
    shapes = {data.images[i].name: data.images[i].latents.shape for i in range(len(data.images))}
    assert shapes["images/5.png"] == shapes["images/6.png"] == (16, 16, 16)
    assert [data.images[i].name for i in range(len(data.images))].count("images/1.png") == 1, "once an image"
    (held_out,) = data.pairs("eval")
    grey = tiny.decode_latents(data.images[held_out.chosen].latents)
    np.testing.assert_allclose(grey, 128, atol=2)
    expected, _ = tiny.encode_prompts(["b"], 8, 64)
    (b,) = [data.prompts[i] for i in range(len(data.prompts)) if data.prompts[i].text == "b"]
    np.testing.assert_allclose(b.prompt_embeds, expected[0], atol=2e-3)


def test_float16_error_is_measured(source, tmp_path):
    manifest = preprocess(source, tmp_path / "out", TINY)
    data = Records(tmp_path / "out")
    largest = 0.0
    for i in range(len(data.images)):
        row = data.images[i]
        with Image.open(source / row.name) as image:
            size = row.latents.shape[1] * 8, row.latents.shape[0] * 8
            pixels = np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS))
        latents = tiny.encode_image(pixels)
        largest = max(largest, np.abs(latents - row.latents.astype(np.float32)).max())
    error = manifest["images"]["float16_error"]
    assert error["largest"] == pytest.approx(largest)
    assert 0 < error["root_mean_square"] < largest


def test_a_kill_while_finishing_loses_nothing(source, tmp_path, monkeypatch):
    """The last moment before the records are published, and the first one after."""
    expected = preprocess(source, tmp_path / "whole", TINY)

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(records, "finish", killed)
    with pytest.raises(KeyboardInterrupt):
        preprocess(source, tmp_path / "out", TINY)
    monkeypatch.undo()
    unfinished = tmp_path / "out.unfinished" / "records"
    parts = {path: path.stat().st_mtime_ns for path in unfinished.rglob("*array_record*")}
    assert len(parts) > 3
    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        preprocess(source, tmp_path / "out", TINY)
    monkeypatch.undo()
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == expected
    assert same_files(tmp_path / "whole", tmp_path / "out")
    for path, modified in parts.items():
        moved = tmp_path / "out" / path.relative_to(unfinished)
        assert moved.stat().st_mtime_ns == modified or path.parent.name == "pairs", "encoded once"


def test_an_image_of_two_buckets_is_one_image(tmp_path):
    directory = write_hpdv3(tmp_path / "s", [pair("a", 0, 1), pair("b", 0, 2), pair("c", 1, 3)], [pair("d", 1, 3)])
    (directory / "images").mkdir()
    for i, side in enumerate((64, 64, 128, 64)):
        picture(directory / "images" / f"{i}.png", side, side, seed=i)
    data = (directory / "images" / "0.png").read_bytes()
    (directory / "images" / "0.png").write_bytes(data[: len(data) // 2])
    manifest = preprocess(directory, tmp_path / "out", TINY)
    assert manifest["left_out"]["image unreadable"] == 1
    assert manifest["left_out"]["pair of a missing or unreadable image"] == 2


def test_a_hostile_file_costs_its_pairs_only(source, tmp_path):
    """PIL refuses text chunks that unpack to more than 1 MB with a ValueError."""
    info = PngInfo()
    info.add_text("workflow", "x" * 2_000_000, zip=True)
    Image.new("RGB", (64, 64)).save(source / "images" / "other_shape.png", pnginfo=info)
    manifest = preprocess(source, tmp_path / "out", TINY)
    assert manifest["left_out"]["image unreadable"] == 2


def test_names_that_are_no_files_cost_their_pairs_only(source, tmp_path):
    """Each is counted with its reason, and nothing outside of the source is read."""
    Image.new("RGB", (64, 64)).save(tmp_path / "outside.png")
    os.mkfifo(source / "images" / "pipe.png")
    odd = ("pipe", "../../outside", "a\0b", "x" * 300)
    rows = json.loads((source / "train.json").read_text()) + [pair("d", 0, name) for name in odd]
    rows.append({"prompt": "d", "path1": "images/0.png", "path2": str(tmp_path / "outside.png")})
    rows.append(pair("half a \ud83d pair", 0, 1))
    (source / "train.json").write_text(json.dumps(rows))
    manifest = preprocess(source, tmp_path / "out", TINY)
    assert {reason: count for reason, count in manifest["left_out"].items() if "missing:" in reason} == {
        "image missing: not a regular file": 1,
        "image missing: outside of the source": 2,
        "image missing: no file's name": 1,
        "image missing: file name too long": 1,
    }
    assert manifest["left_out"]["row of text that is no Unicode"] == 1
    assert manifest["left_out"]["pair of a missing or unreadable image"] == 2 + 5
    assert manifest["examples"]["missing: not a regular file"] == ["images/pipe.png"]
    assert "1 image missing: not a regular file (images/pipe.png)" in report(manifest)


def test_orientation_decides_the_bucket(tmp_path):
    """A picture stored lying that is shown standing is one of a standing bucket, and stands in its latents."""
    directory = write_hpdv3(tmp_path / "s", [pair("a", 0, 1)], [pair("d", 1, 0)])
    (directory / "images").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = np.zeros((64, 96, 3), np.uint8)
    lying[:, :48] = 255  # its left half is the upper one when shown
    for i in range(2):
        Image.fromarray(lying).save(directory / "images" / f"{i}.png", exif=exif)
    manifest = preprocess(directory, tmp_path / "out", TINY)
    assert manifest["pairs"]["train"] == {"96x64": 1}
    shown = tiny.decode_latents(Records(tmp_path / "out").images[0].latents)
    assert shown[:40].mean() > 240
    assert shown[56:].mean() < 15


@pytest.mark.parametrize("step", ["sizes", "decoding"])
def test_an_error_of_the_file_system_ends_the_run_and_is_not_noted(source, tmp_path, monkeypatch, step):
    """The system's own EIO: /proc/self/mem is a regular file whose first byte cannot be read."""
    expected = preprocess(source, tmp_path / "whole", TINY)
    pauses = []
    monkeypatch.setattr(files.time, "sleep", pauses.append)
    if step == "decoding":
        with monkeypatch.context() as patch:
            patch.setattr(records, "write_shard", lambda *_: [][0])
            with pytest.raises(IndexError):
                preprocess(source, tmp_path / "out", TINY)
    victim = source / "images" / "3.png"
    whole = victim.read_bytes()
    victim.unlink()
    victim.symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match=r"cannot read images/3.png: .*Input/output error"):
        preprocess(source, tmp_path / "out", TINY)
    assert pauses == list(files.PAUSES)
    victim.unlink()
    victim.write_bytes(whole)
    assert preprocess(source, tmp_path / "out", TINY) == expected
    assert same_files(tmp_path / "whole", tmp_path / "out")


def test_one_run_at_a_time(source, tmp_path):
    """The second one says who the first is and touches nothing."""
    with lock(tmp_path / "out"):
        tiny = ["--encoders=tiny", f"--output={tmp_path / 'out'}", f"--source={source}", "--dataset=hpdv3"]
        second = [sys.executable, "-m", "dinalrm_jax.preprocess", *tiny]
        result = subprocess.run(second, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert result.returncode == 2
        assert re.search(rf"^error: .*out is being written by .*, process {os.getpid()}", result.stderr, re.M)
        assert "goes on" not in result.stderr
        assert not (tmp_path / "out.unfinished").exists()
    preprocess(source, tmp_path / "out", TINY)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_the_lock_is_held_to_the_end(source, tmp_path, monkeypatch):
    finish, held = records.finish, []

    def asks(*args, **kwargs):
        with pytest.raises(Locked), lock(tmp_path / "out"):
            pass
        held.append(True)
        return finish(*args, **kwargs)

    monkeypatch.setattr(records, "finish", asks)
    preprocess(source, tmp_path / "out", TINY)
    assert held


def test_what_kills_leave_is_removed(source, tmp_path, monkeypatch):
    """Half shards of another process, and the working directory of a run killed between its last two steps."""

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(records, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            preprocess(source, tmp_path / "out", TINY)
    work = tmp_path / "out.unfinished"
    half = work / "records" / "images" / ".images-rows.array_record-00000-of-00001.partial-1"
    half.write_bytes(b"half")
    (work / "parts" / ".sizes-00000.json.partial-1").write_bytes(b"half")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            preprocess(source, tmp_path / "out", TINY)
    assert (tmp_path / "out" / "manifest.json").exists()
    assert work.exists()
    assert not list(tmp_path.rglob("*.partial-*"))
    with pytest.raises(FileExistsError, match="exists already"):
        preprocess(source, tmp_path / "out", TINY)
    assert not work.exists()


def test_work_beside_an_output_is_kept_while_it_holds_records(source, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "finish", lambda *_, **__: [][0])
    with pytest.raises(IndexError):
        preprocess(source, tmp_path / "out", TINY)
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        preprocess(source, tmp_path / "out", TINY)
    assert (tmp_path / "out.unfinished" / "records").exists()


def test_what_has_its_name_is_on_disk(source, tmp_path, monkeypatch):
    synced, replace = set(), os.replace
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: synced.add(os.readlink(f"/proc/self/fd/{fd}")) or fsync(fd))

    def checked(old, new):
        inside = [pathlib.Path(old), *pathlib.Path(old).rglob("*")]
        assert {str(path) for path in inside} <= synced, f"{old} has its name {new} before it is on disk"
        replace(old, new)
        synced.discard(str(pathlib.Path(new).parent))

    monkeypatch.setattr(os, "replace", checked)
    preprocess(source, tmp_path / "out", TINY)
    assert str(tmp_path) in synced
    assert str(tmp_path / "out.unfinished" / "records" / "images") in synced


def test_another_backend_does_not_go_on(source, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(records, "finish", lambda *_, **__: [][0])
        with pytest.raises(IndexError):
            preprocess(source, tmp_path / "out", TINY)
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "tpu")
        with pytest.raises(RecordsError, match=r"begun with the backend cpu, this process has tpu"):
            preprocess(source, tmp_path / "out", TINY)
    manifest = preprocess(source, tmp_path / "out", TINY)
    assert (manifest["backend"], manifest["precision"]) == ("cpu", "highest")


def test_cropping_keeps_odd_shapes(source, tmp_path):
    manifest = preprocess(source, tmp_path / "out", dataclasses.replace(TINY, fit="crop", buckets=("64x64",)))
    assert manifest["pairs"]["train"] == {"64x64": 7}


def test_held_out_pairs_are_limited(tmp_path):
    rows = [ranking(f"p{i}", [f"{i}{j}.png" for j in range(3)], [1, 2, 3]) for i in range(4)]
    config = dataclasses.replace(TINY, dataset="hpdv2", fit="crop", buckets=("32x32",), holdout=2, eval_pairs=4)
    manifest = preprocess(write_hpdv2(tmp_path / "s", rows), tmp_path / "out", config)
    assert manifest["pairs"] == {"train": {"32x32": 6}, "eval": {"32x32": 4}}


def command(source, output, pipeline):
    flags = {
        "dataset": "hpdv3", "source": source, "output": output, "base-model": pipeline, "buckets": "64x64,96x64",
        "min-area": 1024, "images-per-shard": 4, "prompts-per-shard": 3, "batch-size": 2, "text-length": 8,
    }  # fmt: skip
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    return [sys.executable, "-m", "dinalrm_jax.preprocess", *arguments]


def same_files(left, right):
    names = {path.relative_to(left) for path in left.rglob("*") if path.is_file()}
    assert names == {path.relative_to(right) for path in right.rglob("*") if path.is_file()}
    _, different, errors = filecmp.cmpfiles(left, right, names, shallow=False)
    return not different and not errors


def test_killed_and_continued_ends_in_the_same_bytes(tiny_pipeline, rehearsal_source, tmp_path):
    """The SD3 encoders in real processes; SIGKILL while images, then while prompts are encoded."""
    run = {"cwd": ROOT, "capture_output": True, "text": True, "env": dict(os.environ)}
    whole = subprocess.run(command(rehearsal_source, tmp_path / "whole", tiny_pipeline), **run)
    assert whole.returncode == 0, whole.stderr
    output = tmp_path / "killed"
    parts = tmp_path / "killed.unfinished" / "parts"
    kept = {}
    for pattern, count in (("images-*.json", 2), ("prompts-*.json", 1)):
        process = subprocess.Popen(
            command(rehearsal_source, output, tiny_pipeline),
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while len(list(parts.glob(pattern))) < count:
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not output.exists()
        # What was finished before is not done again.
        for path, modified in kept.items():
            assert path.stat().st_mtime_ns == modified
        kept = {path: path.stat().st_mtime_ns for path in parts.iterdir() if path.suffix == ".json"}
    result = subprocess.run(command(rehearsal_source, output, tiny_pipeline), **run)
    assert result.returncode == 0, result.stderr
    assert not parts.exists()
    assert same_files(tmp_path / "whole", output)


def test_latents_are_posterior_samples_that_depend_on_the_image_only(tiny_pipeline, rehearsal_source, tmp_path):
    config = dataclasses.replace(TINY, encoders=EncodersConfig("sd3", 8))
    outputs = []
    for name, batch in (("one", 1), ("three", 3)):
        preprocess(rehearsal_source, tmp_path / name, dataclasses.replace(config, batch_size=batch), tiny_pipeline)
        outputs.append(Records(tmp_path / name))
    one, three = outputs
    for i in range(len(one.images)):
        # Batches of another size may round differently, here within float16's own rounding.
        np.testing.assert_allclose(one.images[i].latents, three.images[i].latents, atol=2e-3)
    row = one.images[0]
    with Image.open(rehearsal_source / row.name) as image:
        mode = SD3Codec(tiny_pipeline).encode(np.asarray(image.convert("RGB"))[None])[0]
    assert np.abs(row.latents - mode).max() > 0.05, "a sample is not the mode"


def test_unfinished_work_of_another_configuration(source, tmp_path):
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished" / "plan.json").write_text('{"config": {"dataset": "hpdv3"}}')
    with pytest.raises(RecordsError, match=r"unfinished work of another configuration \(changed: encoders, text_dtype"):
        preprocess(source, tmp_path / "out", TINY)
    shutil.rmtree(tmp_path / "out.unfinished")
    preprocess(source, tmp_path / "out", TINY)
    with pytest.raises(FileExistsError, match="exists already"):
        preprocess(source, tmp_path / "out", TINY)


def test_nothing_left_to_keep(source, tmp_path):
    bare = dataclasses.replace(TINY, min_area=10**6)
    with pytest.raises(
        RecordsError, match=r"no pairs are left for eval, train; left out: .* pair of an image too small"
    ):
        preprocess(source, tmp_path / "out", bare)
    preprocess(source, tmp_path / "out", TINY)  # nothing stands in the way of the corrected command


def test_full_disk(rehearsal_source, tiny_pipeline, tmp_path):
    """A file size limit stands in for the full disk; with the limit gone the same command finishes."""
    output = tmp_path / "out"
    limited = f"trap '' XFSZ; ulimit -f 24; exec {' '.join(command(rehearsal_source, output, tiny_pipeline))}"
    # The compilation cache is not what is tested; its files would exceed the limit.
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    run = {"cwd": ROOT, "capture_output": True, "text": True, "env": environment}
    result = subprocess.run(["bash", "-c", limited], **run)
    assert result.returncode == 2, result.stderr
    assert "error: cannot write" in result.stderr
    assert "File too large" in result.stderr
    assert "the same command goes on from there" in result.stderr
    assert "Traceback" not in result.stderr
    assert not output.exists()
    assert not list(tmp_path.rglob("*.partial-*")), "nothing half-written is left"
    result = subprocess.run(command(rehearsal_source, output, tiny_pipeline), **run)
    assert result.returncode == 0, result.stderr
    assert json.loads((output / "manifest.json").read_text())["pairs"]["train"]


def test_base_models_that_will_not_do(source, tiny_pipeline, tmp_path):
    config = dataclasses.replace(TINY, encoders=EncodersConfig("sd3", 8))
    from dinalrm_jax.mapping import ConfigError

    with pytest.raises(ConfigError, match="come from a Stable Diffusion 3 pipeline; name it"):
        preprocess(source, tmp_path / "out", config)
    with pytest.raises(ConfigError, match="has no model_index.json"):
        preprocess(source, tmp_path / "out", config, tmp_path)
    other = tmp_path / "sdxl"
    other.mkdir()
    (other / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    with pytest.raises(ConfigError, match="is a StableDiffusionXLPipeline, expected a StableDiffusion3Pipeline"):
        preprocess(source, tmp_path / "out", config, other)
    incomplete = shutil.copytree(tiny_pipeline, tmp_path / "incomplete")
    shutil.rmtree(incomplete / "text_encoder_3")
    with pytest.raises(FileNotFoundError, match="text_encoder_3"):
        preprocess(source, tmp_path / "out", config, incomplete)
    assert not list(tmp_path.glob("out*")), "refused before anything is written"
