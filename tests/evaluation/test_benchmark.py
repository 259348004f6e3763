"""The evaluate command on a small HPDv2 directory, by one process and by two, and on records."""

import csv
import dataclasses
import itertools
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from dinalrm_jax.data import files
from dinalrm_jax.data.preferences import Benchmark, Ranking
from dinalrm_jax.data.records import Records, RecordsError
from dinalrm_jax.data.sources import hpdv2
from dinalrm_jax.evaluation.benchmark import Evaluation, evaluate_images, evaluate_records
from dinalrm_jax.evaluation.benchmark_report import as_markdown, likelihood_name, summarize, write_scores
from dinalrm_jax.evaluation.controls import BLANK, EXCHANGED, FILE_SIZE, PROBE
from dinalrm_jax.noise import NoiseDraw, draw_noise
from dinalrm_jax.preference import LossConfig
from dinalrm_jax.reward_model import RewardModel
from dinalrm_jax.scenes.config import ScenesConfig
from dinalrm_jax.scenes.records import write_scene_records
from tests.conftest import GOLDEN, ROOT
from tests.data.source_files import ranking, write_hpdv2

ROWS = [
    ranking("two dogs", ["a.png", "b.png", "c.png", "d.png"], [2, 1, 2, 4]),
    ranking("one cat", ["e.png", "a.png"], [0, 1]),
    ranking("a red fox", ["f.png", "g.png", "h.png"], [1, 3, 2]),
]
FLAGS = ("--benchmark=hpdv2", "--dtype=float32", "--sigma=0.2,0.6", "--ensemble=0.2,0.6", "--seeds=2", "--batch-size=4")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Images of two sizes; c.png is missing, g.png is no image."""
    directory = write_hpdv2(tmp_path_factory.mktemp("benchmark") / "HPDv2", ROWS)
    rng = np.random.default_rng(0)
    for number, name in enumerate("abdefh"):
        pixels = rng.integers(0, 256, (64, 64 if number % 2 else 48, 3), np.uint8)
        Image.fromarray(pixels).save(directory / "test" / f"{name}.png")
    (directory / "test" / "c.png").unlink()
    (directory / "test" / "g.png").write_bytes(b"garbage")
    return directory


@pytest.fixture(scope="module")
def checkpoint(scene_model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("evaluated") / "model"
    scene_model.save(directory)
    return directory


def by_hand(scene_model, source, sigma, draw):
    """(correct, strict, all) pairs of every ranking, one image at a time."""

    def score_of(prompt, name):
        if draw.shared:
            return scene_model.score(prompt, [source / "test" / name], sigma, draw.seed)[0]
        latents = scene_model.encode_image([source / "test" / name])
        noise = draw_noise(draw.keys([f"test/{name}"]), latents.shape)
        return scene_model.score_latents(latents, scene_model.encode_prompt([prompt]), sigma, noise)[0]

    out = []
    for row in ROWS:
        score = {name: score_of(row["prompt"], name) for name in row["image_path"] if name not in ("c.png", "g.png")}
        ranks = dict(zip(row["image_path"], row["rank"]))
        pairs = [(one, other) for one in score for other in score if one < other]
        strict = [pair for pair in pairs if ranks[pair[0]] != ranks[pair[1]]]
        correct = [(ranks[a] < ranks[b]) == (score[a] > score[b]) for a, b in strict]
        out.append((sum(correct), len(strict), len(pairs)))
    return np.array(out)


def test_evaluate_by_one_process_and_by_two(scene_model, checkpoint, source, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = ["dinalrm_jax.evaluate", f"--checkpoint={checkpoint}", f"--data={source}", *FLAGS]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "PROCESSES": "2", "DEVICES": "2", "PORT": str(port)}
    environment["PATH"] = f"{pathlib.Path(sys.executable).parent}:{environment['PATH']}"
    commands = (
        ([sys.executable, "-m", *arguments, f"--output={one}"], os.environ),
        (["launch/local_processes.sh", *arguments, f"--output={two}"], environment),
    )
    runs = [
        subprocess.Popen(c, cwd=ROOT, env=e, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for c, e in commands
    ]
    outputs = [run.communicate(timeout=180) for run in runs]
    for run, (stdout, stderr) in zip(runs, outputs):
        assert run.returncode == 0, stderr
        assert "left out: test/c.png: there is no file" in stderr
        assert "left out: test/g.png: not a readable image" in stderr
        assert "2 images not read, 5 pairs left out" in stdout
    for name in ("report.md", "results.json", "scores.csv", "accuracy_by_sigma.png", "reliability.png", "scores.png"):
        assert (one / name).stat().st_size > 0
    found, theirs = (json.loads((directory / "results.json").read_text()) for directory in (one, two))
    for level in found["levels"]:  # of probabilities, which another batching may round otherwise
        error = theirs["levels"][level].pop("calibration_error", None)
        assert found["levels"][level].pop("calibration_error", None) == pytest.approx(error, abs=1e-2)
    assert found == theirs

    # M1 and M4 over all pairs, M2 over rankings; nobody ties here, so that M2 is M3.
    for level, sigma in (("0.2", 0.2), ("ensemble 0.2 0.6", (0.2, 0.6))):
        for seed, shared in itertools.product((0, 1), (False, True)):
            correct, strict, pairs = by_hand(scene_model, source, sigma, NoiseDraw(seed, shared)).T
            expected = {
                "strict": correct.sum() / strict.sum(),
                "strict_by_prompt": np.mean(correct / strict),
                "inversions_by_prompt": np.mean(1 - (strict - correct) / pairs),
                "released": correct.sum() / pairs.sum(),
            }
            for rule, value in expected.items():
                by_rule = found["levels"][level]["shared_noise"] if shared else found["levels"][level]
                assert by_rule[rule]["by_seed"][seed] == pytest.approx(100 * value, abs=1e-3)
    assert (found["pairs"], found["pairs_tied_by_people"], found["pairs_left_out"]) == (5, 0, 5)

    rows = [list(csv.DictReader((directory / "scores.csv").open())) for directory in (one, two)]
    assert [row["image"] for row in rows[0]] == [f"test/{name}" for row in ROWS for name in row["image_path"]]
    assert [row["image"] for row in rows[0] if row["0.2, seed 0"] == ""] == ["test/c.png", "test/g.png"]
    for mine, theirs in zip(*rows):
        for column, value in mine.items():
            if "seed" in column and value:
                assert float(value) == pytest.approx(float(theirs[column]), abs=1e-4)


def test_an_error_of_the_file_system_is_no_missing_image(scene_model, source, tmp_path, monkeypatch):
    """The system's own EIO: the evaluation ends with the name, as its numbers would be of other images each time."""
    monkeypatch.setattr(files, "PAUSES", (0.0,))
    directory = shutil.copytree(source, tmp_path / "HPDv2")
    (directory / "test" / "c.png").symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match=r"cannot read test/c.png: .*Input/output error"):
        evaluate_images(scene_model, hpdv2.benchmark(directory), [0.4], [NoiseDraw(0)])


