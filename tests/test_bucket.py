"""A run whose workdir is in a bucket, against a server of Google's storage API; see `bucket_server`."""

import contextlib
import dataclasses
import importlib.util
import signal
import subprocess
import sys
import time

import fsspec
import jax.numpy as jnp
import numpy as np
import pytest

import dinalrm_jax as dina
from dinalrm_jax import align, train
from dinalrm_jax.config import (
    AlignConfig,
    FlowGRPOConfig,
    PolicyEvaluationConfig,
    ProfileConfig,
    RewardConfig,
    StageConfig,
    TrainConfig,
)
from dinalrm_jax.devices.mesh import MeshConfig
from dinalrm_jax.disk import Locked, as_path, bucket, is_whole, local_copy, lock, move, whole_directory, write_json
from dinalrm_jax.mapping import ConfigError, from_mapping
from dinalrm_jax.model.config import LoRAConfig
from dinalrm_jax.scenes.config import SceneCaptionsConfig
from dinalrm_jax.training.checkpoint import Checkpoints
from dinalrm_jax.training.metrics import MetricsLog, read_metrics
from dinalrm_jax.training.optimizer import make_optimizer
from dinalrm_jax.training.profiling import ProfileWindow
from dinalrm_jax.training.step import TrainState
from tests import tiny_run
from tests.conftest import ROOT
from tests.test_train import start, wait_for_step

for needed in ("gcsfs", "gcp_storage_emulator"):
    if importlib.util.find_spec(needed) is None:  # to import gcsfs here would be before it is told about the server
        pytest.skip(f"needs {needed}: pip install -e '.[test]'", allow_module_level=True)

SHORT = ("--config.generator.steps=20", "--config.reward.steps=60")
HOLD = """
import sys, time
from dinalrm_jax.disk import as_path, bucket, lock
bucket.RENEWED = 0.1
with lock(as_path(sys.argv[1])):
    print("holding", flush=True)
    time.sleep(60)
"""


@pytest.fixture(scope="module", autouse=True)
def server(tmp_path_factory):
    """The storage's address, where gcsfs, google-cloud-storage and tensorstore look for it; so do processes."""
    command = [sys.executable, "-m", "tests.bucket_server"]
    with (
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process,
        pytest.MonkeyPatch.context() as patch,
    ):
        url = process.stdout.readline().strip()
        patch.setenv("STORAGE_EMULATOR_HOST", url)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # kinds of buckets that the emulator has not
        patch.setenv("FSSPEC_GCS_TOKEN", "anon")  # or gcsfs asks around for credentials first
        patch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})  # the same, as fsspec may be imported already
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield url
        process.kill()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(undisturbed local workdir, the bucket's, what its two processes printed): one was stopped, one went on."""
    directory = tmp_path_factory.mktemp("runs")
    local, workdir = directory / "local", as_path("gs://bucket/runs/tiny")
    undisturbed = start(local, *SHORT)
    flags = (*SHORT, f"--config.data={directory / 'data'}")
    first = start(workdir, *flags)
    wait_for_step(first, workdir, "reward", 20)
    first.send_signal(signal.SIGTERM)
    outputs = [first.communicate(timeout=60)]
    assert first.returncode == 128 + signal.SIGTERM, outputs
    assert not is_whole(workdir / "model")
    second = start(workdir, *flags)
    outputs.append(second.communicate(timeout=300))
    assert second.returncode == 0, outputs
    _, err = undisturbed.communicate(timeout=300)
    assert undisturbed.returncode == 0, err
    return local, workdir, outputs


@pytest.mark.heavy
def test_a_run_stopped_and_resumed_in_a_bucket_ends_as_an_undisturbed_local_one(runs):
    local, workdir, ((_, told), (resumed, _)) = runs
    assert "stopped by SIGTERM after reward step" in told
    assert "reward: continuing from the checkpoint of step" in resumed
    for name in ("trained.safetensors", "backbone.safetensors", "config.json"):
        assert (workdir / "model" / name).read_bytes() == (local / "model" / name).read_bytes(), name
    for name in ("report.md", "results.json"):
        assert (workdir / "report" / name).read_text() == (local / "report" / name).read_text(), name
    assert (workdir / "report" / "pairs.png").read_bytes() == (local / "report" / "pairs.png").read_bytes()
    for stage in ("generator", "reward"):
        found, expected = read_metrics(workdir, stage), read_metrics(local, stage)
        # (The first losses after the stop are means of fewer steps.)
        assert [(row["step"], row.get("eval_accuracy")) for row in found] == [
            (row["step"], row.get("eval_accuracy")) for row in expected
        ]
        assert found[-1]["loss"] == expected[-1]["loss"]
    events = [len(list((workdir / "tensorboard" / stage).iterdir())) for stage in ("generator", "reward")]
    assert events == [1, 2]
    assert not list(workdir.glob(".*.lock"))
    assert not list(workdir.parent.glob(".*.lock"))


def test_a_bucket_s_models_and_checkpoints_are_read(runs):
    local, workdir, _ = runs
    for checkpoint in ("model", "reward/best", "reward/checkpoints/60"):
        found = dina.RewardModel.from_pretrained(str(workdir / checkpoint), dtype="float32").params
        expected = dina.RewardModel.from_pretrained(local / checkpoint, dtype="float32").params
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array, err_msg=f"{checkpoint}: {name}")
    with pytest.raises(FileNotFoundError, match="no directory gs://bucket/runs/none"):
        dina.RewardModel.from_pretrained("gs://bucket/runs/none")


