"""Controls and comparisons, on scores that can be counted by hand, and against scikit-learn's formula in numpy."""

import dataclasses
import types

import numpy as np
import pytest
from scipy import stats

from dinalrm_jax.data.preferences import Ranking, stable_hash
from dinalrm_jax.data.records import ImageRecord, PairRecord
from dinalrm_jax.evaluation import controls
from dinalrm_jax.evaluation.accuracy import count_pairs, pair_counts
from dinalrm_jax.evaluation.comparison import compare
from dinalrm_jax.evaluation.controls import FILE_SIZE, MAKER, PROBE, KnownImage, standing
from dinalrm_jax.evaluation.scoring import pooled
from dinalrm_jax.model.encoding import EncodersConfig

RNG = np.random.default_rng(0)


def test_pooled_latents():
    latents = RNG.standard_normal((3, 4, 5, 2)).astype(np.float32)
    means = latents.reshape(3, 20, 2).sum(axis=1) / 20
    squares = np.square(latents.reshape(3, 20, 2)).sum(axis=1) / 20
    expected = np.concatenate([means, np.sqrt(squares - means**2)], axis=1)
    np.testing.assert_allclose(pooled(latents), expected, rtol=1e-5, atol=1e-6)


def test_a_linear_probe_finds_the_direction_and_ignores_what_says_nothing():
    better, worse = RNG.standard_normal((2, 4000, 3))
    swap = (better - worse) @ [2.0, -1.0, 0.0] < RNG.logistic(size=4000)
    better[swap], worse[swap] = worse[swap].copy(), better[swap].copy()
    found = controls.linear_probe(better * [1, 10, 1], worse * [1, 10, 1])
    # Logistic noise of scale 1: the maximum-likelihood weights are those that made the pairs.
    np.testing.assert_allclose(found, [2.0, -0.1, 0.0], atol=0.15)


def test_a_probe_of_many_pairs_is_fitted_to_some(monkeypatch):
    monkeypatch.setattr(controls, "MOST_PAIRS", 3)
    assert controls._spread(7) == [0, 3, 6]
    assert controls._spread(2) == [0, 1]


def image(name, size, level):
    return ImageRecord(np.full((2, 2, 1), level, np.float16), name, size)


def records(images, training, dataset="agiqa3k"):
    pairs = [PairRecord(chosen, rejected, 0, "human", label) for chosen, rejected, label in training]
    return types.SimpleNamespace(
        images=images, manifest={"source": {"dataset": dataset}}, pairs=lambda split: pairs,
        buckets=lambda split: {"16x16": range(len(pairs))} if split == "train" and pairs else {},
    )  # fmt: skip


IMAGES = [
    image("glide_normal_001.jpg", 10, 0.0), image("xl2.2_normal_001.jpg", 20, 1.0),
    image("glide_normal_002.jpg", 40, 0.1), image("xl2.2_normal_002.jpg", 30, 0.9),
]  # fmt: skip
TRAINING = [(1, 0, 1.0)] * 3 + [(0, 1, 1.0)]
HELD_OUT = [PairRecord(3, 2, 1, "human"), PairRecord(2, 3, 1, "human")]


def test_controls_of_records_are_fitted_to_their_training_pairs():
    found = controls.record_controls(records(IMAGES, TRAINING), HELD_OUT)
    assert set(found) == {FILE_SIZE, MAKER, PROBE}
    assert found[FILE_SIZE].tolist() == [[30, 40], [40, 30]]
    # Of four training pairs the generator xl2.2_normal won three; with one won and one lost beside them.
    np.testing.assert_allclose(found[MAKER], [[4 / 6, 2 / 6], [2 / 6, 4 / 6]])
    assert found[PROBE][0, 0] > found[PROBE][0, 1], "what is brighter won in training"
    of_its_prompt = [dataclasses.replace(pair, prompt=0) for pair in HELD_OUT]
    assert set(controls.record_controls(records(IMAGES, TRAINING), of_its_prompt)) == {FILE_SIZE}, "other prompts only"
    turned = controls.record_controls(records(IMAGES, [(b, a, label) for a, b, label in TRAINING]), HELD_OUT)
    assert turned[PROBE][0, 0] < turned[PROBE][0, 1]


def test_the_smaller_file_may_be_the_better_one():
    """Where small files won the training pairs, small is good: no control is beaten for being the wrong way round."""
    small_wins = [(b, a, label) for a, b, label in TRAINING]
    found = controls.record_controls(records(IMAGES, small_wins), HELD_OUT)
    assert found[FILE_SIZE].tolist() == [[-30, -40], [-40, -30]]