def test_the_report_of_a_known_model(scene_model, source):
    """A table whose numbers can be counted: with perfect scores, and the paper's line beside."""
    found = evaluate_images(scene_model, hpdv2.benchmark(source), [0.4], [NoiseDraw(0)])
    perfect = [-np.array(row.ranks, np.float32)[:, None, None] for row in found.rankings]
    summary = summarize(type(found)("HPDv2", found.levels, found.draws, found.rankings, perfect, {}))
    assert (summary["pairs"], summary["pairs_tied_by_people"]) == (10, 1)
    by_rule = summary["levels"]["0.4"]
    assert [by_rule[rule]["accuracy"] for rule in ("strict", "strict_by_prompt", "inversions_by_prompt")] == [100.0] * 3
    assert by_rule["released"]["accuracy"] == 90.0
    assert "| 0.4 | 100.00 (100.0 to 100.0) |" in as_markdown(summary)
    assert "DiNa-LRM, ensemble 84.31" in as_markdown(summary)


def test_reliability_is_of_the_likelihood_that_was_trained_with(scene_model, source):
    """One predicted probability, 0.75 or so, of which all pairs are right: the error is what is left to 100 %."""
    found = evaluate_images(scene_model, hpdv2.benchmark(source), [0.4], [NoiseDraw(0)])
    assert found.likelihood is None
    ordered = [
        np.linspace(1, 0, len(row.ranks), dtype=np.float32)[np.argsort(np.argsort(row.ranks, kind="stable"))]
        for row in found.rankings
    ]
    two = dataclasses.replace(found, rankings=found.rankings[1:2], scores=[ordered[1][:, None, None]], controls={})
    for likelihood, expected in (
        (LossConfig(variance="constant", constant_variance=0.5), stats.norm.cdf(1.0)),
        (LossConfig(name="bradley_terry"), 1 / (1 + np.exp(-1.0))),
        (None, stats.norm.cdf(1 / np.sqrt(2 * (2 * 0.4**2 + 0.01)))),
    ):
        summary = summarize(dataclasses.replace(two, likelihood=likelihood))
        assert summary["levels"]["0.4"]["calibration_error"] == pytest.approx(100 * (1 - expected), abs=1e-2)
        assert (summary["likelihood"] is None) == (likelihood is None)


