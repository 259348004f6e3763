"""The report of scores that can be counted by hand."""

import json
import types

import numpy as np
import pytest

from dinalrm_jax.data.records import ImageRecord
from dinalrm_jax.evaluation.benchmark_report import short_name
from dinalrm_jax.evaluation.pairs import HeldOutPairs, PairScores
from dinalrm_jax.evaluation.run_report import accuracy_table, kind_table, write_report
from dinalrm_jax.noise import NoiseDraw

KINDS = np.array(["prompt/color", "prompt/color", "degraded/blur", "degraded/blur"])
# At 0.2 the first three pairs are right, at 0.4 the first; all four with shared noise at 0.2, none at 0.4.
SCORES = PairScores(
    (0.2, 0.4),
    np.array([[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]]),
    np.array([[0.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0]]),
    KINDS,
    np.array([[0, 1, 0], [2, 3, 0], [4, 5, 0], [6, 7, 0]]),
)
SHARED = PairScores((0.2, 0.4), np.ones((2, 4)), np.array([[0.0] * 4, [2.0] * 4]), KINDS, SCORES.records)

EXCHANGED = PairScores((0.2, 0.4), *np.array([[[1.0, 0, 0, 0]] * 2, [[0.5] * 4] * 2]), KINDS, SCORES.records)


def records(sizes):
    return types.SimpleNamespace(
        images=[ImageRecord(np.zeros((1, 1, 1)), str(i), size) for i, size in enumerate(sizes)]
    )


def test_tables():
    assert accuracy_table(SCORES, {"all, shared noise": SHARED}).splitlines() == [
        "| sigma | all (4) | degraded (2) | prompt (2) | all, shared noise |",
        "|---|---|---|---|---|",
        "| 0.2 | 75.0 | 50.0 | 100.0 | 100.0 |",
        "| 0.4 | 25.0 | 0.0 | 50.0 | 0.0 |",
    ]
    assert kind_table(SCORES, 0.2).splitlines()[2:] == ["| degraded/blur | 2 | 50.0 |", "| prompt/color | 2 | 100.0 |"]


# The control has the first and the third pair right.
CONTROLS = {"larger file": np.array([[9, 1], [1, 9], [9, 1], [1, 1]])}


def test_what_is_written(tmp_path):
    history = [{"step": 20, "loss": 1.0, "accuracy": 0.5, "eval_accuracy": 0.5, "eval_sigma": 0.4}]
    text = write_report(
        tmp_path, records([9, 1] * 4), SCORES, SHARED, EXCHANGED, CONTROLS, 0.2, history, None, "0123", best=(20, 0.5)
    )
    assert "The model (weights 0123) is that of the last step" in text
    assert "has 50.0 % at sigma 0.4: reward/best/20" in text
    # Of all four pairs the model at 0.2 has three right, of prompt's two both and of degraded's one.
    assert "by how much the model at 0.2 is ahead" in text
    assert "| control | all (4) | degraded (2) | prompt (2) |" in text
    assert "| larger file | 50.0; +25.0 (+25.0 to +25.0) | 50.0; +0.0 (+0.0 to +0.0) | 50.0; +50.0 (" in text
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["0.2"] == {
        "all": 0.75,
        "degraded": 0.5,
        "prompt": 1.0,
        "all, shared noise": 1.0,
        "all, prompts exchanged": 0.25,
    }
    assert results["0.4"]["all, shared noise"] == 0.0
    assert results["controls, per cent"]["larger file"]["prompt"]["ahead"] == 50


def test_every_level_that_is_logged_is_its_own():
    scorer = types.SimpleNamespace(run=lambda params, levels, draw: SCORES)
    values = HeldOutPairs(scorer, {}, (0.2, 0.4), NoiseDraw(0))({}, step=1)
    assert values == pytest.approx({"eval_accuracy": 0.75, "eval_sigma": 0.2, "eval_accuracy/0.4": 0.25})


def test_few_pairs_and_noise_weights_are_said(tmp_path):
    text = write_report(
        tmp_path, records([0] * 8), SCORES, SHARED, None, {}, 0.2, [], None, "0123", note="its VAE is noise"
    )
    assert text.startswith("Note: its VAE is noise.\n\n4 pairs only: such numbers are chance.\n\n")
    many = PairScores((0.2,), *np.zeros((2, 1, 50)), np.array(50 * ["a"]), np.zeros((50, 3), int))
    text = write_report(tmp_path, records([0]), many, many, None, {}, 0.2, [], None, "0123")
    assert text.startswith("Held-out pair accuracy, % (chance 50, 50 pairs)")


def test_records_are_called_by_the_end_of_their_path():
    assert short_name("/home/me/runs/quickstart/data eval") == "quickstart/data eval"
    assert short_name("HPDv2 test") == "HPDv2 test"
