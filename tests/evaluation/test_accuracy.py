"""The four accuracy rules: golden values of real annotations, and hand-made rankings."""

import json

import numpy as np
import pytest

from dinalrm_jax.data.sources import hpdv2, imagereward
from dinalrm_jax.evaluation.accuracy import accuracies, count_pairs, intervals, reliability, strict_pairs
from tests.conftest import ROOT

SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="real files lie beside the project only")


def percentages(rankings, score):
    counts = count_pairs([row.ranks for row in rankings], [np.array(list(map(score, row.images))) for row in rankings])
    return counts, {rule: round(100 * float(value), 4) for rule, value in accuracies(counts).items()}


@needs_shared
def test_imagereward_golden_values():
    """data_formats.md 0, made with the original functions of ImageReward and HPSv2."""
    rankings = imagereward.benchmark(SHARED / "imagereward").rankings
    counts, found = percentages(rankings, lambda name: int(name.rsplit("/", 1)[-1][:8], 16))
    assert (counts.correct.sum(), counts.strict.sum(), counts.pairs.sum()) == (3144, 6399, 7230)
    assert found == {
        "strict": 49.1327,
        "strict_by_prompt": 49.4346,
        "inversions_by_prompt": 54.4555,
        "released": 43.4855,
    }
    for sign, expected in ((-1, (100, 100, 100, 88.5062)), (1, (0, 0, 10.0523, 0))):
        counts = count_pairs([row.ranks for row in rankings], [sign * np.array(row.ranks) for row in rankings])
        assert tuple(round(100 * float(value), 4) for value in accuracies(counts).values()) == expected


@needs_shared
def test_hpdv2_subset_golden_values():
    benchmark = hpdv2.benchmark(SHARED / "hpdv2_subset")
    counts, found = percentages(benchmark.rankings, lambda name: len(benchmark.open(name).read()))
    assert (counts.correct.sum(), counts.pairs.sum()) == (982, 1539)
    assert found["strict"] == found["released"] == 63.8077
    assert found["strict_by_prompt"] == found["inversions_by_prompt"] == 63.8472


@needs_shared
@pytest.mark.parametrize(("judge", "correct"), [("gpt4o", 55.44), ("gemini-1.5-pro", 56.20)])
def test_genai_bench_votes(judge, correct):
    """data_formats.md 8: decisive rows of test_v1, a judge's tie counted as wrong."""
    rows = json.loads((SHARED / "genai_bench" / "votes_test_v1.json").read_text())
    side = {"leftvote": (1, 2), "rightvote": (2, 1), "[[A>B]]": (1, 0), "[[B>A]]": (0, 1)}
    ranks = [side.get(row["vote_type"], (1, 1)) for row in rows]
    scores = [np.array(side.get(row[judge], (0, 0))) for row in rows]
    counts = count_pairs(ranks, scores)
    assert counts.strict.sum() == 1306
    assert round(100 * float(accuracies(counts)["strict"]), 2) == correct


def test_ties_of_either_side():
    """Ranks 1 2 2 and scores 3 3 1: pairs (0,1) tied by the model, (0,2) right, (1,2) tied by people."""
    found = accuracies(count_pairs([(1, 2, 2)], [np.array([3.0, 3.0, 1.0])]))
    assert {rule: float(value) for rule, value in found.items()} == pytest.approx(
        {"strict": 1 / 2, "strict_by_prompt": 1 / 2, "inversions_by_prompt": 1.0, "released": 1 / 3}
    )
    # The model's tie the other way round: the image that stands first is not the one people prefer.
    swapped = accuracies(count_pairs([(2, 1, 2)], [np.array([3.0, 3.0, 1.0])]))
    assert float(swapped["inversions_by_prompt"]) == pytest.approx(2 / 3)


def test_images_without_a_score_have_no_pairs():
    whole = count_pairs([(1, 2, 3), (1, 2)], [np.array([3.0, np.nan, 4.0]), np.array([np.nan, 1.0])])
    assert whole.pairs.tolist() == [1, 0]
    assert whole.correct.tolist() == [0, 0]
    assert float(accuracies(whole)["strict_by_prompt"]) == 0.0  # of the one ranking that has a pair
    chosen, rejected, _ = strict_pairs([(1, 2, 3), (1, 2)], [np.array([3.0, np.nan, 4.0]), np.array([np.nan, 1.0])])
    assert (chosen.tolist(), rejected.tolist()) == ([3.0], [4.0])


def test_intervals_cover_and_prompts_stay_together():
    """Pairs of 400 prompts, 5 equal ones each: the interval is that of 400 coin flips, not of 2000."""
    right = np.repeat(np.arange(400) < 280, 5)
    prompts = np.repeat([f"p{i}" for i in range(400)], 5)
    counts = count_pairs([(1, 2)] * 2000, [np.array([1.0, 0.0]) if r else np.array([0.0, 1.0]) for r in right])
    low, high = intervals([counts], prompts)["strict"]
    assert low < 0.7 < high
    # 2 x 1.96 standard errors of 400 independent outcomes; a percentile of 1000 draws is good to some 10 %.
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.7 * 0.3 / 400), rel=0.15)


def test_reliability_of_what_is_known():
    rng = np.random.default_rng(1)
    truth = rng.uniform(0.5, 1, 20000)
    said = np.where(rng.random(20000) < truth, truth, 1 - truth)  # right with the probability it claims
    curve = reliability(said)
    assert curve.count.sum() == 20000
    assert curve.calibration_error < 0.02  # of some 2000 pairs a bin, one standard error is 0.01
    overconfident = reliability(np.where(rng.random(20000) < 0.6, 0.95, 0.05))
    assert overconfident.calibration_error == pytest.approx(0.35, abs=0.02)
