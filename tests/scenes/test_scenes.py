import functools
import itertools

import numpy as np
import pytest

from dinalrm_jax.encoders import tiny
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.encoding import EncodersConfig
from dinalrm_jax.scenes import draw
from dinalrm_jax.scenes.config import SceneCaptionsConfig, ScenesConfig
from dinalrm_jax.scenes.draw import COUNTS, Group
from dinalrm_jax.scenes.records import write_scene_records

scene_pairs = functools.partial(draw.scene_pairs, by="combinations", two_groups=0.3)


def test_held_out_combinations_are_never_seen_in_training():
    assert not set(draw.HELD_OUT) & set(draw.TRAINED)
    assert {color for color, _ in draw.TRAINED} == set(draw.COLORS)
    assert {shape for _, shape in draw.TRAINED} == set(draw.SHAPES)
    for held_out in (False, True):
        allowed = draw.HELD_OUT if held_out else draw.TRAINED
        for pair in scene_pairs(200, 16, 0, held_out=held_out):
            for part in pair.caption.split(" and "):
                _, color, shape, *_ = part.split()
                assert (color, shape.removesuffix("s")) in allowed


def test_scenes_of_one_group_are_360():
    """A world without scenes of two groups has 360 captions; a fifth of them, 77, is held out."""
    found = [draw.draw_captions(count, 0, held_out=kept, two_groups=0.0) for count, kept in ((283, False), (77, True))]
    assert len({*found[0], *found[1]}) == 360
    assert all(len(draw.parse(caption)) == 1 for captions in found for caption in captions)
    with pytest.raises(ConfigError, match="there are hardly 78 captions of scenes held out, .* 77 were found"):
        draw.draw_captions(78, 0, held_out=True, two_groups=0.0)
    pairs = list(draw.scene_pairs(40, 16, 0, held_out=False, by="captions", two_groups=1.0))
    assert all(len(draw.parse(pair.caption)) == 2 for pair in pairs)
    for share, config in itertools.product((-0.1, 1.5), (ScenesConfig, functools.partial(SceneCaptionsConfig, 5))):
        with pytest.raises(ConfigError, match="two_groups is a share of scenes, from 0 to 1"):
            config(two_groups=share)


def test_encoders_that_cut_captions_short_are_refused(tmp_path):
    """At as many words as the longest of them has, neither sooner nor later."""
    for two_groups, words in ((0.0, 6), (0.5, 13)):
        config = ScenesConfig(train_pairs=8, eval_pairs=4, image_size=32, two_groups=two_groups)
        captions = [pair.caption for pair in scene_pairs(40, 16, 0, held_out=False, two_groups=two_groups)]
        assert max(len(caption.split()) for caption in captions) == words
        with pytest.raises(
            ConfigError, match=f"captions have up to {words} words, of which the encoders read {words - 1}"
        ):
            write_scene_records(tmp_path / "cut", config, EncodersConfig("tiny", words - 1))
        write_scene_records(tmp_path / f"{words}", config, EncodersConfig("tiny", words))


