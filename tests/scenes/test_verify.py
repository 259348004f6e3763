"""The rules that read a picture of a scene, on pictures that passed the codec."""

import dataclasses

import numpy as np
import pytest

from dinalrm_jax.encoders import tiny
from dinalrm_jax.scenes import draw
from dinalrm_jax.scenes.verify import read_scene, verify

PAIRS = 300


def seen(image):
    return tiny.decode_latents(tiny.encode_image(image))


@pytest.fixture(scope="module")
def pairs():
    return [
        pair
        for held_out in (False, True)
        for pair in draw.scene_pairs(PAIRS, 64, 21, held_out=held_out, by="combinations", two_groups=0.3)
    ]


def test_true_scenes_are_accepted_and_broken_ones_are_not(pairs):
    """At least 99 % and at most 3 %: a single object in a corner is on two sides, and no rule can tell them apart."""
    assert np.mean([verify(pair.caption, seen(pair.chosen)).correct for pair in pairs]) >= 0.99
    broken = [pair for pair in pairs if pair.kind.startswith("prompt/")]
    assert np.mean([verify(pair.caption, seen(pair.rejected)).correct for pair in broken]) <= 0.03


@pytest.mark.parametrize("respect", ["color", "shape", "count"])
def test_it_says_which_respect_is_broken(respect):
    rng = np.random.default_rng(3)
    right = 0
    for _ in range(40):
        scene = draw.draw_scene(rng, draw.COMBINATIONS, 0.0)
        image = seen(draw.render(draw.violate(scene, respect, rng, draw.COMBINATIONS), 64, rng))
        found = dataclasses.asdict(verify(draw.caption(scene), image))
        right += {name for name, share in found.items() if share < 1} == {respect}
    assert right >= 38  # as many as true scenes are accepted, and one by chance


def test_groups_that_changed_their_places():
    rng = np.random.default_rng(5)
    scene = draw.parse("two red circles on the left and one blue star on the right")
    image = seen(draw.render(draw.violate(scene, "exchange", rng, draw.COMBINATIONS), 64, rng))
    verdict = verify(draw.caption(scene), image)
    assert (verdict.count, verdict.color, verdict.shape, verdict.position) == (1, 1, 1, 0)
    assert verdict.share == 0.75
    assert not verdict.correct


def test_an_empty_picture_shows_nothing_and_a_spot_too_many_is_counted():
    rng = np.random.default_rng(0)
    caption = "one green square on the top"
    assert read_scene(np.full((64, 64, 3), 230, np.uint8)) == []
    assert verify(caption, np.full((64, 64, 3), 230, np.uint8)).share == 0
    image = draw.render(draw.parse(caption), 64, rng).copy()
    assert verify(caption, seen(image)).correct
    image[50:58, 4:12] = (200, 30, 30)
    assert verify(caption, seen(image)).count < 1


def test_captions_are_read_back():
    for caption in draw.draw_captions(50, 1, held_out=False, two_groups=0.3):
        assert draw.caption(draw.parse(caption)) == caption
        assert not draw.is_held_out(caption)
    for text in ("a red fox", "two red circle on the left", "one pink star on the top", ""):
        with pytest.raises(ValueError, match="no caption of a scene"):
            draw.parse(text)


def test_held_out_captions_are_not_trained_on():
    train = {pair.caption for pair in draw.scene_pairs(200, 16, 0, held_out=False, by="captions", two_groups=0.3)}
    kept = {pair.caption for pair in draw.scene_pairs(60, 16, 0, held_out=True, by="captions", two_groups=0.3)}
    assert not train & kept
    looks = {(group.color, group.shape) for caption in train for group in draw.parse(caption)}
    assert looks & set(draw.HELD_OUT)  # all combinations are trained on