@pytest.mark.heavy
def test_an_alignment_in_a_bucket(runs):
    """On the bucket's own backbone and reward model; a longer run takes the place of the shorter one's policy."""
    config = AlignConfig(
        "tiny", str(runs[1] / "generator" / "backbone"), RewardConfig(str(runs[1] / "model")),
        StageConfig(8, 1, evaluate_every=1), scenes=SceneCaptionsConfig(8),
        flow_grpo=FlowGRPOConfig(steps=2, window=1, last=1, group=4), lora=LoRAConfig(2, 4.0),
        height=32, width=32, evaluation=PolicyEvaluationConfig(prompts=2, steps=2), mesh=MeshConfig(data=1),
    )  # fmt: skip
    workdir = as_path("gs://bucket/runs/aligned")
    for steps in (1, 2):
        align.run(dataclasses.replace(config, tuning=dataclasses.replace(config.tuning, steps=steps)), workdir)
    assert is_whole(workdir / "policy")
    assert (workdir / "policy" / "pytorch_lora_weights.safetensors").exists()
    assert [row["step"] for row in read_metrics(workdir, "tuning")] == [1, 2]
    assert sorted(path.name for path in (workdir / "pictures").iterdir()) == ["000001.png", "000002.png"]
    for name in ("policy.json", "before_after.png", "curves.png", "pictures.png"):
        assert (workdir / name).exists(), name


