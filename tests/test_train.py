"""The train command: a real process, real signals, and what it leaves behind."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import dinalrm_jax as dina
from dinalrm_jax import train
from dinalrm_jax.config import EnsembleTermConfig, ProfileConfig, SweepConfig, TrainConfig
from dinalrm_jax.convert import convert
from dinalrm_jax.data import records
from dinalrm_jax.data.config import MixedConfig
from dinalrm_jax.data.records import Records, RecordsError
from dinalrm_jax.disk import Locked, lock
from dinalrm_jax.evaluation.run_report import comparison_table, sweep_table
from dinalrm_jax.mapping import ConfigError, from_mapping
from dinalrm_jax.model.reward import is_trainable, reward_functional
from dinalrm_jax.model.tables import WeightsError
from dinalrm_jax.noise import NoiseDraw, draw_noise
from dinalrm_jax.training.checkpoint import BestCheckpoint, CheckpointError, Checkpoints
from dinalrm_jax.training.metrics import NonFiniteLoss, read_metrics
from dinalrm_jax.training.optimizer import learning_rate_schedule, make_optimizer
from dinalrm_jax.training.preflight import check_records
from dinalrm_jax.training.profiling import ProfileWindow
from dinalrm_jax.training.setup import set_up
from dinalrm_jax.training.step import TrainState
from dinalrm_jax.training.sweep import against_first
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
    optimizer = from_mapping(TrainConfig, tiny_run.get_config()).reward.optimizer
    rate = learning_rate_schedule(optimizer, 150)
    for row in history:
        if "loss" in row:
            assert row["learning_rate"] == pytest.approx(float(rate(row["step"] - 1))), "that of the step's update"


def scores_of(model, records, levels):
    """(levels, pairs, 2) scores of the held-out pairs, chosen first, each image with its own noise."""
    out = []
    for pair in records.pairs("eval"):
        images = [records.images[i] for i in (pair.chosen, pair.rejected)]
        latents = np.stack([image.latents for image in images]).astype(np.float32)
        text = records.prompts[pair.prompt]
        prompt = dina.PromptEmbeds(np.stack(2 * [text.prompt_embeds]), np.stack(2 * [text.pooled_prompt_embeds]))
        noise = draw_noise(NoiseDraw(0).keys([image.name for image in images]), latents.shape)
        out.append([model.score_latents(latents, prompt, level, noise) for level in levels])
    return np.array(out).transpose(1, 0, 2)


def test_the_saved_model_scores_what_the_report_says(finished):
    """At single levels and of the ensemble, and it is the average of the last step's checkpoint."""
    workdir, _ = finished
    model = dina.RewardModel.from_pretrained(workdir / "model", dtype="float32")
    levels = {"0.2": 0.2, "0.7": 0.7, "ensemble 0.2 0.5 0.7": (0.2, 0.5, 0.7)}
    scores = scores_of(model, Records(workdir / "data"), levels.values())
    results = json.loads((workdir / "report" / "results.json").read_text())
    for name, (chosen, rejected) in zip(levels, scores.transpose(0, 2, 1)):
        assert results[name]["all"] == pytest.approx(np.mean(chosen > rejected), abs=1e-6)
    assert model.likelihood == from_mapping(TrainConfig, tiny_run.get_config()).loss
    assert f"The model (weights {model.digest}) is that of the last step" in (workdir / "report/report.md").read_text()
    generator = load_file(workdir / "generator" / "backbone" / "backbone.safetensors")
    name = "transformer_blocks.0.attn.to_q.weight"
    np.testing.assert_array_equal(model.params[f"backbone.{name}"], generator[name])

    last = dina.RewardModel.from_pretrained(workdir / "reward" / "checkpoints" / "150", dtype="float32")
    for name, array in model.params.items():
        np.testing.assert_array_equal(array, last.params[name], err_msg=name)
    assert model.image_sizes == last.image_sizes == ((tiny_run.get_config().scenes.image_size,) * 2,)
    saved = ocp.PyTreeCheckpointer().restore(workdir / "reward" / "checkpoints" / "150" / "state")
    name = "head.ff.0.weight"
    np.testing.assert_array_equal(model.params[name], saved["ema"][name])
    assert np.abs(saved["ema"][name] - saved["params"][name]).max() > 1e-5, "the average is not the parameters"


