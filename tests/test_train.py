"""The train command: a real process, real signals, and what it leaves behind."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import dinalrm_jax as dina
from dinalrm_jax import train
from dinalrm_jax.config import ConfigError, ProfileConfig, SweepConfig, TrainConfig, from_mapping
from dinalrm_jax.data.records import Records, RecordsError
from dinalrm_jax.reward_model import is_trainable, reward_functional
from dinalrm_jax.training.checkpoint import CheckpointError, Checkpoints
from dinalrm_jax.training.metrics import NonFiniteLoss, read_metrics
from dinalrm_jax.training.optimizer import make_optimizer
from dinalrm_jax.training.profiling import ProfileWindow
from dinalrm_jax.training.report import sweep_table
from dinalrm_jax.training.step import TrainState
from dinalrm_jax.training.workdir import claim_workdir
from tests import tiny_run
from tests.conftest import ROOT


def start(workdir, *flags):
    command = [sys.executable, "-m", "dinalrm_jax.train", "--config", "tests/tiny_run.py", "--workdir", str(workdir)]
    return subprocess.Popen(
        [*command, *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )


def wait_for_step(process, workdir, stage, step, limit=120):
    """Returns once the run has logged `step` of `stage`."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        if (workdir / "metrics.jsonl").exists():
            whole, _, _ = (workdir / "metrics.jsonl").read_text().rpartition("\n")
            lines = map(json.loads, whole.splitlines())
            if any(line["stage"] == stage and line["step"] >= step for line in lines):
                return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError(f"{stage} did not reach step {step} in {limit} s")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(workdir, stdout) of an undisturbed run."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    out, err = (process := start(workdir)).communicate(timeout=300)
    assert process.returncode == 0, err
    return workdir, out


def test_what_a_run_leaves(finished):
    workdir, out = finished
    report = (workdir / "report" / "report.md").read_text()
    assert report.strip() in out
    assert "| ensemble 0.2 0.5 0.7 |" in report
    for name in ("learning_curve", "accuracy_by_sigma", "pairs"):
        with Image.open(workdir / "report" / f"{name}.png") as image:
            assert np.asarray(image.convert("L")).std() > 5, f"{name}.png is blank"
    assert len(list((workdir / "tensorboard").rglob("events.*"))) == 2
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == {"generator", "reward"}
    history = read_metrics(workdir, "reward")
    assert [row["step"] for row in history if "loss" in row] == list(range(5, 151, 5))
    assert sum("eval_accuracy" in row for row in history) == 6
    assert history[-1]["loss"] < history[0]["loss"]


def test_the_saved_model_scores_what_the_report_says(finished):
    workdir, _ = finished
    model = dina.RewardModel.from_pretrained(workdir / "model", dtype="float32")
    records = Records(workdir / "data")
    right = []
    for pair in records.pairs("eval"):
        latents = np.stack([records.images[i].latents for i in (pair.chosen, pair.rejected)])
        text = records.prompts[pair.prompt]
        prompt = dina.PromptEmbeds(np.stack(2 * [text.prompt_embeds]), np.stack(2 * [text.pooled_prompt_embeds]))
        chosen, rejected = model.score_latents(latents.astype(np.float32), prompt, (0.2, 0.5, 0.7), seed=0)
        right.append(chosen > rejected)
    results = json.loads((workdir / "report" / "results.json").read_text())
    assert results["ensemble 0.2 0.5 0.7"]["all"] == pytest.approx(np.mean(right), abs=1e-6)


def test_killed_twice_ends_where_the_undisturbed_run_ends(finished, tmp_path):
    """SIGKILL in the generator, SIGTERM in the reward stage; the models are equal to the last bit."""
    workdir = tmp_path / "run"
    process = start(workdir)
    wait_for_step(process, workdir, "generator", 25)  # the save of step 20 waited for that of step 10
    process.send_signal(signal.SIGKILL)
    process.communicate()

    process = start(workdir)
    wait_for_step(process, workdir, "reward", 30)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert "generator: continuing from the checkpoint of step" in out
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "stopped by SIGTERM after reward step" in err
    assert "the same command continues from there" in err
    assert not (workdir / "model").exists()

    out, err = (process := start(workdir)).communicate(timeout=300)
    assert process.returncode == 0, err
    assert "reward: continuing from the checkpoint of step" in out
    for name in ("trained.safetensors", "backbone.safetensors"):
        undisturbed = (finished[0] / "model" / name).read_bytes()
        assert (workdir / "model" / name).read_bytes() == undisturbed, name
    again = (workdir / "report" / "results.json").read_text()
    assert again == (finished[0] / "report" / "results.json").read_text()


