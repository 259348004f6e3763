"""Preference pairs of several pictures of one caption, ordered by rules with errors."""

import collections

import numpy as np
import pytest

from configs import quickstart
from dinalrm_jax import train
from dinalrm_jax.config import TrainConfig
from dinalrm_jax.data.records import Records
from dinalrm_jax.encoders import tiny
from dinalrm_jax.mapping import ConfigError, from_mapping
from dinalrm_jax.model.encoding import EncodersConfig
from dinalrm_jax.scenes import draw, samples
from dinalrm_jax.scenes.config import SamplesConfig
from dinalrm_jax.scenes.samples import BROKEN_WORTH, broken, sample_captions, worth, write_sample_records


def sample(captions, numbers, steps):
    """A generator that gets the shape of every third picture wrong, and with few steps also the count."""
    latents = []
    for caption, number in zip(captions, numbers):
        rng = np.random.default_rng([len(caption), number])
        scene = draw.parse(caption)
        if number % 3 == 0:
            scene = draw.violate(scene, "shape", rng, draw.COMBINATIONS)
        if steps < 5:
            scene = draw.violate(scene, "count", rng, draw.COMBINATIONS)
        latents.append(tiny.encode_image(draw.render(scene, 64, rng)))
    return np.stack(latents)


def written(tmp_path, error):
    config = SamplesConfig(train_captions=12, eval_captions=4, steps=(8, 8, 3), pairs=5, error=error)
    write_sample_records(tmp_path, config, sample_captions(config, 0.3), EncodersConfig("tiny", 16), sample)
    return Records(tmp_path)


def worths(records, split):
    """(chosen, rejected) of every pair; what is broken on purpose is worth what it was given."""
    values = []
    for place in range(len(records.pairs(split))):
        pair = records.pairs(split)[place]
        caption = records.prompts[pair.prompt].text
        kinds = pair.kind.split("/")
        values.append([
            BROKEN_WORTH if kind == "broken" else worth(caption, records.images[image].latents)
            for kind, image in zip(kinds, (pair.chosen, pair.rejected))
        ])  # fmt: skip
    return np.array(values)


def test_pairs_are_ordered_by_worth(tmp_path):
    records = written(tmp_path / "data", error=0.0)
    values = worths(records, "train")
    assert len(values) > 40
    assert (values[:, 0] > values[:, 1]).all()
    kinds = collections.Counter(records.pairs("train")[n].kind for n in range(len(values)))
    assert {"sample/sample", "scene/sample", "scene/broken"} <= set(kinds)
    held_out = {records.prompts[records.pairs("eval")[n].prompt].text for n in range(len(records.pairs("eval")))}
    assert all(draw.is_held_out(caption) for caption in held_out)


def test_people_err_where_pictures_are_alike(tmp_path):
    values = worths(written(tmp_path / "data", error=1.5), "train")
    wrong, gap = values[:, 0] < values[:, 1], np.abs(values[:, 0] - values[:, 1])
    assert 0.05 < wrong.mean() < 0.5
    assert gap[wrong].mean() < gap[~wrong].mean()