def test_controls_that_records_do_not_allow_are_not_there():
    assert set(controls.record_controls(records(IMAGES, TRAINING, "hpdv3"), HELD_OUT)) == {FILE_SIZE, PROBE}
    latents_only = [image(one.name, 0, one.latents[0, 0, 0]) for one in IMAGES]
    assert set(controls.record_controls(records(latents_only, []), HELD_OUT)) == set()
    assert set(controls.record_controls(records(IMAGES, [(0, 1, 0.5)]), HELD_OUT)) == {FILE_SIZE}, "ties teach nothing"


def test_a_ranking_is_judged_by_controls_of_other_prompts():
    """In every prompt but one the brighter image is better; that one is judged by the others all the same."""
    rankings = [Ranking(f"prompt {i}", ("dark", "bright"), (2, 1)) for i in range(40)]
    rankings[7] = Ranking("prompt 7", ("dark", "bright", "missing"), (1, 2, 3))
    known = {}
    for number, ranking in enumerate(rankings):
        for name in ("dark", "bright"):
            level = (name == "bright") + 0.1 * RNG.standard_normal()
            known[ranking.prompt, name] = KnownImage(5, f"maker {number}", np.array([level, 1.0]))
    found = controls.ranking_controls(rankings, known)
    assert all(row[1] > row[0] for row in found[PROBE])
    parts = [stable_hash(ranking.prompt)[0] % controls.FOLDS for ranking in rankings]
    turned = [dataclasses.replace(row, ranks=(1, 2)) for row, part in zip(rankings, parts) if part == 0]
    both = [*turned, *(row for row, part in zip(rankings, parts) if part and len(row.images) == 2)]
    scores = controls.ranking_controls(both, known)[PROBE]
    assert all(row[1] > row[0] for row in scores[: len(turned)]), "those of a part are judged by the other parts"
    assert np.isnan(found[PROBE][7][2])
    assert {value for row in found[MAKER] for value in row[:2]} == {0.5}, "its own prompt says nothing of a maker"


def test_exchanged_prompts_are_others():
    found = controls.exchanged(["a", "b", "a", "c"])
    assert found.keys() == {"a", "b", "c"}
    assert all(one != other for one, other in found.items())
    assert sorted(found.values()) == ["a", "b", "c"]
    assert controls.exchanged(["a"]) == {"a": "a"}


def test_how_far_a_model_is_ahead():
    """The model is right in 3 of 4 pairs, the control in 1: 50 points ahead."""
    ranks = [(1, 2)] * 4
    model = count_pairs(ranks, [np.array(row, float) for row in ([1, 0], [1, 0], [1, 0], [0, 1])])
    control = count_pairs(ranks, [np.array(row, float) for row in ([1, 0], [0, 1], [0, 1], [0, 1])])
    prompts = ["p", "p", "q", "r"]
    found = standing([model], control, prompts)
    assert (found.accuracy, found.ahead) == (25, 50)
    # By prompt the model is ahead by 1 of 2, 1 of 1 and 0 of 1 pairs: no resample is below 0 or above 1.
    assert found.interval == (0, 100)
    assert str(found) == "25.0; +50.0 (+0.0 to +100.0)"
    alike = standing([model], model, prompts)
    assert (alike.ahead, alike.interval) == (0, (0, 0)), "resampled together, a model is not ahead of itself"


def test_pairs_as_rankings_of_two():
    scores, mask = np.array([[1, 0], [0, 1], [1, 1], [1, 0]]), np.array([True, True, True, False])
    found, expected = pair_counts(scores, mask), count_pairs([(1, 2)] * 3, list(scores[:3].astype(float)))
    for name in ("pairs", "strict", "correct"):
        assert getattr(found, name)[:3].tolist() == getattr(expected, name).tolist()
        assert getattr(found, name)[3] == 0


# ------------------------------------------------------------------------------ comparisons of runs


def answers(rng, share, seeds=5, prompts=60, each=10):
    return [rng.random(prompts * each) < share for _ in range(seeds)], np.repeat(np.arange(prompts), each)