@pytest.fixture(scope="module")
def config(finished):
    """The tiny run on the finished run's records, without a generator, a few steps long."""
    base = from_mapping(TrainConfig, tiny_run.get_config())
    reward = dataclasses.replace(base.reward, steps=12, checkpoint_every=4, evaluate_every=12)
    return dataclasses.replace(base, data=str(finished[0] / "data"), generator=None, reward=reward)


def changed(config, **optimizer):
    reward = dataclasses.replace(config.reward, optimizer=dataclasses.replace(config.reward.optimizer, **optimizer))
    return dataclasses.replace(config, reward=reward)


def test_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(config, tmp_path):
    wild = changed(config, learning_rate=1e38, warmup_steps=8, max_grad_norm=1e9)
    wild = dataclasses.replace(wild, reward=dataclasses.replace(wild.reward, checkpoint_every=1))
    with pytest.raises(NonFiniteLoss, match=r"the loss of step \d+ is .*last good checkpoint is kept"):
        train.run(wild, tmp_path / "run")
    module = reward_functional(wild.model, wild.execution)
    params = {name: array for name, array in module.init(wild.seed).items() if is_trainable(name)}
    state = TrainState.create(params, make_optimizer(wild.reward.optimizer, wild.reward.steps))
    kept = Checkpoints(tmp_path / "run" / "reward" / "checkpoints").restore_latest(state)
    assert kept is not None
    assert all(np.isfinite(array).all() for tree in (kept[0].params, kept[0].ema) for array in tree.values())
    assert not (tmp_path / "run" / "model").exists()


def test_another_configuration_needs_another_workdir(config, tmp_path):
    claim_workdir(tmp_path, config)
    claim_workdir(tmp_path, config)
    with pytest.raises(ConfigError, match=r"changed: reward.optimizer.learning_rate \(0.001 -> 0.002\)"):
        claim_workdir(tmp_path, changed(config, learning_rate=2e-3))


def test_records_of_other_encoders_are_refused(config, finished, tmp_path):
    transformer = dataclasses.replace(config.model.transformer, joint_attention_dim=4096)
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, transformer=transformer))
    with pytest.raises(RecordsError, match=r"widths are \(16, 64, 64\), the model takes \(16, 4096, 64\)"):
        train.run(other, tmp_path / "run")
    encoders = dataclasses.replace(config.model.encoders, text_length=20)
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, encoders=encoders))
    with pytest.raises(RecordsError, match="made by other encoders.*'text_length': 16} there.*'text_length': 20}"):
        train.run(other, tmp_path / "run")
    with pytest.raises(RecordsError, match="no manifest.json"):
        train.run(dataclasses.replace(config, data=str(tmp_path / "nothing"), scenes=None), tmp_path / "run")
    assert not (tmp_path / "run").exists(), "a refused start must not claim the workdir"
    scenes = dataclasses.replace(config.scenes, seed=9)
    with pytest.raises(RecordsError, match="holds other scenes than the config asks for"):
        train.run(dataclasses.replace(config, scenes=scenes), tmp_path / "run")


def test_latents_of_another_vae_are_refused(config, finished, tiny_pipeline, tmp_path):
    other = dataclasses.replace(config, base_model=str(tiny_pipeline), scenes=None)
    data = shutil.copytree(finished[0] / "data", tmp_path / "data")
    manifest = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps(manifest | {"codec": "0123"}))
    with pytest.raises(RecordsError, match=r"holds latents of another VAE \(0123\) than that of .*sd3"):
        train.run(dataclasses.replace(other, data=str(data)), tmp_path / "run")


def test_profile_window(tmp_path):
    """Records the steps of the window that the run takes: resumed within it, and cut short."""
    window = ProfileWindow(tmp_path / "resumed", ProfileConfig(start=2, steps=3))
    for step in (4, 5, 6):
        window.before(step)
        window.after(step, jnp.ones(2) + step)
    assert list((tmp_path / "resumed").rglob("*.xplane.pb"))
    window = ProfileWindow(tmp_path / "cut", ProfileConfig(start=2, steps=3))
    window.before(2)
    assert not (tmp_path / "cut").exists()
    window.before(3)
    window.close()
    window.close()
    assert list((tmp_path / "cut").rglob("*.xplane.pb"))