def test_controls_score_the_same_images_without_their_prompts(scene_model, source):
    """By hand: the file's bytes, and the model's own score under no prompt and under another ranking's."""
    found = evaluate_images(scene_model, hpdv2.benchmark(source), [0.2, 0.6], [NoiseDraw(0), NoiseDraw(1)])
    prompts = [row.prompt for row in found.rankings]
    for place, row in enumerate(found.rankings):
        for number, name in enumerate(row.images):
            if np.isnan(found.scores[place][number, 0, 0]):
                assert np.isnan(found.controls[BLANK][place][number])
                continue
            assert found.controls[FILE_SIZE][place][number] == (source / name).stat().st_size
            latents = scene_model.encode_image([source / name])
            noise = draw_noise(NoiseDraw(0).keys([name]), latents.shape)

            def score(prompt, latents=latents, noise=noise):
                return scene_model.score_latents(latents, scene_model.encode_prompt([prompt]), 0.2, noise)[0]

            assert found.controls[BLANK][place][number] == pytest.approx(score(""), abs=1e-4)
            others = [score(prompt) for prompt in prompts if prompt != row.prompt]
            assert min(abs(found.controls[EXCHANGED][place][number] - other) for other in others) < 1e-4
    text = as_markdown(summarize(found))
    assert "by how much the model at 0.2 is ahead" in text
    assert "| this model, no prompt | " in text


def test_a_benchmark_that_knows_its_generators(scene_model, source):
    """Pairs are counted without weak ones too, by hand: of a's, b's and d's images only a and d are left."""
    images = tuple(f"test/{name}.png" for name in "abd")
    rankings = [Ranking("p", images, (1, 2, 3)), Ranking("q", images, (3, 2, 1))]
    benchmark = Benchmark("x", rankings, hpdv2.benchmark(source).open, True, lambda name: name[5], ("b",))
    found = evaluate_images(scene_model, benchmark, [0.4], [NoiseDraw(0)])
    (mask,) = {tuple(row.tolist()) for row in found.groups["without b"]}
    assert mask == (True, False, True)
    summary = summarize(found)
    assert summary["groups"] == {"without b": 2}
    ahead = [scores[0, 0, 0] > scores[2, 0, 0] for scores in found.scores]
    expected = 50 * (ahead[0] + (not ahead[1]))
    standings = summary["controls"][FILE_SIZE]["without b"]
    assert standings["accuracy"] + standings["ahead"] == pytest.approx(expected)
    empty = evaluate_images(scene_model, dataclasses.replace(benchmark, rankings=[]), [0.4], [NoiseDraw(0)])
    assert (list(empty.scores), empty.problems) == ([], {}), "the share of a process that has none"