def test_the_best_checkpoint_is_kept_and_can_be_scored_and_exported(finished, tmp_path):
    workdir, out = finished
    evaluated = [row for row in read_metrics(workdir, "reward") if "eval_accuracy" in row]
    accuracy = max(row["eval_accuracy"] for row in evaluated)
    step = next(row["step"] for row in evaluated if row["eval_accuracy"] == accuracy)
    (best,) = (workdir / "reward" / "best").iterdir()
    assert best.name == str(step)
    assert f"the first with the highest accuracy has {100 * accuracy:.1f} % at sigma 0.4: reward/best/{step}" in out
    model = dina.RewardModel.from_pretrained(best.parent, dtype="float32")
    (scores,) = scores_of(model, Records(workdir / "data"), [0.4])
    assert np.mean(scores[:, 0] > scores[:, 1]) == pytest.approx(accuracy)
    model.export_released(tmp_path / "released")
    assert (tmp_path / "released" / "checkpoint" / "rm_head.pt").is_file()
    with pytest.raises(ConfigError, match="not the checkpoint of a reward model, but of another stage"):
        dina.RewardModel.from_pretrained(workdir / "generator" / "checkpoints" / "40")
    with pytest.raises(ConfigError, match="holds checkpoints of several steps; name one of them: 140, 150"):
        dina.RewardModel.from_pretrained(workdir / "reward" / "checkpoints")
    with pytest.raises(ConfigError, match="is the directory of a training run; its model, once it is through, is"):
        dina.RewardModel.from_pretrained(workdir)
    convert(
        "native", checkpoint=str(best), base_model=None, output=str(tmp_path / "native"), dtype="float32", verify=False
    )
    again = dina.RewardModel.from_pretrained(tmp_path / "native", dtype="float32")
    np.testing.assert_array_equal(again.params["head.ff.0.weight"], model.params["head.ff.0.weight"])


@pytest.mark.heavy
def test_a_checkpoint_is_of_the_base_model_that_its_run_had(config, finished, tmp_path):
    """Wherever that lies now, and not of another one that lies in its place."""
    base = shutil.copytree(finished[0] / "generator" / "backbone", tmp_path / "base")
    reward = dataclasses.replace(config.reward, steps=1)
    train.run(dataclasses.replace(config, scenes=None, base_model=str(base), reward=reward), tmp_path / "run")
    checkpoint = tmp_path / "run" / "reward" / "checkpoints" / "1"
    expected = dina.RewardModel.from_pretrained(tmp_path / "run" / "model", dtype="float32").params
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError):
        dina.RewardModel.from_pretrained(checkpoint)
    found = dina.RewardModel.from_pretrained(checkpoint, moved, dtype="float32").params
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    weights = {name: array + 1 for name, array in load_file(moved / "backbone.safetensors").items()}
    save_file(weights, moved / "backbone.safetensors")
    with pytest.raises(WeightsError, match="holds other weights than the run began with"):
        dina.RewardModel.from_pretrained(checkpoint, moved)


def test_the_best_checkpoint_across_starts(tmp_path, capsys):
    """A replay on another mesh may round otherwise: then an earlier step, or the same, may be the best after all."""
    optimizer = make_optimizer(from_mapping(TrainConfig, tiny_run.get_config()).reward.optimizer, 10)

    def state(step):
        return dataclasses.replace(TrainState.create({"head.a": jnp.full(3, step)}, optimizer), step=jnp.array(step))

    def offered(*offers):
        best = BestCheckpoint(tmp_path / "best")
        for step, accuracy in offers:
            best.offer(state(step), accuracy)
        best.close()
        (saved,) = (tmp_path / "best").iterdir()
        return best.step, best.accuracy, int(saved.name)

    assert offered((10, 0.6), (20, 0.7), (30, 0.7)) == (20, 0.7, 20)
    assert offered((20, 0.7)) == (20, 0.7, 20)
    assert offered((15, 0.8)) == (15, 0.8, 15)
    assert offered((15, 0.9)) == (15, 0.9, 15)
    (position,) = (tmp_path / "best" / "15" / "loader").rglob("metadata")
    position.write_text("")
    assert offered((20, 0.5)) == (20, 0.5, 20)
    assert "checkpoint" in (said := capsys.readouterr().out)
    assert f"is damaged; it is now {tmp_path / 'damaged-15'}" in said


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