def test_a_base_model_of_another_geometry_is_refused(config, finished, tmp_path):
    other = dataclasses.replace(config.model.transformer, num_layers=4)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, transformer=other),
        base_model=str(finished[0] / "generator" / "backbone"),
    )
    with pytest.raises(ConfigError, match="the config says"):
        train.run(config, tmp_path / "run")


def test_damaged_and_foreign_checkpoints_are_named(finished, tmp_path):
    source = finished[0] / "reward" / "checkpoints"
    latest = max(source.iterdir(), key=lambda path: int(path.name) if path.name.isdigit() else -1)
    optimizer = make_optimizer(from_mapping(TrainConfig, tiny_run.get_config()).reward.optimizer, 10)
    state = TrainState.create({"head.other": jnp.zeros(3)}, optimizer)
    with pytest.raises(CheckpointError, match=f"checkpoint .*{latest.name} is damaged or of another model"):
        Checkpoints(source).restore_latest(state)

    config = from_mapping(TrainConfig, tiny_run.get_config())
    params = reward_functional(config.model, config.execution).init(0)
    state = TrainState.create({name: array for name, array in params.items() if is_trainable(name)}, optimizer)
    copy = shutil.copytree(source, tmp_path / "checkpoints")
    # What an interrupted save leaves is not taken for a checkpoint.
    shutil.copytree(copy / latest.name, copy / "999.orbax-checkpoint-tmp")
    restored, _ = Checkpoints(copy).restore_latest(state)
    assert int(restored.step) == int(latest.name)
    for path in (copy / latest.name / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="(?s)is damaged or of another model.*Remove that directory"):
        Checkpoints(copy).restore_latest(state)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.reward.batch_size=0", "error: config.reward: batch_size must be at least 1, got 0"),
        ("--config.evaluation.ensemble=(0.2,1.5)", "levels must lie in [0, 1], got 0.4 and (0.2, 1.5)"),
        ("--config.reward.optimizer.learning_rte=1e-3", "unknown key 'learning_rte'; did you mean 'learning_rate'?"),
        ("--config.reward.learnin_rate=1e-3", "unknown key 'learnin_rate'; did you mean 'learning_rate'?"),
        ("--config=configs/nothing.py", "error: no config file configs/nothing.py"),
    ],
)
def test_command_line_errors_are_one_message(tmp_path, flag, message):
    out, err = (process := start(tmp_path / "run", flag)).communicate(timeout=120)
    assert process.returncode == 2
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


@pytest.mark.heavy
def test_a_sweep_shares_its_generator(tmp_path, capsys):
    base = from_mapping(TrainConfig, tiny_run.get_config())
    short = dataclasses.replace(
        base,
        generator=dataclasses.replace(base.generator, steps=2),
        reward=dataclasses.replace(base.reward, steps=2),
    )
    evaluation = dataclasses.replace(short.evaluation, seed=1)
    runs = (short, dataclasses.replace(short, name="other noise", evaluation=evaluation))
    train.run_sweep(SweepConfig(name="s", runs=runs, seeds=(3,)), tmp_path / "sweep")
    table = (tmp_path / "sweep" / "report.md").read_text()
    assert table in capsys.readouterr().out
    results = json.loads((tmp_path / "sweep" / "results.json").read_text())
    assert {name: [set(row) for row in rows] for name, rows in results.items()} == {
        "tiny": [{"0", "0.4", "ensemble 0.2 0.5 0.7"}],
        "other noise": [{"0", "0.4", "ensemble 0.2 0.5 0.7"}],
    }
    (generator,) = (tmp_path / "sweep").rglob("generator/backbone")
    assert generator.parts[-3] == "generator_run"


def test_sweep_table_has_mean_and_spread():
    table = sweep_table({"a": [{"0.4": 0.5}, {"0.4": 0.6}, {"0.4": 0.85}], "b": [{"0.4": 1.0}] * 3})
    assert "over 3 seeds" in table
    assert "| a | 65.0 ± 18.0 |" in table
    assert "| b | 100.0 ± 0.0 |" in table
