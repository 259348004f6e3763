"""AGIQA-3K: pairs and labels by hand, the whole set where it is at hand, and correlations of an evaluation."""

import csv
import math

import numpy as np
import pytest
from scipy import stats

from dinalrm_jax.data.config import OpinionConfig, PreparationConfig
from dinalrm_jax.data.records import RecordsError
from dinalrm_jax.data.sources import agiqa3k
from dinalrm_jax.evaluation.accuracy import accuracies, count_pairs
from dinalrm_jax.evaluation.benchmark import Evaluation
from dinalrm_jax.evaluation.benchmark_report import as_markdown, summarize
from dinalrm_jax.evaluation.controls import FILE_SIZE, MAKER, KnownImage, ranking_controls
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.noise import NoiseDraw
from tests.conftest import ROOT

WHOLE = ROOT.parent / "shared" / "data" / "agiqa3k"
COLUMNS = ("name", "prompt", "adj1", "mos_quality", "std_quality", "mos_align", "std_align")
ROWS = [
    ("a.jpg", "a cat", "", 3.0, 0.3, 1.0, 0.4), ("b.jpg", "a cat", "", 2.0, 0.4, 3.0, 0.3),
    ("c.jpg", "a cat", "", 2.5, 0.0, 1.5, 0.0), ("d.jpg", "a dog", "", 1.0, 0.1, 1.0, 0.1),
    ("e.jpg", "a dog", "", 4.0, 0.1, 4.0, 0.1), ("f.jpg", "alone", "", 4.0, 0.1, 4.0, 0.1),
]  # fmt: skip


def write(directory, rows):
    directory.mkdir(exist_ok=True)
    with (directory / "data.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    return directory


def pairs_of(source):
    return {(p.chosen[0], p.rejected[0]): p.label for split in source.preferences.values() for p in split}


def test_pairs_within_a_prompt_by_the_configured_opinion(tmp_path):
    source = write(tmp_path / "a", ROWS)
    by_quality = agiqa3k.read(source, 1, OpinionConfig(quality=1.0))
    assert pairs_of(by_quality) == {("a", "b"): 1, ("a", "c"): 1, ("c", "b"): 1, ("e", "d"): 1}
    assert by_quality.counts["prompt of one image"] == 1
    by_alignment = agiqa3k.read(source, 1, OpinionConfig(quality=0.0))
    assert pairs_of(by_alignment) == {("b", "a"): 1, ("b", "c"): 1, ("c", "a"): 1, ("e", "d"): 1}
    mixed = agiqa3k.read(source, 1, OpinionConfig())  # a and c have 2.0, b 2.5
    assert pairs_of(mixed) == {("b", "a"): 1, ("b", "c"): 1, ("e", "d"): 1}
    assert mixed.counts["pair of opinions too near"] == 1
    far = agiqa3k.read(source, 1, OpinionConfig(quality=1.0, least_gap=0.6))
    assert pairs_of(far) == {("a", "b"): 1, ("e", "d"): 1}
    assert {p.prompt for p in mixed.preferences["train"]} != {p.prompt for p in mixed.preferences["eval"]}


def test_soft_labels_are_the_probability_of_normal_opinions(tmp_path):
    found = pairs_of(agiqa3k.read(write(tmp_path / "a", ROWS), 1, OpinionConfig(quality=0.25, soft=True)))
    means = {"a": 0.25 * 3 + 0.75 * 1, "b": 0.25 * 2 + 0.75 * 3}
    spreads = {"a": math.hypot(0.25 * 0.3, 0.75 * 0.4), "b": math.hypot(0.25 * 0.4, 0.75 * 0.3)}
    expected = stats.norm.cdf((means["b"] - means["a"]) / math.hypot(*spreads.values()))
    assert found["b", "a"] == pytest.approx(expected)
    assert 0.5 < found["b", "a"] < 1
    assert agiqa3k.preferred((2.0, 0.0), (1.0, 0.0)) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("x.jpg", "a", "", 5.5, 0.1, 1, 0.1), "line 2: mos_quality is '5.5', expected a number from 0 to 5"),
        (("x.jpg", "a", "", 1, "nan", 1, 0.1), "line 2: std_quality is 'nan'"),
        (("x.jpg", "a", "", 1, 0.1, "", 0.1), "line 2: mos_align is ''"),
    ],
)
def test_rows_that_are_not_what_they_should_be(tmp_path, row, message):
    with pytest.raises(RecordsError, match=message):
        agiqa3k.read(write(tmp_path / "a", [row]), 1, OpinionConfig())