def test_groups_and_controls_without_pairs_are_left_out(scene_model, source):
    """A group whose images cannot be read, and a control that does not score what the model does."""
    rankings = [Ranking("p", ("a", "b", "c"), (1, 2, 3))]
    scores = [np.array([2, 1, np.nan], np.float32)[:, None, None]]
    controls = {"whole": [np.array([1.0, 2.0, 3.0])], "half": [np.array([1.0, np.nan, 3.0])]}
    groups = {"c and a": [np.array([True, False, True])], "a and b": [np.array([True, True, False])]}
    found = Evaluation("x", (0.4,), (NoiseDraw(0),), rankings, scores, {}, controls=controls, groups=groups)
    summary = summarize(found)
    assert summary["groups"] == {"a and b": 1}
    assert {name: set(row) for name, row in summary["controls"].items()} == {"whole": {"all", "a and b"}}
    json.dumps(summary, allow_nan=False)


def test_controls_of_records_are_the_models_own_scores(scene_model, tmp_path):
    """Under no prompt and under exchanged ones the same images score otherwise; kinds are groups."""
    scenes = ScenesConfig(train_pairs=12, eval_pairs=8, image_size=32)
    write_scene_records(tmp_path / "data", scenes, scene_model.config.encoders)
    records = Records(tmp_path / "data")
    found = evaluate_records(scene_model, records, "eval", [0.4], [NoiseDraw(0)])
    assert {BLANK, EXCHANGED, PROBE} <= found.controls.keys()
    own = np.stack(found.scores)[:, :, 0, 0]
    for name, prompts in (
        (BLANK, {""}),
        (EXCHANGED, {row.text for row in map(records.prompts.__getitem__, range(20))}),
    ):
        pair = records.pairs("eval")[0]
        image = records.images[pair.chosen]
        latents = image.latents[None].astype(np.float32)
        noise = draw_noise(NoiseDraw(0).keys([image.name]), latents.shape)
        scored = [scene_model.score_latents(latents, scene_model.encode_prompt([p]), 0.4, noise)[0] for p in prompts]
        assert np.min(np.abs(np.array(scored) - found.controls[name][0][0])) < 2e-3
        assert np.abs(np.stack(found.controls[name]) - own).min() > 1e-4
    kinds = [pair.kind.split("/")[0] for pair in records.pairs("eval")]
    assert set(kinds) == {"prompt", "degraded"}
    masks = {name: [row.tolist() for row in rows] for name, rows in found.groups.items()}
    assert masks == {name: [2 * [kind == name] for kind in kinds] for name in set(kinds)}


def test_what_people_agree_on_and_groups(scene_model, source):
    """Two rankings of three: shares by hand, and a group without the last image."""
    shares = ((0.5, 0.9, 0.6), (0.1, 0.5, 0.7), (0.4, 0.3, 0.5))
    rankings = [Ranking("p", ("a", "b", "c"), (1, 2, 3), shares), Ranking("q", ("a", "b", "c"), (1, 1, 2), shares)]
    scores = [np.array(row, np.float32)[:, None, None] for row in ([3, 2, 1], [2, 3, 1])]
    controls = {"size": [np.array([1.0, 2.0, 3.0]), np.array([3.0, 2.0, 1.0])]}
    groups = {"first two": [np.array([True, True, False])] * 2}
    found = Evaluation("x", (0.4,), (NoiseDraw(0),), rankings, scores, {}, controls=controls, groups=groups)
    summary = summarize(found)
    # Pairs with a winner: p's ab, ac, bc and q's ac, bc.
    assert summary["people"] == {"all": pytest.approx(100 * (0.9 + 0.6 + 0.7 + 0.6 + 0.7) / 5), "first two": 90}
    assert summary["groups"] == {"first two": 1}
    assert summary["controls"]["size"]["all"]["accuracy"] == 40
    assert summary["controls"]["size"]["all"]["ahead"] == 60
    assert summary["controls"]["size"]["first two"]["accuracy"] == 0
    assert "| share of people who agree with the order | 70.0 | 90.0 |" in as_markdown(summary)