def test_every_round_has_pictures_of_its_own(tmp_path, monkeypatch):
    """Samples of other numbers, a scene and a broken picture of its own; pairs compare pictures of one round."""
    monkeypatch.setattr(samples, "CAPTIONS", 2)  # at once, fewer than there are
    asked = {}

    def noted(captions, numbers, steps):
        found = sample(captions, numbers, steps)
        asked.update({(steps, number, caption): latents for caption, number, latents in zip(captions, numbers, found)})
        return found

    config = SamplesConfig(train_captions=5, eval_captions=3, rounds=3, steps=(8, 3), pairs=4)
    captions = sample_captions(config, 0.0)
    write_sample_records(tmp_path / "data", config, captions, EncodersConfig("tiny", 16), noted)
    assert len(asked) == 8 * 3 * 2
    assert {(steps, number) for steps, number, _ in asked} == {(8, 0), (3, 1), (8, 2), (3, 3), (8, 4), (3, 5)}
    records = Records(tmp_path / "data")
    texts = [records.prompts[number].text for number in range(len(records.prompts))]
    assert texts == [*captions["train"], *captions["eval"]]
    assert all(" and " not in text for text in texts)
    images = [records.images[number] for number in range(len(records.images))]
    assert len({image.name for image in images}) == len(images) == 8 * 3 * 4
    assert len({image.latents.tobytes() for image in images}) == len(images)
    for image in images:
        split, prompt, number, member = image.name.split("/")
        if member in ("0-sample", "1-sample"):
            known = asked[(8, 3)[int(member[0])], 2 * int(number) + int(member[0]), texts[int(prompt)]]
            np.testing.assert_array_equal(image.latents, known.astype(np.float16))
    for split in ("train", "eval"):
        pairs = [records.pairs(split)[number] for number in range(len(records.pairs(split)))]
        for pair in pairs:
            of_chosen, of_rejected = (images[image].name.split("/") for image in (pair.chosen, pair.rejected))
            assert of_chosen[:3] == of_rejected[:3] == [split, str(pair.prompt), of_chosen[2]]
        assert {images[pair.chosen].name.split("/")[2] for pair in pairs} == {"0", "1", "2"}


def test_more_pairs_than_a_round_has_are_refused():
    with pytest.raises(ConfigError, match="a round's 5 pictures .* make 10 pairs, got pairs 11"):
        SamplesConfig(steps=(8, 8, 3), pairs=11)


@pytest.mark.heavy
def test_a_reward_learns_from_samples_beside_drawn_scenes(tmp_path):
    """A run trains its generator, samples it once, and reports on both kinds of pairs."""
    values = quickstart.values()
    stage = {"steps": 2, "batch_size": 4, "checkpoint_every": 2, "evaluate_every": 2}
    small = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "caption_projection_dim": 16,
             "dual_attention_layers": ()}  # fmt: skip
    taps = {"num_blocks": 1, "visual_taps": (1,), "text_taps": (1,), "lora": {"rank": 2, "alpha": 4.0}}
    config = from_mapping(
        TrainConfig,
        values
        | {
            "model": values["model"] | taps | {"transformer": values["model"]["transformer"] | small},
            "scenes": values["scenes"] | {"train_pairs": 8, "eval_pairs": 4, "held_out": "captions"},
            "samples": {"train_captions": 3, "eval_captions": 2, "steps": (2, 1), "pairs": 2},
            "generator": values["generator"] | {"steps": 2, "batch_size": 4, "checkpoint_every": 2},
            "reward": values["reward"] | stage,
        },
    )
    train.run(config, tmp_path / "run")
    first = (tmp_path / "run" / "samples" / "manifest.json").stat().st_mtime_ns
    scores = train.run(config, tmp_path / "run")
    assert (tmp_path / "run" / "samples" / "manifest.json").stat().st_mtime_ns == first
    assert {kind.partition("/")[0] for kind in scores.kinds} == {"data", "samples"}


def test_what_is_broken_is_seen_to_be():
    rng = np.random.default_rng(0)
    caption = "two purple stars on the left"
    scene = tiny.encode_image(draw.render(draw.parse(caption), 64, rng))
    assert worth(caption, scene) == 5
    assert worth(caption, broken(scene, "blank", rng)) < 1
    scaled = broken(scene, "scaled", rng) / scene
    np.testing.assert_allclose(scaled, scaled[0, 0, 0], rtol=1e-4)
    assert 1.4 <= scaled[0, 0, 0] <= 2.2
    speckled = broken(scene, "speckled", rng) - scene
    assert 0.2 < speckled.std() < 0.65
    assert broken(np.zeros((4, 4, 16)), "bleached", rng).shape == (4, 4, 16)  # of pictures of 32 pixels
    white = tiny.encode_image(np.full((64, 64, 3), 255, np.uint8))
    np.testing.assert_allclose(broken(scene, "bleached", rng), 0.25 * scene + 0.75 * white, rtol=1e-5)