def replaced(config, path, value):
    """The configuration with one value changed, by its dotted name."""
    head, _, rest = path.partition(".")
    return dataclasses.replace(config, **{head: replaced(getattr(config, head), rest, value) if rest else value})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("reward.optimizer.learning_rate", 2e-3),
        ("reward.optimizer.ema_decay", 0.5),
        ("reward.batch_size", 4),
        ("execution.dtype", "bfloat16"),
        ("seed", 1),
        ("evaluation.sigma", 0.3),
        ("loss.k", 1.0),
        ("model.lora.alpha", 3.0),
        ("reward.sigma.distribution", "power"),
        ("ensemble_term", EnsembleTermConfig()),
        ("evaluation.seed", 1),
        ("evaluation.max_pairs", 3),
        ("init_from", "another/model"),
        ("base_model", "a/base"),
    ],
)
def test_a_value_that_decides_the_result_needs_another_workdir(config, tmp_path, path, value):
    """Among them weights to start from that were not named before: only their place may change."""
    config = dataclasses.replace(config, scenes=None)
    claim_workdir(tmp_path, config, {})
    with pytest.raises(ConfigError, match=rf"changed: {path} \("):
        claim_workdir(tmp_path, replaced(config, path, value), {})


def test_a_mixture_needs_no_data_beside_it(config, finished, tmp_path):
    mixture = (MixedConfig(str(finished[0] / "data"), 2.0),)
    setup = set_up(dataclasses.replace(config, data=None, scenes=None, mixture=mixture), tmp_path / "run")
    assert len(setup.records.pairs("train")) == tiny_run.get_config().scenes.train_pairs


def test_another_weight_of_a_mixture_needs_another_workdir_and_another_place_does_not(config, tmp_path):
    def mixed(data, weight):
        return dataclasses.replace(config, data=None, scenes=None, mixture=(MixedConfig(data, weight),))

    claim_workdir(tmp_path, mixed("a", 1.0), {"data": "0123"})
    claim_workdir(tmp_path, mixed("b", 1.0), {"data": "0123"})
    with pytest.raises(ConfigError, match=r"changed: mixture.0.weight \(1.0 -> 2.0\)"):
        claim_workdir(tmp_path, mixed("b", 2.0), {"data": "0123"})


def test_a_finished_generator_is_not_trained_longer(finished, tmp_path):
    config = from_mapping(TrainConfig, tiny_run.get_config())
    constant = replaced(config, "generator.optimizer.schedule", "constant")
    longer = replaced(constant, "generator.steps", 80)
    claim_workdir(tmp_path, constant, {})
    claim_workdir(tmp_path, longer, {})
    (tmp_path / "generator" / "backbone").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"generator.steps \(80 -> 90\)"):
        claim_workdir(tmp_path, replaced(constant, "generator.steps", 90), {})


def test_what_a_run_began_with_is_not_forgotten(config, tmp_path):
    """A start that is refused early, or knows fewer inputs, leaves their fingerprints."""
    claim_workdir(tmp_path, config, {"data": "0123"})
    claim_workdir(tmp_path, config, {})
    with pytest.raises(ConfigError, match="the contents of data"):
        claim_workdir(tmp_path, config, {"data": "4567"})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("reward.log_every", 1),
        ("reward.checkpoint_every", 2),
        ("reward.evaluate_every", 6),
        ("reward.micro_batches", 2),
        ("evaluation.batch_size", 4),
        ("evaluation.levels", (0.1, 0.9)),
        ("data", "moved/elsewhere"),
        ("execution.remat", "block"),
        ("mesh.data", 4),
        ("name", "renamed"),
    ],
)
def test_a_value_that_does_not_decide_the_result_may_change(config, tmp_path, path, value):
    first = claim_workdir(tmp_path, config, {"data": "0123"})
    assert claim_workdir(tmp_path, replaced(config, path, value), {"data": "0123"}) == first


def test_a_sweep_may_have_more_seeds_and_log_otherwise(config, tmp_path):
    sweep = SweepConfig("s", (config,), (0, 1))
    claim_workdir(tmp_path, sweep, {})
    claim_workdir(tmp_path, SweepConfig("s", (replaced(config, "reward.log_every", 2),), (0, 1, 2)), {})
    for other in (SweepConfig("s", (config,), (0, 3, 2)), SweepConfig("s", (replaced(config, "seed", 4),), (0, 1, 2))):
        with pytest.raises(ConfigError, match="would end otherwise"):
            claim_workdir(tmp_path, other, {})