def test_spreads_seeds_and_cells_are_those_of_the_scores(scene_model, source, tmp_path):
    draws = [NoiseDraw(3), NoiseDraw(4), NoiseDraw(8, shared=True)]
    found = evaluate_images(scene_model, hpdv2.benchmark(source), [0.2, (0.2, 0.6)], draws)
    twice = dataclasses.replace(
        found, rankings=[*found.rankings, found.rankings[0]], scores=[*found.scores, found.scores[0]], controls={}
    )
    summary = summarize(twice)
    assert (summary["rankings"], summary["prompts"], summary["seeds"]) == (4, 3, [3, 4])
    for by_rule in summary["levels"].values():
        one, other = by_rule["strict"]["by_seed"]
        assert by_rule["strict"]["standard_deviation"] == pytest.approx(abs(one - other) / np.sqrt(2), abs=1e-3)
        assert len(by_rule["shared_noise"]["strict"]["by_seed"]) == 1
    write_scores(tmp_path / "scores.csv", found)
    rows = list(csv.DictReader((tmp_path / "scores.csv").open()))
    assert [int(row["ranking"]) for row in rows] == [0, 0, 0, 0, 1, 1, 2, 2, 2]
    cells = rows[4]
    for place, level in enumerate(("0.2", "ensemble 0.2 0.6")):
        for number, seed in enumerate(("seed 3", "seed 4", "shared seed 8")):
            assert float(cells[f"{level}, {seed}"]) == pytest.approx(found.scores[1][0, place, number], rel=1e-4)


def test_likelihoods_have_names():
    assert likelihood_name(LossConfig(sigma_0=0.5)) == "Thurstone, variance 2 sigma² + 0.25"
    assert likelihood_name(LossConfig(variance="constant", constant_variance=0.5)) == "Thurstone, variance 0.5"
    assert likelihood_name(LossConfig(name="bradley_terry")) == "Bradley-Terry"
    assert "paper" in likelihood_name(None)


def test_records_are_scored_as_their_latents(scene_model, tmp_path):
    write_scene_records(
        tmp_path / "data", ScenesConfig(train_pairs=1, eval_pairs=5, image_size=64), scene_model.config.encoders
    )
    records = Records(tmp_path / "data")
    found = evaluate_records(
        scene_model, records, "eval", [0.4, (0.2, 0.6)], [NoiseDraw(3), NoiseDraw(3, shared=True)], batch_size=4
    )
    pairs = records.pairs("eval")
    for scores, pair in zip(found.scores, (pairs[index] for index in range(len(pairs)))):
        for place, image in enumerate((pair.chosen, pair.rejected)):
            prompt = scene_model.encode_prompt([records.prompts[pair.prompt].text])
            latents = records.images[image].latents[None].astype(np.float32)
            own = draw_noise(NoiseDraw(3).keys([records.images[image].name]), latents.shape)
            for level, sigma in enumerate((0.4, (0.2, 0.6))):
                # Records hold embeddings in float16.
                expected = [
                    scene_model.score_latents(latents, prompt, sigma, noise, seed=3)[0] for noise in (own, None)
                ]
                assert scores[place, level] == pytest.approx(expected, abs=5e-3)


def test_ties_of_records_are_ties(scene_model, tmp_path):
    """Not preferences for the image that stands first."""
    write_scene_records(
        tmp_path / "data", ScenesConfig(train_pairs=1, eval_pairs=3, image_size=64), scene_model.config.encoders
    )
    records = Records(tmp_path / "data")
    pairs = [dataclasses.replace(pair, label=0.5 if n == 1 else 1.0) for n, pair in enumerate(records.pairs("eval"))]
    records.pairs = lambda split: pairs
    found = evaluate_records(scene_model, records, "eval", [0.4], [NoiseDraw(3)])
    counts = found.counts(0, 0)
    assert counts.strict.tolist() == [1, 0, 1]
    assert counts.pairs.tolist() == [1, 1, 1]


