"""LRM through the commands: its empty prompt, and a run and an alignment that are killed and go on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file

import dinalrm_jax as dina
from configs import lrm
from dinalrm_jax import train
from dinalrm_jax.config import TrainConfig
from dinalrm_jax.encoders.load import load_prompt_encoder
from dinalrm_jax.mapping import from_mapping
from dinalrm_jax.model.encoding import EncodersConfig
from dinalrm_jax.model.lrm import LRMHeadConfig
from dinalrm_jax.training import run_weights
from tests import tiny_run
from tests.conftest import ROOT


def test_the_empty_prompt_is_the_text_encoders_and_is_encoded_once(tiny_pipeline, tmp_path, monkeypatch):
    config = lrm.get_config("smoke")
    config.model.encoders.text_length = 16
    config = from_mapping(TrainConfig, config)
    expected = load_prompt_encoder(EncodersConfig("sd3", 16), tiny_pipeline, config.execution.dtype)([""])
    for _ in range(2):
        found = run_weights.empty_prompt(config, str(tiny_pipeline), tmp_path)
        assert set(found) == {"head.unconditional_embeds", "head.unconditional_pooled"}
        np.testing.assert_allclose(found["head.unconditional_embeds"], expected.prompt_embeds, atol=1e-5)
        np.testing.assert_allclose(found["head.unconditional_pooled"], expected.pooled_prompt_embeds, atol=1e-5)
        assert found["head.unconditional_embeds"].any()
        monkeypatch.setattr(run_weights, "load_prompt_encoder", lambda *args: pytest.fail("encoded again"))


def test_a_model_learns_on_the_records_of_the_other_and_reports_alike(tmp_path):
    """The tiny run's scenes; nothing but the configuration is another."""
    config = tiny_run.get_config()
    config.model.update(visual_taps=(2,), text_taps=())
    config.model.head = ConfigDict({"kind": "lrm", "width": 16})
    config.loss = ConfigDict({"name": "bradley_terry"})
    config.prompt_weights = True
    config.generator.steps = 10
    config.reward.update(steps=40, evaluate_every=40)
    config = from_mapping(TrainConfig, config)
    assert isinstance(config.model.head, LRMHeadConfig)
    scores = train.run(config, tmp_path / "run")
    model = dina.RewardModel.from_pretrained(tmp_path / "run" / "model")
    assert model.likelihood.name == "bradley_terry"
    assert np.isfinite(scores.chosen).all()
    moved = load_file(tmp_path / "run" / "model" / "trained.safetensors")
    assert moved["head.log_scale"] != pytest.approx(np.log(1 / 0.07), abs=1e-4), "the scale trains"
    assert moved["head.unconditional_embeds"].any(), "and the empty prompt, which begins at zero here"
    results = json.loads((tmp_path / "run" / "report" / "results.json").read_text())
    assert {"all", "degraded", "prompt", "all, prompts exchanged"} <= results["0.2"].keys()


def run_killed_and_whole(module, config, step, tmp_path, prepare=lambda directory: None):
    """The directories of a command that was killed at a checkpoint and finished, and of one that was left alone."""
    found = []
    for name in ("killed", "whole"):
        directory = tmp_path / name
        directory.mkdir(parents=True)
        prepare(directory)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", module, "--config", str(ROOT / "configs" / config)]
        if name == "killed":
            process = subprocess.Popen(command, cwd=directory, stderr=subprocess.DEVNULL, env=environment)
            while not list(directory.glob(f"runs/*/{step}")) and process.poll() is None:
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
            assert process.wait(120) == -signal.SIGKILL
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        found.append(directory)
    return found


@pytest.mark.heavy
def test_the_rehearsal_is_killed_and_ends_in_the_same_bytes(tmp_path):
    """`configs/lrm.py:smoke`, then `configs/lpo.py:smoke` on what it left."""
    killed, whole = run_killed_and_whole("dinalrm_jax.train", "lrm.py:smoke", "reward/checkpoints/20", tmp_path / "lrm")
    for name in ("backbone", "trained"):
        ours, theirs = (load_file(run / "runs/lrm_smoke/model" / f"{name}.safetensors") for run in (killed, whole))
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)

    def with_reward(directory):
        shutil.copytree(whole / "runs", directory / "runs", dirs_exist_ok=True)

    both = run_killed_and_whole(
        "dinalrm_jax.align", "lpo.py:smoke", "tuning/checkpoints/1", tmp_path / "lpo", with_reward
    )
    ours, theirs = (load_file(run / "runs/lpo_smoke/policy/pytorch_lora_weights.safetensors") for run in both)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
    assert any(array.any() for name, array in theirs.items() if "lora_B" in name)
