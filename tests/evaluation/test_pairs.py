"""The scorer of records against the public scores, level by level, and its batches against the memory there is."""

import dataclasses

import jax
import numpy as np
import pytest

from dinalrm_jax.data.records import Records
from dinalrm_jax.devices.mesh import MeshConfig, make_mesh
from dinalrm_jax.devices.placement import place
from dinalrm_jax.evaluation.controls import no_prompt
from dinalrm_jax.evaluation.pairs import PairScorer
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.encoding import EncodersConfig
from dinalrm_jax.model.reward import reward_functional
from dinalrm_jax.noise import NoiseDraw, draw_noise
from dinalrm_jax.scenes.config import ScenesConfig
from dinalrm_jax.scenes.records import write_scene_records

LEVELS = (0.0, 0.2, 0.6, (0.2, 0.6))
PAIRS = 7
DRAW = NoiseDraw(5)


@pytest.fixture(scope="module")
def records(scene_model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("evaluated") / "data"
    scenes = ScenesConfig(train_pairs=1, eval_pairs=PAIRS, image_size=32)
    write_scene_records(directory, scenes, scene_model.config.encoders)
    return Records(directory)


def make_scorer(model, records, batch_size=8, mesh=MeshConfig(data=1), fits=lambda program: True, levels=LEVELS):
    module = reward_functional(model.config, model.execution)
    mesh = make_mesh(mesh)
    params = place(model.params, np.float32, module.shardings(mesh))
    scorer = PairScorer(module, records, "eval", mesh, batch_size=batch_size)
    scorer.compile(params, levels, fits)
    return scorer, params


def expected_scores(model, records, pair, role, level, shared):
    image = records.images[getattr(pair, role)]
    text = records.prompts[pair.prompt]
    prompt = jax.tree.map(
        lambda x: x[None], type(model.encode_prompt(["a"]))(text.prompt_embeds, text.pooled_prompt_embeds)
    )
    latents = image.latents[None].astype(np.float32)
    noise = None if shared else draw_noise(NoiseDraw(5).keys([image.name]), latents.shape)
    return model.score_latents(latents, prompt, level, noise, seed=5)[0]


@pytest.mark.parametrize("mesh", [MeshConfig(data=1), MeshConfig(data=2, fsdp=2)])
def test_scores_are_the_public_ones_level_by_level(scene_model, records, mesh):
    """With every image's own noise, and with one for all; on one device, and on four."""
    scorer, params = make_scorer(scene_model, records, mesh=mesh)
    for shared in (False, True):
        scores = scorer.run(params, LEVELS, NoiseDraw(5, shared))
        assert scores.levels == LEVELS
        pairs = [(pair.chosen, pair.rejected, pair.prompt) for pair in scorer.pairs]
        assert scores.records.tolist() == list(map(list, pairs))
        for row, level in enumerate(LEVELS):
            for number, pair in enumerate(scorer.pairs):
                for role in ("chosen", "rejected"):
                    expected = expected_scores(scene_model, records, pair, role, level, shared)
                    assert getattr(scores, role)[row, number] == pytest.approx(expected, abs=1e-4), (level, role)


def test_accuracy_counts_equal_scores_as_wrong(scene_model, records):
    scorer, params = make_scorer(scene_model, records, levels=(0.2,))
    scores = scorer.run(params, (0.2,), DRAW)
    tied = type(scores)(scores.levels, scores.rejected, scores.rejected, scores.kinds, scores.records)
    assert tied.accuracy(0.2) == 0


def test_one_level_and_an_ensemble_of_one(scene_model, records):
    scorer, params = make_scorer(scene_model, records, levels=(0.2, (0.2,)))
    single, ensemble = scorer.run(params, (0.2, (0.2,)), DRAW).chosen
    np.testing.assert_allclose(single, ensemble, atol=1e-5)


def test_a_record_is_read_once_for_all_levels(scene_model, records, monkeypatch):
    scorer, params = make_scorer(scene_model, records)
    read, seen = scorer._read, []

    def reading(rows, **how):
        seen.extend(rows.tolist())
        return read(rows, **how)

    monkeypatch.setattr(scorer, "_read", reading)
    scorer.run(params, LEVELS, DRAW)
    assert len(LEVELS) > 1
    assert sorted(seen) == list(range(scorer.row_count()))


def test_max_pairs_are_spread_over_all(scene_model, records):
    pairs = records.pairs("eval")
    module = reward_functional(scene_model.config, scene_model.execution)
    scorer = PairScorer(module, records, "eval", make_mesh(MeshConfig(data=1)), batch_size=8, max_pairs=3)
    assert scorer.pairs == [pairs[0], pairs[3], pairs[6]]


def test_a_batch_is_as_large_as_the_memory_allows(scene_model, records, capsys):
    """Halved until it fits, the scores being the same; where a row a device does not, an error says so."""
    whole, params = make_scorer(scene_model, records, levels=(0.2,))
    asked = []

    def two_rows_fit(program):
        (_, latents, *_), _ = program.in_avals
        asked.append(latents.shape[0])
        return latents.shape[0] <= 2

    small, _ = make_scorer(scene_model, records, fits=two_rows_fit, levels=(0.2,))
    assert asked == [8, 4, 2]
    assert "trying 2" in capsys.readouterr().out
    expected = whole.run(params, (0.2,), DRAW).chosen
    np.testing.assert_allclose(small.run(params, (0.2,), DRAW).chosen, expected, atol=1e-5)
    asked.clear()
    with pytest.raises(ConfigError, match="does not fit"):
        make_scorer(scene_model, records, 12, MeshConfig(data=4), lambda program: two_rows_fit(program), levels=(0.2,))
    assert asked == [12, 4], "whole rows on every device"
    with pytest.raises(ConfigError, match=r"of 4 latents \(4, 4, 16\) does not fit .*mesh.fsdp"):
        make_scorer(scene_model, records, mesh=MeshConfig(data=4), fits=lambda program: False, levels=(0.2,))


def test_levels_that_do_not_exist_are_refused(scene_model, records):
    for levels, message in (((0.2, 4.0), r"sigma must lie in \[0, 1\]"), ((), "at least one noise level")):
        with pytest.raises(ValueError, match=message):
            make_scorer(scene_model, records, levels=levels)


def test_a_broken_model_is_noticed_at_its_first_batch(scene_model, records):
    broken = dataclasses.replace(scene_model, params={k: v * np.nan for k, v in scene_model.params.items()})
    scorer, params = make_scorer(broken, records, levels=(0.2,))
    with pytest.raises(ValueError, match="the model scores NaN"):
        scorer.run(params, (0.2,), DRAW)


def test_prompts_exchanged(scene_model, records):
    """The same images under other prompts, by the programs that are there; where there is one prompt, nothing."""
    scorer, params = make_scorer(scene_model, records)
    other = scorer.with_prompts_exchanged()
    scores = other.run(params, LEVELS, DRAW)
    texts = [records.prompts[pair.prompt].text for pair in scorer.pairs]
    exchanged = [records.prompts[pair.prompt].text for pair in other.pairs]
    assert all(one != two for one, two in zip(texts, exchanged))
    assert len(set(exchanged)) >= len(set(texts)) - 1, "all under each other's, not under one"
    for number, (before, after) in enumerate(zip(scorer.pairs, other.pairs)):
        assert (before.chosen, before.rejected, before.kind) == (after.chosen, after.rejected, after.kind)
        for role, found in (("chosen", scores.chosen), ("rejected", scores.rejected)):
            expected = expected_scores(scene_model, records, after, role, 0.6, shared=False)
            assert found[2, number] == pytest.approx(expected, abs=1e-5)
    assert len(scorer.run(params, LEVELS, DRAW).kinds) == PAIRS  # which it leaves as it was
    other._take([dataclasses.replace(pair, prompt=0) for pair in other.pairs])
    assert other.with_prompts_exchanged() is None


def test_all_pairs_under_one_prompt(scene_model, records):
    """The empty prompt in the place of each pair's own, by the programs that are there."""
    scorer, params = make_scorer(scene_model, records, levels=(0.6,))
    blank = no_prompt(scene_model.config.encoders, None)
    scores = scorer.with_prompt(blank).run(params, (0.6,), DRAW)
    for number, pair in enumerate(scorer.pairs):
        image = records.images[pair.chosen]
        latents = image.latents[None].astype(np.float32)
        noise = draw_noise(NoiseDraw(5).keys([image.name]), latents.shape)
        expected = scene_model.score_latents(latents, scene_model.encode_prompt([""]), 0.6, noise)[0]
        assert scores.chosen[0, number] == pytest.approx(expected, abs=2e-3)  # the prompt is held in float16
    own = scorer.run(params, (0.6,), DRAW)
    assert np.abs(own.chosen - scores.chosen).min() > 1e-3, "which reads its own again"
    assert no_prompt(EncodersConfig("sd3", 8), None) is None