def test_more_steps_go_on_where_the_learning_rate_does_not_know_the_end(config, tmp_path):
    constant, cosine = (changed(config, schedule=schedule) for schedule in ("constant", "cosine"))
    claim_workdir(tmp_path / "constant", constant, {})
    claim_workdir(tmp_path / "constant", replaced(constant, "reward.steps", 100), {})
    claim_workdir(tmp_path / "cosine", cosine, {})
    with pytest.raises(ConfigError, match=r"reward.steps \(12 -> 100\)"):
        claim_workdir(tmp_path / "cosine", replaced(cosine, "reward.steps", 100), {})


def test_a_new_key_with_its_default_and_other_contents(config, tmp_path):
    """What an older version wrote lacks a key; what is read is known by its contents."""
    claim_workdir(tmp_path, config, {"data": "0123"})
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    del values["config"]["reward"]["micro_batches"]
    path.write_text(json.dumps(values))
    claim_workdir(tmp_path, config, {"data": "0123"})
    with pytest.raises(ConfigError, match="changed: the contents of data"):
        claim_workdir(tmp_path, config, {"data": "4567"})
    path.write_text(json.dumps({"name": "of another version"}))
    with pytest.raises(ConfigError, match="not the configuration of a run that this version can continue"):
        claim_workdir(tmp_path, config, {})


def test_swapped_labels_are_other_data_and_a_moved_set_is_the_same(finished, tmp_path):
    moved = Records(shutil.copytree(finished[0] / "data", tmp_path / "moved"))
    assert moved.fingerprint == Records(finished[0] / "data").fingerprint
    # So many that the one which is swapped lies on no page of the file's beginning or middle.
    pairs = {split: [pair for pair in list(moved.pairs(split))[:4] for _ in range(2000)] for split in ("train", "eval")}
    swapped = {split: list(rows) for split, rows in pairs.items()}
    place = 6001
    other = swapped["train"][place]
    swapped["train"][place] = dataclasses.replace(other, chosen=other.rejected, rejected=other.chosen)
    brighter = [dataclasses.replace(image, latents=image.latents + 1) for image in moved.images]
    for name, rows, images in (
        ("same", pairs, moved.images), ("swapped", swapped, moved.images), ("brighter", pairs, brighter),
    ):  # fmt: skip
        records.write(
            tmp_path / name,
            images=list(images),
            prompts=list(moved.prompts),
            pairs=rows,
            encoders=moved.encoders,
            downsampling=8,
            source=moved.manifest["source"],
        )
    same = Records(tmp_path / "same").fingerprint
    assert Records(shutil.copytree(tmp_path / "same", tmp_path / "copy")).fingerprint == same
    for name in ("swapped", "brighter"):
        assert Records(tmp_path / name).fingerprint != same