def evaluate(*arguments):
    command = [sys.executable, "-m", "dinalrm_jax.evaluate", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_evaluate_on_records_and_what_it_refuses(scene_model, checkpoint, source, tmp_path):
    write_scene_records(
        tmp_path / "data", ScenesConfig(train_pairs=1, eval_pairs=3, image_size=64), scene_model.config.encoders
    )
    flags = (
        f"--checkpoint={checkpoint}",
        "--dtype=float32",
        "--sigma=0.4",
        "--ensemble=",
        f"--output={tmp_path / 'out'}",
    )
    result = evaluate(*flags, "--benchmark=records", f"--data={tmp_path / 'data'}")
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["pairs"] == 3
    assert results["weights"] == scene_model.digest
    assert f"Weights {scene_model.digest}." in result.stdout
    result = evaluate(*flags, "--benchmark=records", f"--data={tmp_path / 'data'}")
    assert result.returncode == 2
    assert "out exists already" in result.stderr
    result = evaluate(*flags[:-1], f"--output={tmp_path / 'a' / 'b'}", "--benchmark=records", "--data=nowhere")
    assert result.returncode == 2
    assert not (tmp_path / "a").exists(), "nothing is written where the inputs will not do"


def test_evaluate_calibrates_the_checkpoint(scene_model, checkpoint, source, tmp_path):
    """The fitted likelihood is the model's from then on; of a checkpoint that cannot hold it, nothing is scored.

    People are the model itself under other noise, as a random one orders nobody's pictures.
    """
    copy, names = shutil.copytree(checkpoint, tmp_path / "model"), [f"{name}.png" for name in "abdefh"]
    images, prompts = [source / "test" / name for name in names], [f"p {number}" for number in range(30)]
    people = [-np.array(scene_model.score(prompt, images, 0.2, seed=7)) for prompt in prompts]
    rows = [ranking(prompt, names, order.tolist()) for prompt, order in zip(prompts, people)]
    data = write_hpdv2(tmp_path / "data", rows)
    for name in names:
        shutil.copy(source / "test" / name, data / "test" / name)
    flags = ("--benchmark=hpdv2", f"--data={data}", "--dtype=float32", "--sigma=0.2,0.6")
    flags += ("--ensemble=", "--shared-noise=false", "--calibrate", f"--output={tmp_path / 'out'}")
    result = evaluate(f"--checkpoint={copy}", *flags)
    assert result.returncode == 0, result.stderr
    before, after = (RewardModel.from_pretrained(path, dtype="float32") for path in (checkpoint, copy))
    assert before.likelihood is None
    assert f"k {after.likelihood.k:.4g}, sigma_0 {after.likelihood.sigma_0:.4g}." in result.stdout
    written = json.loads((copy / "calibration.json").read_text())
    assert written["errors"].keys() == {"0.2", "0.6"}
    assert (tmp_path / "out" / "calibration.md").read_text() in result.stdout
    result = evaluate(f"--checkpoint={copy}", *flags[:3], "--sigma=0.4", *flags[4:])
    assert "--calibrate needs two noise levels or more" in result.stderr
    released = (f"--checkpoint={GOLDEN}", f"--base-model={GOLDEN}")
    result = evaluate(*released, *flags[:-1], f"--output={tmp_path / 'other'}")
    assert result.returncode == 2
    assert "is no native model's directory" in result.stderr
    assert not (tmp_path / "other").exists()


def test_a_benchmark_without_its_images_is_an_error(scene_model, source, tmp_path):
    (tmp_path / "test.json").write_text((source / "test.json").read_text())
    found = evaluate_images(scene_model, hpdv2.benchmark(tmp_path), [0.4], [NoiseDraw(0)])
    with pytest.raises(
        RecordsError, match=r"no pair .* was scored; 8 images could not be read\n  test/a.png: there is no"
    ):
        summarize(found)