def test_other_directories_and_values(tmp_path):
    with pytest.raises(RecordsError, match="is not a directory of AGIQA-3K: it has no data.csv"):
        agiqa3k.read(tmp_path, 1, OpinionConfig())
    (tmp_path / "data.csv").write_text("name,prompt\n")
    with pytest.raises(RecordsError, match="lacks the columns mos_align, mos_quality, std_align, std_quality"):
        agiqa3k.read(tmp_path, 1, OpinionConfig())
    with pytest.raises(ConfigError, match=r"quality lies in \[0, 1\]"):
        OpinionConfig(quality=1.5)
    with pytest.raises(ConfigError, match="would have no effect: only agiqa3k has mean opinions"):
        PreparationConfig("hpdv3", opinion=OpinionConfig(soft=True))


def test_the_whole_set():
    if not WHOLE.is_dir():
        pytest.skip("shared/data/agiqa3k is not there")
    source = agiqa3k.read(WHOLE, 60, OpinionConfig(quality=1.0))
    pairs = [p for split in source.preferences.values() for p in split]
    assert len(pairs) == 13_335, "of 13,344 that share a prompt"
    generators = {}
    for row in csv.DictReader((WHOLE / "data.csv").open(newline="", encoding="utf-8-sig")):
        generators.setdefault(row["name"].rpartition("_")[0], []).append(float(row["mos_quality"]))
    mean = {name: np.mean(values) for name, values in generators.items()}
    known = [mean[p.chosen.rpartition("_")[0]] > mean[p.rejected.rpartition("_")[0]] for p in pairs]
    assert np.mean(known) == pytest.approx(0.802, abs=5e-4), "what knowing the generator alone orders"
    held_out = {p.prompt for p in source.preferences["eval"]}
    benchmark = agiqa3k.benchmark(WHOLE, OpinionConfig(quality=1.0), holdout=60)
    assert {ranking.prompt for ranking in benchmark.rankings} == held_out
    assert len(held_out) == 60
    with benchmark.open(benchmark.rankings[0].images[0]) as file:
        assert file.read(2) == b"\xff\xd8"


def test_correlations_are_over_all_images(tmp_path):
    """Of a benchmark whose scores are the opinions, noised; those of another order say so."""
    benchmark = agiqa3k.benchmark(write(tmp_path / "a", ROWS), OpinionConfig(quality=1.0))
    rng = np.random.default_rng(0)
    scores = [-np.array(r.ranks)[:, None, None] + rng.standard_normal((len(r.ranks), 1, 2)) for r in benchmark.rankings]
    draws = (NoiseDraw(0), NoiseDraw(0, shared=True))
    found = Evaluation("AGIQA-3K", (0.4,), draws, benchmark.rankings, scores, {}, opinions=benchmark.opinions)
    summary = summarize(found)
    opinions = np.concatenate([-np.array(r.ranks) for r in benchmark.rankings])
    own = np.concatenate(scores)[:, 0, 0]
    expected = (
        stats.spearmanr(opinions, own).statistic,
        np.corrcoef(opinions, own)[0, 1],
        stats.kendalltau(opinions, own).statistic,
    )
    assert tuple(summary["levels"]["0.4"]["correlations"].values()) == pytest.approx(expected)
    assert f"| 0.4 | {expected[0]:.3f} | {expected[1]:.3f} | {expected[2]:.3f} |" in as_markdown(summary)


