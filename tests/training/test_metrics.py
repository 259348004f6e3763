"""What a run's log holds of the steps between two writes."""

import json
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from dinalrm_jax.devices.chips import peak_flops
from dinalrm_jax.training.metrics import MetricsLog, NonFiniteLoss, read_metrics

UNITS = {"pairs": 4, "images": 8}


def step_metrics(loss, finite=1.0, share=(0.0, 0.0), accuracy=(0.0, 0.0)):
    """As a step gives them, with two bins of the noise level."""
    by_sigma = {"share_by_sigma": jnp.array(share), "accuracy_by_sigma": jnp.array(accuracy)}
    return {"loss": jnp.array(loss), "finite": jnp.array(finite), **by_sigma}


def test_a_line_holds_means_over_its_steps_and_accuracies_over_the_rows_of_a_bin(tmp_path):
    log = MetricsLog(tmp_path, "reward")
    log.start()
    log.add(1, step_metrics(1.0, share=(0.25, 0.75), accuracy=(0.25, 0.0)), UNITS, waited=0.5, flops=0.0)
    log.add(2, step_metrics(3.0, share=(0.5, 0.5), accuracy=(0.0, 0.5)), UNITS, waited=0.0, flops=0.0)
    values = log.write(2, {"learning_rate": 0.1})
    log.add(3, step_metrics(5.0, share=(1.0, 0.0), accuracy=(1.0, 0.0)), UNITS, waited=0.0, flops=0.0)
    log.write(3, {})
    log.close()
    assert values["loss"] == 2.0
    # Of the 3 rows of the first bin 1 was right, of the 5 of the second 2.
    assert values["accuracy/sigma_0.0_0.5"] == pytest.approx(1 / 3)
    assert values["accuracy/sigma_0.5_1.0"] == pytest.approx(2 / 5)
    assert values["data_wait_seconds"] == 0.25
    assert values["images_per_second"] == pytest.approx(2 * values["pairs_per_second"])
    first, second = read_metrics(tmp_path, "reward")
    assert (first["step"], first["learning_rate"], second["step"], second["loss"]) == (2, 0.1, 3, 5.0)
    assert "accuracy/sigma_0.5_1.0" not in second, "no row fell into that bin"


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (step_metrics(np.nan), "the loss of step 2 is nan; stopped"),
        (step_metrics(np.inf, finite=0.0), "the loss of step 2 is inf, its update is not finite; stopped"),
        (step_metrics(0.5, finite=0.0), "the loss of step 2 is 0.5, its update is not finite; stopped"),
    ],
)
def test_the_first_step_that_is_not_finite_is_named_and_nothing_is_written(tmp_path, metrics, message):
    log = MetricsLog(tmp_path, "reward")
    log.add(1, step_metrics(0.5), UNITS, waited=0.0, flops=0.0)
    log.add(2, metrics, UNITS, waited=0.0, flops=0.0)
    log.add(3, step_metrics(np.nan), UNITS, waited=0.0, flops=0.0)
    with pytest.raises(NonFiniteLoss, match=message):
        log.write(3, {})
    log.close()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_torn_line_does_not_swallow_the_next(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"stage": "reward", "step": 1, "loss": 1.0}) + '\n{"stage": "re')
    log = MetricsLog(tmp_path, "reward")
    log.write_values(2, {"loss": 2.0})
    log.close()
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path, "reward")] == [(1, 1.0), (2, 2.0)]


def test_runs_of_equal_names_are_different_runs_on_wandb(tmp_path, monkeypatch):
    """The three seeds of a sweep have workdirs of one name; a workdir that continues is one run."""
    started = []
    fake = types.SimpleNamespace(init=lambda **options: started.append(options))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for run, seed in (("aa", 0), ("bb", 1), ("aa", 0)):
        directory = tmp_path / f"seed{seed}" / "calibrated"
        directory.mkdir(parents=True, exist_ok=True)
        MetricsLog(directory, "reward", project="p", run=run)
    assert [options["id"] for options in started] == ["aa-reward", "bb-reward", "aa-reward"]
    assert {options["project"] for options in started} == {"p"}
    assert all(options["resume"] == "allow" for options in started)


def test_rates_are_of_training_alone(tmp_path, monkeypatch):
    """Ten seconds for two steps of four pairs, four of which were an evaluation's."""
    now = [100.0]
    monkeypatch.setattr("dinalrm_jax.training.metrics.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("dinalrm_jax.training.metrics.peak_flops", lambda kind: 10.0)
    log = MetricsLog(tmp_path, "reward")
    log.start()
    for step in (1, 2):
        log.add(step, step_metrics(1.0), UNITS, waited=0.0, flops=6.0)
    now[0] += 10.0
    log.pause(4.0)
    values = log.write(2, {})
    log.close()
    assert values["step_seconds"] == pytest.approx(3.0)
    assert values["pairs_per_second"] == pytest.approx(8 / 6)
    assert values["model_flop_utilisation"] == pytest.approx(12 / 6 / 10)


def test_stated_peaks_are_dense_bfloat16s():
    """The makers' figures, without sparsity: an H100's is 989 TFLOP/s, a TPU v5e's 197."""
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("cpu") is None
