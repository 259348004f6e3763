"""Further views of training pairs: crops of the image, mirrored where the prompt names no side."""

import io
import types
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from dinalrm_jax.data.config import PreparationConfig
from dinalrm_jax.data.latents import EncodedImages
from dinalrm_jax.data.preferences import Preference, Source
from dinalrm_jax.data.records import RecordsError
from dinalrm_jax.data.views import LEAST_SIDE, open_view, with_views
from dinalrm_jax.mapping import ConfigError

# Every pixel says where it is: red its row, green its column.
PIXELS = np.stack(np.broadcast_arrays(*np.ogrid[:100, :60], np.zeros((), int)), axis=-1).astype(np.uint8)


def open_image(name):
    assert name == "a/b.png"
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG")
    file.seek(0)
    return file


def pixels_of(name):
    return np.asarray(Image.open(open_view(open_image, name)))


def test_a_view_is_a_part_of_the_image_and_the_same_every_time():
    for number in range(1, 6):
        found = pixels_of(f"@{number}/a/b.png")
        assert np.array_equal(found, pixels_of(f"@{number}/a/b.png"))
        height, width, _ = found.shape
        assert 100 * LEAST_SIDE <= height <= 100
        assert abs(width - 0.6 * height) <= 1, "of the image's shape"
        top, left, _ = found[0, 0]
        assert np.array_equal(found, PIXELS[top : top + height, left : left + width])
    assert not np.array_equal(pixels_of("@1/a/b.png"), pixels_of("@2/a/b.png"))


def test_a_mirrored_view_runs_the_other_way():
    columns = pixels_of("@1m/a/b.png")[0, :, 1].astype(int)
    assert np.all(np.diff(columns) == -1)
    assert np.array_equal(np.asarray(Image.open(open_view(open_image, "a/b.png"))), PIXELS), "no view, no change"


def source(prompts):
    pairs = [Preference(prompt, "x.png", "y.png", label=0.75) for prompt in prompts]
    return Source({"train": pairs, "eval": pairs[:1]}, Counter(), open_image)


def test_pairs_of_views_stand_beside_their_pairs():
    prompts = [f"a cat number {i}" for i in range(40)] + [f"a cat left of dog {i}" for i in range(40)]
    found = with_views(source(prompts), 2)
    assert len(found.preferences["train"]) == 3 * 80
    assert len(found.preferences["eval"]) == 1, "what is held out stays as it is"
    views = found.preferences["train"][80:]
    assert {view.label for view in views} == {0.75}
    for view in views:
        number, _, name = view.chosen.partition("/")
        assert (name, view.rejected) == ("x.png", f"{number}/y.png"), "both images are mirrored or none"
    mirrored = [view.prompt for view in views if view.chosen.startswith(("@1m", "@2m"))]
    assert 20 < len(mirrored) < 60, "about half of those that may be"
    assert not [prompt for prompt in mirrored if "left" in prompt]


@pytest.mark.parametrize("prompt", ['a shirt "hello"', "a sign that says no", "turn Right"])
def test_what_is_to_be_read_is_not_mirrored(prompt):
    views = with_views(source([prompt]), 20).preferences["train"][1:]
    assert not [view for view in views if view.chosen.partition("/")[0].endswith("m")]


def test_a_view_goes_to_its_images_bucket():
    """The size is that of the image's own header: a view of a small one is not too small."""
    codec = types.SimpleNamespace(downsampling=8, fingerprint="x")
    images = EncodedImages(lambda name: open_view(open_image, name), codec, PreparationConfig("jsonl"))
    assert images.size("@1m/a/b.png") == images.size("a/b.png") == (100, 60, "RGB")


def test_a_source_without_training_pairs_has_no_views():
    with pytest.raises(RecordsError, match="the source has none; leave --views out"):
        with_views(Source({"eval": []}, Counter(), open_image), 1)


def test_latents_are_not_cut():
    with pytest.raises(ConfigError, match="views"):
        PreparationConfig("dinalrm", views=1)