def test_a_generator_is_known_by_its_images_names(tmp_path):
    names = {
        "glide_normal_012.jpg": "glide_normal",
        "a/sd1.5_lowstep_001.jpg": "sd1.5_lowstep",
        "@1m/xl2.2_normal_9.jpg": "xl2.2_normal",
    }
    assert {name: agiqa3k.maker(name) for name in names} == names
    opinions = {"glide_normal_1.jpg": 1, "xl2.2_normal_1.jpg": 1.4, "DALLE2_normal_1.jpg": 3}
    rows = [(name, "a", "", mean, 0, mean, 0) for name, mean in opinions.items()]
    rows += [("x_1.jpg", "b", "", 1, 0, 1, 0), ("y_1.jpg", "b", "", 2, 0, 2, 0)]
    source = agiqa3k.read(write(tmp_path / "a", rows), 1, OpinionConfig())
    kinds = {(p.chosen[:2], p.rejected[:2]): p.kind for split in source.preferences.values() for p in split}
    assert kinds["xl", "gl"] == "a weak generator/opinions less than 1 apart"
    assert kinds["DA", "gl"] == "a weak generator/opinions more than 1 apart"
    assert kinds["DA", "xl"] == "other generators/opinions more than 1 apart"


def test_a_benchmark_has_shares_and_weak_generators(tmp_path):
    found = agiqa3k.benchmark(write(tmp_path / "a", ROWS), OpinionConfig(quality=1.0))
    (cats,) = [ranking for ranking in found.rankings if ranking.prompt == "a cat"]
    assert cats.shares[0][1] == pytest.approx(stats.norm.cdf((3.0 - 2.0) / math.hypot(0.3, 0.4)))
    assert cats.shares[1][0] == pytest.approx(1 - cats.shares[0][1])
    assert (cats.shares[0][0], found.maker("glide_normal_1.jpg")) == (0.5, found.weak[1])


@pytest.mark.skipif(not WHOLE.is_dir(), reason=f"{WHOLE} is not there")
@pytest.mark.parametrize(
    ("quality", "by_maker", "of_others", "by_size"), [(1.0, 80.2, 74.1, 65.1), (0.0, 75.6, 64.6, 61.6)]
)
def test_controls_are_as_strong_as_they_are_known_to_be(quality, by_maker, of_others, by_size):
    """shared/data/README.md has these shares, of generators' mean opinions over all prompts; here they are won pairs of
    other prompts, which makes up to a point."""
    found = agiqa3k.benchmark(WHOLE, OpinionConfig(quality=quality))
    known = {
        (ranking.prompt, image): KnownImage((WHOLE / "images" / image).stat().st_size, found.maker(image), np.zeros(2))
        for ranking in found.rankings
        for image in ranking.images
    }
    controls = ranking_controls(found.rankings, known)
    ranks = [ranking.ranks for ranking in found.rankings]
    strong = [
        np.where([found.maker(image) in found.weak for image in ranking.images], np.nan, scores)
        for ranking, scores in zip(found.rankings, controls[MAKER])
    ]
    for scores, expected, off in (
        (controls[MAKER], by_maker, 1), (strong, of_others, 1), (controls[FILE_SIZE], by_size, 0.1),
    ):  # fmt: skip
        assert 100 * accuracies(count_pairs(ranks, scores))["strict"] == pytest.approx(expected, abs=off)


def test_the_higher_opinion_ranks_first(tmp_path):
    source = agiqa3k.benchmark(write(tmp_path / "a", ROWS), OpinionConfig(quality=1.0))
    (cats,) = [ranking for ranking in source.rankings if ranking.prompt == "a cat"]
    assert sorted(zip(cats.ranks, cats.images)) == [(-3.0, "a.jpg"), (-2.5, "c.jpg"), (-2.0, "b.jpg")]


def test_a_gap_of_just_the_least_is_a_pair(tmp_path):
    near = agiqa3k.read(write(tmp_path / "a", ROWS), 1, OpinionConfig(quality=1.0, least_gap=0.5))
    assert pairs_of(near) == {("a", "b"): 1, ("a", "c"): 1, ("c", "b"): 1, ("e", "d"): 1}


def test_a_byte_order_mark_is_no_part_of_a_column(tmp_path):
    path = write(tmp_path / "a", ROWS) / "data.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(pairs_of(agiqa3k.read(path.parent, 1, OpinionConfig(quality=1.0)))) == 4