def test_a_run_goes_on_from_another_model(config, finished, tmp_path):
    """LoRA and head start as they are there, on that model's own backbone; without learning they stay."""
    still = changed(config, learning_rate=0.0, weight_decay=0.0)
    still = dataclasses.replace(still, scenes=None, init_from=str(finished[0] / "model"))
    train.run(dataclasses.replace(still, reward=dataclasses.replace(still.reward, steps=2)), tmp_path / "run")
    first, then = (
        dina.RewardModel.from_pretrained(d / "model", dtype="float32") for d in (finished[0], tmp_path / "run")
    )
    for name, array in first.params.items():
        np.testing.assert_allclose(then.params[name], array, atol=1e-6, err_msg=name)
    checkpoint = tmp_path / "run" / "reward" / "checkpoints" / "2"
    with pytest.raises(ConfigError, match="which removes it in time; make a model of it first"):
        train.run(dataclasses.replace(still, init_from=str(checkpoint)), tmp_path / "other")
    found = dina.RewardModel.from_pretrained(checkpoint, dtype="float32").params
    np.testing.assert_array_equal(
        found["backbone.context_embedder.weight"], then.params["backbone.context_embedder.weight"]
    )
    changed_start = shutil.copytree(finished[0] / "model", tmp_path / "changed")
    weights = {name: array + 1 for name, array in load_file(changed_start / "backbone.safetensors").items()}
    save_file(weights, changed_start / "backbone.safetensors")
    claim = json.loads((tmp_path / "run" / "config.json").read_text())
    claim["config"]["init_from"] = str(changed_start)
    (tmp_path / "run" / "config.json").write_text(json.dumps(claim))
    with pytest.raises(WeightsError, match="init_from .*changed holds other weights than the run began with"):
        dina.RewardModel.from_pretrained(checkpoint)
    other = dataclasses.replace(still, model=dataclasses.replace(still.model, lora=None))
    with pytest.raises(
        ConfigError, match=r"init_from .* is another model than the config's: lora is \{.*, in the config"
    ):
        train.run(other, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.heavy
def test_a_longer_run_keeps_the_shorter_ones_model(config, tmp_path, capsys):
    """And a run in epochs says how many steps they are."""
    constant = changed(config, schedule="constant", warmup_steps=0)
    short = dataclasses.replace(constant, reward=dataclasses.replace(constant.reward, steps=None, epochs=0.25))
    train.run(short, tmp_path / "run")
    assert "reward: 0.25 epochs of 64 pairs are 2 steps of 8" in capsys.readouterr().out
    train.run(dataclasses.replace(short, reward=dataclasses.replace(short.reward, epochs=0.5)), tmp_path / "run")
    assert "continuing from the checkpoint of step 2" in capsys.readouterr().out
    history = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert history.count("eval_accuracy") == 2, "an evaluation that is in the log is not made again"
    (tmp_path / "run" / "metrics.jsonl").unlink()
    shutil.rmtree(tmp_path / "run" / "reward" / "best")
    train.run(dataclasses.replace(short, reward=dataclasses.replace(short.reward, epochs=0.5)), tmp_path / "run")
    (row,) = read_metrics(tmp_path / "run", "reward")
    assert row["step"] == 4, "as after a kill between the save of a step and its evaluation"
    assert "eval_accuracy" in row
    assert [path.name for path in (tmp_path / "run" / "reward" / "best").iterdir()] == ["4"]
    whole = dataclasses.replace(constant, reward=dataclasses.replace(constant.reward, steps=4))
    train.run(whole, tmp_path / "whole")
    models = [tmp_path / "run" / "model", tmp_path / "run" / "model_step_2", tmp_path / "whole" / "model"]
    longer, shorter, undisturbed = ((model / "trained.safetensors").read_bytes() for model in models)
    assert longer == undisturbed != shorter
    with pytest.raises(ConfigError, match="is at step 4 already, beyond the 2 asked for"):
        train.run(short, tmp_path / "run")


def test_two_processes_do_not_train_in_one_workdir(config, tmp_path):
    with lock(tmp_path / "run"), pytest.raises(Locked, match="run is being written by .* process"):
        train.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_one_message(finished, tmp_path):
    """On a file system of its own, which has room for the first checkpoint and not for all."""
    flags = f"--config.generator=None --config.scenes=None --config.data={finished[0] / 'data'}"
    command = f"{sys.executable} -m dinalrm_jax.train --config tests/tiny_run.py --workdir {tmp_path}/run {flags}"
    mount = f"mount -t tmpfs -o size=900k tmpfs {tmp_path}"
    if subprocess.run(["unshare", "-rm", "bash", "-c", mount], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-c", f"{mount} && exec {command}"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    told = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip() and "%|" not in line]
    assert len(told) == 1, told
    assert re.match("error: .*[Nn]o space left on device", told[0])


def test_records_of_other_encoders_are_refused(config, finished, tmp_path):
    transformer = dataclasses.replace(config.model.transformer, joint_attention_dim=4096)
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, transformer=transformer))
    with pytest.raises(RecordsError, match=r"widths are \(16, 64, 64\), the model takes \(16, 4096, 64\)"):
        train.run(other, tmp_path / "run")
    encoders = dataclasses.replace(config.model.encoders, text_length=20)
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, encoders=encoders))
    with pytest.raises(RecordsError, match="made by other encoders.*'text_length': 16.* there.*'text_length': 20"):
        train.run(other, tmp_path / "run")
    with pytest.raises(RecordsError, match="is not there, or not a directory of records"):
        train.run(dataclasses.replace(config, data=str(tmp_path / "nothing"), scenes=None), tmp_path / "run")
    assert not (tmp_path / "run").exists(), "a refused start must not claim the workdir"
    scenes = dataclasses.replace(config.scenes, seed=9)
    with pytest.raises(RecordsError, match="holds other scenes than the config asks for"):
        train.run(dataclasses.replace(config, scenes=scenes), tmp_path / "run")