def test_a_difference_is_told_and_its_interval_is_a_paired_one():
    rng = np.random.default_rng(1)
    worse, prompts = answers(rng, 0.6)
    better = [row | (rng.random(len(row)) < 0.25) for row in worse]  # right where the other is, and in more
    found = compare(better, worse, prompts)
    assert found.difference == pytest.approx(np.mean(better) - np.mean(worse))
    assert (found.verdict, found.by_seed[0]) == ("better", pytest.approx(better[0].mean() - worse[0].mean()))
    # Standard errors of 3,000 independent answers of variance 0.09: 0.0055, or 1.1 points at 95 %.
    low, high = found.interval
    assert 0.006 < (high - low) / 2 < 0.018
    turned = compare(worse, better, prompts)
    assert (turned.verdict, turned.interval) == ("worse", pytest.approx((-high, -low)))


def test_what_cannot_be_told_says_how_many_seeds_would():
    """Seeds differ by 4 points either way, of 1 point that is there: some 2.8^2 x 16 seeds."""
    prompts = np.repeat(np.arange(200), 100)
    one = np.zeros(20_000, bool)
    first = [np.arange(20_000) % 100 < count for count in (6, 6, 0, 0, 0)]  # of every prompt alike
    first[2] = np.arange(20_000) % 100 < 5
    found = compare(first, [one | (np.arange(20_000) % 100 < 2.4) for _ in range(5)], prompts)
    spread, difference = np.std(found.by_seed, ddof=1), found.difference
    assert found.verdict == "cannot tell"
    assert found.seeds_needed == int(np.ceil((2.8 * spread / difference) ** 2))
    assert f"cannot tell, {found.seeds_needed} seeds would" in str(found)


def test_the_interval_has_the_spread_of_the_seeds():
    """Of prompts that are all alike only seeds differ: Student's interval of their mean."""
    prompts = np.repeat(np.arange(50), 100)
    first = [np.arange(5000) % 100 < 50 + ahead for ahead in (0, 2, 5, 9)]
    found = compare(first, [np.arange(5000) % 100 < 50] * 4, prompts)
    half = stats.t.ppf(0.975, 3) * np.std([0, 0.02, 0.05, 0.09], ddof=1) / 2
    assert found.interval == pytest.approx((0.04 - half, 0.04 + half))


def test_the_interval_has_the_spread_of_the_prompts():
    """Of seeds that are all alike only prompts differ, of ten pairs each."""
    right = np.array([0, 2, 4, 4, 6, 9])
    first = [(np.arange(10)[None] < right[:, None]).ravel()] * 3
    found = compare(first, [np.zeros(60, bool)] * 3, np.repeat(np.arange(6), 10))
    half = stats.t.ppf(0.975, 5) * np.std(right / 10, ddof=1) / np.sqrt(6)
    assert found.interval == pytest.approx((right.mean() / 10 - half, right.mean() / 10 + half))


@pytest.mark.parametrize(("seeds", "spread"), [(5, 0.0), (3, 0.1), (5, 0.1)])
def test_one_in_twenty_intervals_misses_what_is_there(seeds, spread):
    """Two ways that are equal but for chance: of seeds, of prompts, of pairs."""
    rng, missed, times = np.random.default_rng(3), 0, 400
    prompts = np.repeat(np.arange(40), 10)
    for _ in range(times):
        of_prompts = 0.1 * rng.standard_normal(40)[prompts]
        first, second = (
            [rng.random(400) < 0.6 + side * of_prompts + spread * rng.standard_normal() for _ in range(seeds)]
            for side in (1, -1)
        )
        low, high = compare(first, second, prompts).interval
        missed += low > 0 or high < 0
    assert 0.015 < missed / times < 0.085  # 5 %, three standard errors of 400 draws either way


def test_one_seed_says_so():
    prompts = np.repeat(np.arange(100), 5)
    found = compare([np.ones(500, bool)], [np.arange(500) % 5 > 0], prompts)
    assert (found.difference, found.seeds_needed) == (pytest.approx(0.2), None)
    assert str(found).endswith(": better, of one seed")


def test_too_few_prompts_are_not_made_good_by_seeds():
    prompts = np.arange(6)
    first = [np.array([1, 1, 1, 1, 0, 0], bool)] * 3
    second = [np.array([0, 0, 1, 1, 1, 0], bool)] * 3
    assert compare(first, second, prompts).seeds_needed is None
    assert str(compare(first, second, prompts)).endswith("cannot tell, nor would more seeds")
    with pytest.raises(ValueError, match="same seeds"):
        compare(first, second[:2], prompts)