@pytest.fixture
def holder(request):
    """(a process that holds a directory of the bucket, the directory)."""
    target = as_path(f"gs://bucket/held/{request.node.name}")
    command = [sys.executable, "-c", HOLD, str(target)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "holding\n"
        yield process, target
        process.kill()


def test_a_second_run_on_a_workdir_that_another_holds_is_refused_in_one_line(holder, tmp_path):
    process, workdir = holder
    second = start(workdir, f"--config.data={tmp_path / 'data'}")
    out, err = second.communicate(timeout=120)
    assert second.returncode == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {workdir} is being written by ")
    assert f"process {process.pid}, since 20" in line
    assert "Traceback" not in err
    assert "watching for at most 60 s whether it lives" in out
    assert not (tmp_path / "data").exists()


def test_a_dead_process_s_lease_is_taken_over(holder, monkeypatch):
    process, target = holder
    process.kill()
    process.wait()
    monkeypatch.setattr(bucket, "STALE", 0.5)
    monkeypatch.setattr(bucket, "RENEWED", 0.1)
    said = []
    started = time.monotonic()
    with lock(target, said.append):
        assert time.monotonic() - started > 0.5
        with pytest.raises(Locked), lock(target):
            pass
    assert len(said) == 1
    assert not list(target.parent.glob(f".{target.name}.lock"))


def test_a_process_whose_lease_was_taken_over_ends(holder, monkeypatch):
    """It stood still, and whatever it writes now would go into the other's run."""
    process, target = holder
    process.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(bucket, "STALE", 0.5)
    monkeypatch.setattr(bucket, "RENEWED", 0.1)
    with lock(target):
        process.send_signal(signal.SIGCONT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert f"error: {target} was taken over by another process" in err


def test_a_directory_is_there_once_all_of_it_is(monkeypatch):
    target = as_path("gs://bucket/whole/out")

    def killed(directory):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bucket, "_mark", killed)
        with pytest.raises(KeyboardInterrupt), whole_directory(target) as directory:
            (directory / "old").write_text("x")
    assert (target / "old").exists()
    assert not is_whole(target)
    with pytest.raises(ZeroDivisionError), whole_directory(target) as directory:
        (directory / "half").write_text(str(1 / 0))
    with whole_directory(target) as directory:
        (directory / "sub").mkdir()
        (directory / "sub" / "new").write_text("y")
    assert is_whole(target)
    with pytest.raises(FileExistsError, match="choose another output"), whole_directory(target):
        pass
    copy = local_copy(target, ["sub/*"])
    assert [str(path.relative_to(copy)) for path in copy.rglob("*")] == ["sub", "sub/new"], "what was left is gone"
    assert local_copy(target, ["sub/*"]) == copy
    (target / "sub" / "new").write_text("z")
    assert (local_copy(target, ["sub/*"]) / "sub" / "new").read_text() == "z", "another version is another copy"

    moved = target.with_name("moved")
    with monkeypatch.context() as patch:
        patch.setattr(bucket, "_mark", killed)
        with pytest.raises(KeyboardInterrupt):
            move(target, moved)
    assert is_whole(target)
    assert not is_whole(moved)
    move(target, moved)
    assert (moved / "sub" / "new").read_text() == "z"
    assert is_whole(moved)
    assert not target.exists()


def test_a_log_in_a_bucket_is_written_now_and_then_and_when_it_matters(monkeypatch):
    workdir = as_path("gs://bucket/log/run")
    write_json(workdir / "config.json", {})

    def line(log, step):
        log.add(step, {"loss": np.float32(1), "finite": np.bool_(True)}, {"pairs": 1}, waited=0.0, flops=0.0)
        log.write(step, {})

    for first in (1, 5):
        log = MetricsLog(workdir, "reward")
        line(log, first)
        assert [row["step"] for row in read_metrics(workdir, "reward")] == list(range(1, first))
        log.publish()
        line(log, first + 1)
        log.write_values(first + 2, {"eval_accuracy": 0.5})
        assert read_metrics(workdir, "reward")[-1]["step"] == first + 2
        line(log, first + 3)
        log.close()
    assert [row["step"] for row in read_metrics(workdir, "reward")] == list(range(1, 9))


def test_a_damaged_checkpoint_in_a_bucket_is_put_aside(capsys):
    directory = as_path("gs://bucket/damaged/checkpoints")
    optimizer = make_optimizer(from_mapping(TrainConfig, tiny_run.get_config()).reward.optimizer, 10)
    like = TrainState.create({"head.a": jnp.zeros(3)}, optimizer)
    checkpoints = Checkpoints(directory)
    for step in (1, 2):
        checkpoints.save(dataclasses.replace(like, step=jnp.array(step)), {"step": step})
    checkpoints.close()
    for path in (directory / "2" / "state").glob("*/d"):
        path.rmtree()
    (directory / "2" / "state" / "d").rmtree()
    state, position = Checkpoints(directory).restore_latest(like)
    assert (int(state.step), position) == (1, {"step": 1})
    assert f"it is now {directory.parent / 'damaged-2'}" in capsys.readouterr().out
    assert [path.name for path in directory.iterdir()] == ["1"]
    assert (directory.parent / "damaged-2").is_dir()


def test_a_profile_in_a_bucket():
    directory = as_path("gs://bucket/profiled/profile")
    with contextlib.closing(ProfileWindow(directory, ProfileConfig(start=0, steps=1))) as window:
        window.before(1)
        window.after(1, jnp.ones(3) + 1)
    assert (directory / "plugins" / "profile").is_dir()


def test_what_a_bucket_cannot_be(monkeypatch):
    """Each is one line, before any work."""
    config = from_mapping(TrainConfig, tiny_run.get_config())
    workdir = as_path("gs://bucket/refused")
    with pytest.raises(ConfigError, match=r"gs://bucket/refused/data is in a bucket.*gcsfuse --implicit-dirs bucket"):
        train.run(config, workdir)
    with pytest.raises(ConfigError, match=r"mount the bucket .* set data to a directory there, ~/other/hpdv3"):
        train.run(dataclasses.replace(config, data="gs://other/hpdv3"), workdir)
    assert not workdir.exists()
    with pytest.raises(ConfigError, match="gs://bucket/ is a whole bucket; name a directory in it"):
        as_path("gs://bucket/")
    with pytest.raises(OSError, match="cannot write gs://nowhere/run: .*404.*is the bucket's name right"):
        train.run(config, as_path("gs://nowhere/run"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"gcsfs, which is missing: pip install -e '\.\[gcs\]'"):
        as_path("gs://bucket/run")