def test_records_of_an_earlier_version_are_the_same_scenes(config, tmp_path):
    """Their manifest lacks what has been added since; what was not said was as it is by default."""
    shutil.copytree(config.data, tmp_path / "data")
    path = tmp_path / "data" / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["source"]["scenes"].pop("two_groups") == 0.3
    path.write_text(json.dumps(manifest))
    check_records(Records(tmp_path / "data"), config, None)
    scenes = dataclasses.replace(config.scenes, two_groups=0.0)
    with pytest.raises(RecordsError, match="holds other scenes than the config asks for"):
        check_records(Records(tmp_path / "data"), dataclasses.replace(config, scenes=scenes), None)


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


def test_damaged_and_foreign_checkpoints(finished, tmp_path, capsys):
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
    assert not (copy / "999.orbax-checkpoint-tmp").exists()

    def damage(checkpoint):
        for path in (checkpoint / "state").rglob("*"):
            if path.is_file():
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    # A damaged one is put aside, and the one before it taken.
    damage(copy / latest.name)
    capsys.readouterr()
    checkpoints = Checkpoints(copy)
    restored, position = checkpoints.restore_latest(state)
    assert (int(restored.step), position["step"]) == (140, 140)
    assert f"{latest.name} is damaged; it is now {tmp_path / f'damaged-{latest.name}'}" in capsys.readouterr().out
    assert [path.name for path in copy.iterdir()] == ["140"]
    checkpoints.save(dataclasses.replace(restored, step=jnp.array(int(latest.name))), position)
    checkpoints.close()
    assert (copy / latest.name).is_dir(), "the step that was damaged can be saved again"
    damage(copy / latest.name)
    restored, _ = Checkpoints(copy).restore_latest(state)
    assert (tmp_path / f"damaged-{latest.name}-2").is_dir(), "damaged twice, both are kept"
    damage(copy / "140")
    with pytest.raises(CheckpointError, match="(?s)is damaged or of another model, and so is every other.*Remove"):
        Checkpoints(copy).restore_latest(state)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.reward.batch_size=0", "error: config.reward: batch_size must be at least 1, got 0"),
        ("--config.evaluation.ensemble=(0.2,1.5)", "levels must lie in [0, 1], got 1.5"),
        ("--config.reward.optimizer.learning_rte=1e-3", "unknown key 'learning_rte'; did you mean 'learning_rate'?"),
        ("--config.reward.learnin_rate=1e-3", "unknown key 'learnin_rate'; did you mean 'learning_rate'?"),
        ("--config.reward.steps=abc", "config.reward.steps must be an integer, got 'abc'"),
        ("--config=configs/nothing.py", "error: no config file configs/nothing.py"),
        ("--config.generatr=None", "unknown key 'generatr'; did you mean 'generator'?"),
        (
            "--config.init_from=nowhere",
            "would make another: set them to None (--config.generator=None)",
        ),
        ("--config.init_from=nowhere --config.generator=None", "error: no directory nowhere"),
        ("--config.generator=None --config.scenes=None", "name the directory of records with --config.data DIR"),
    ],
)
def test_command_line_errors_are_one_message(tmp_path, flag, message):
    out, err = (process := start(tmp_path / "run", *flag.split())).communicate(timeout=120)
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
    comparisons = json.loads((tmp_path / "sweep" / "comparisons.json").read_text())
    for level, found in comparisons["other noise"].items():
        expected = results["other noise"][0][level] - results["tiny"][0][level]
        assert found["difference"] == pytest.approx(expected)
    assert "Points of accuracy more than 'tiny'" in table
    (generator,) = (tmp_path / "sweep").rglob("generator/backbone")
    assert generator.parts[-3] == "generator_run"


def test_runs_are_compared_with_the_first():
    answers = {
        "a": [{"0": np.array([1, 1, 0, 0], bool), "0.4": np.zeros(4, bool)}] * 2,
        "b": [{"0": np.array([1, 1, 1, 0], bool)}, {"0": np.array([1, 1, 1, 1], bool)}],
    }
    found = against_first(answers, np.array([0, 0, 1, 1]))
    assert found.keys() == {"b"}
    assert found["b"].keys() == {"0"}
    assert (found["b"]["0"].difference, found["b"]["0"].by_seed) == (0.375, (0.25, 0.5))
    table = comparison_table(found, "a")
    assert f"| b | {found['b']['0']} |" in table


def test_sweep_table_has_mean_and_spread():
    table = sweep_table({"a": [{"0.4": 0.5}, {"0.4": 0.6}, {"0.4": 0.85}], "b": [{"0.4": 1.0}] * 3})
    assert "over 3 seeds" in table
    assert "| a | 65.0 ± 18.0 |" in table
    assert "| b | 100.0 ± 0.0 |" in table