def test_pairs_vote_and_not_their_bytes():
    """Two of three are won by the smaller file, the third by a much larger one."""
    images = [image(str(i), size, 0.1 * i) for i, size in enumerate((10, 20, 30, 1000))]
    found = controls.record_controls(records(images, [(0, 1, 1.0), (1, 2, 1.0), (3, 0, 1.0)], "x"), [HELD_OUT[0]])
    assert found[FILE_SIZE].tolist() == [[-1000, -30]]


def test_one_image_of_which_nothing_is_known_is_enough():
    sizes = [*IMAGES[:2], dataclasses.replace(IMAGES[2], file_bytes=0), IMAGES[3]]
    assert set(controls.record_controls(records(sizes, TRAINING), HELD_OUT)) == {MAKER, PROBE}
    known = [KnownImage(5, maker, np.array([float(i)])) for i, maker in enumerate(("a", "b", None))]
    assert set(controls._controls([(known[1], known[0])], known)) == {FILE_SIZE, PROBE}


def test_no_more_than_the_most_pairs_are_fitted_to(monkeypatch):
    monkeypatch.setattr(controls, "MOST_PAIRS", 2)  # of the training pairs the first and the last: one won, one lost
    np.testing.assert_allclose(controls.record_controls(records(IMAGES, TRAINING), HELD_OUT)[MAKER], 0.5)
    sizes = []
    monkeypatch.setattr(controls, "linear_probe", lambda chosen, _: sizes.append(len(chosen)) or np.zeros(1))
    rankings = [Ranking(f"prompt {i}", ("a", "b"), (1, 2)) for i in range(40)]
    known = {(ranking.prompt, name): KnownImage(1, None, np.zeros(1)) for ranking in rankings for name in "ab"}
    controls.ranking_controls(rankings, known)
    assert sizes == [2] * controls.FOLDS


def test_prompts_are_exchanged_with_those_half_the_list_away():
    assert controls.exchanged(["a", "b", "c", "d"]) == {"a": "c", "b": "d", "c": "a", "d": "b"}


def test_a_model_is_the_mean_of_its_draws():
    ranks, won, lost = [(1, 2)] * 4, [1.0, 0.0], [0.0, 1.0]
    right, half = (count_pairs(ranks, [np.array(row) for row in rows]) for rows in ([won] * 4, [won] * 2 + [lost] * 2))
    assert standing([right, half], half, ["p"] * 4).ahead == 25


def test_a_probe_of_pairs_that_are_all_told_has_a_limit():
    """Where log(1 + exp(-2 w)), the loss of each pair, and w^2 / 1000 are least together."""
    (weight,) = controls.linear_probe(np.ones((5, 1)), -np.ones((5, 1)))
    assert 1 / (1 + np.exp(2 * weight)) == pytest.approx(1e-3 * weight, rel=1e-2)


def test_no_empty_prompt_where_the_encoder_is_not_there(monkeypatch):
    def missing(*_):
        raise FileNotFoundError

    monkeypatch.setattr(controls, "load_prompt_encoder", missing)
    assert controls.no_prompt(EncodersConfig("tiny", 8), None) is None


def test_prompts_of_unequal_numbers_of_pairs():
    """A ratio of 1/4; its parts are (1 - 1/4) / 2 and (0 - 3/4) / 2, whose mean has the deviation 0.375."""
    found = compare([np.array([1, 0, 0, 0], bool)] * 2, [np.zeros(4, bool)] * 2, np.array([0, 1, 1, 1]))
    half = stats.t.ppf(0.975, 1) * 0.375
    assert found.interval == pytest.approx((0.25 - half, 0.25 + half))


def test_two_seeds_and_two_prompts_by_hand():
    """Parts ((1, 0.5), (0, 0)): variances of the mean 9/64 by seed, 1/64 by prompt, 1/64 left."""
    first = [np.array([1, 1, 1, 0], bool), np.zeros(4, bool)]
    found = compare(first, [np.zeros(4, bool)] * 2, np.array([0, 0, 1, 1]))
    half = stats.t.ppf(0.975, 1) * np.sqrt(8 / 64 + 1 / 64)
    assert found.interval == pytest.approx((0.375 - half, 0.375 + half))
    assert found.seeds_needed == 16  # 2 (8/64 + 1/64) / (0.375 / 2.8)^2 = 15.7


def test_more_seeds_are_more_than_there_are():
    """Five standard errors, which Student's 12.7 for two seeds hide."""
    first = [np.arange(40) % 10 < right for right in (4, 6)]
    found = compare(first, [np.zeros(40, bool)] * 2, np.repeat(np.arange(4), 10))
    assert (found.verdict, found.seeds_needed) == ("cannot tell", 3)