@pytest.mark.parametrize("combinations", [draw.TRAINED, draw.HELD_OUT], ids=["trained", "held out"])
def test_violations_stay_within_their_combinations(combinations):
    """Else an unseen look would give the chosen or the rejected image away."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        scene = draw.draw_scene(rng, combinations, 0.3)
        kinds = draw.VIOLATIONS if len(scene) == 2 else draw.VIOLATIONS[:-1]
        for kind in kinds:
            broken = draw.violate(scene, kind, rng, combinations)
            assert broken != scene
            for group in broken:
                assert (group.color, group.shape) in combinations


def test_a_violation_breaks_exactly_what_it_says():
    scene = (Group(2, "red", "circle", "left"), Group(1, "blue", "star", "right"))
    rng = np.random.default_rng(0)
    changed = {kind: draw.violate(scene, kind, rng, draw.TRAINED) for kind in ("color", "shape", "count", "position")}
    attribute = {"color": "color", "shape": "shape", "count": "count", "position": "side"}
    for kind, broken in changed.items():
        differing = {
            name
            for before, after in zip(scene, broken)
            for name in ("count", "color", "shape", "side")
            if getattr(before, name) != getattr(after, name)
        }
        assert differing == {attribute[kind]}
    exchanged = draw.violate(scene, "exchange", rng, draw.TRAINED)
    assert [group.side for group in exchanged] == ["right", "left"]


def test_pictures_show_the_caption():
    """Count, colour and side, measured in the pixels: as many red islands as said, in the half said."""
    rng = np.random.default_rng(1)
    for count, side in itertools.product((1, 2, 3), ("left", "right", "top", "bottom")):
        image = draw.render((Group(count, "red", "square", side),), 64, rng).astype(int)
        red = (image[..., 0] > 170) & (image[..., 1:] < 110).all(axis=-1)
        rows, columns = np.nonzero(red)
        centre = {"left": columns, "right": 63 - columns, "top": rows, "bottom": 63 - rows}[side]
        assert centre.max() < 32
        assert _islands(red) == count
    assert draw.caption((Group(3, "red", "ring", "top"),)) == "three red rings on the top"
    assert len(COUNTS) == 3


def _islands(mask: np.ndarray) -> int:
    mask, islands = mask.copy(), 0
    while mask.any():
        islands += 1
        stack = [tuple(np.argwhere(mask)[0])]
        while stack:
            row, column = stack.pop()
            if 0 <= row < mask.shape[0] and 0 <= column < mask.shape[1] and mask[row, column]:
                mask[row, column] = False
                stack += [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]
    return islands


def test_pairs_depend_on_seed_and_index_only():
    first = list(scene_pairs(6, 32, 5, held_out=False))
    longer = list(scene_pairs(9, 32, 5, held_out=False))
    for a, b in zip(first, longer):
        assert (a.caption, a.kind) == (b.caption, b.kind)
        np.testing.assert_array_equal(a.rejected, b.rejected)
    other = next(scene_pairs(1, 32, 6, held_out=False))
    assert np.abs(other.chosen.astype(int) - first[0].chosen).max() > 0


def test_codec_keeps_low_frequencies_and_drops_the_rest():
    rng = np.random.default_rng(0)
    smooth = draw.render((Group(2, "blue", "circle", "left"),), 64, rng)
    latents = tiny.encode_image(smooth)
    assert latents.shape == (8, 8, 16)
    # What was kept comes back: decoding then encoding changes latents only by byte rounding.
    again = tiny.encode_image(tiny.decode_latents(latents * 0.5))
    np.testing.assert_allclose(again, latents * 0.5, atol=0.05)
    # Linear: the codec of a constant grey block is one luma number.
    grey = tiny.encode_image(np.full((8, 8, 3), 255, np.uint8))
    assert np.flatnonzero(np.abs(grey) > 1e-4).tolist() == [0]
    checkerboard = np.indices((8, 8)).sum(axis=0) % 2
    fine = tiny.encode_image(np.repeat(checkerboard[..., None] * 255, 3, axis=2).astype(np.uint8))
    # Its pixels have norm 8; of what alternates every pixel, next to nothing may pass.
    assert np.linalg.norm(fine) < 0.6
    with pytest.raises(ValueError, match="sides divisible by 8"):
        tiny.encode_image(np.zeros((8, 12, 3), np.uint8))


def test_prompt_embedding_reads_words_and_their_order():
    embeds, pooled = tiny.encode_prompts(["red circle", "Circle, RED!", "blue circle", ""], 4, 32)
    np.testing.assert_allclose(pooled[0], pooled[1], atol=1e-6)  # the same words
    assert np.abs(embeds[0] - embeds[1]).max() > 0.5  # in another order
    np.testing.assert_array_equal(embeds[0, 1], embeds[2, 1])  # the same word at the same place
    assert not embeds[3].any()
    assert not pooled[3].any()
    assert not embeds[0, 2:].any()
