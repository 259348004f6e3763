"""Images and prompts to scores: the Python methods and the score command."""

import csv
import dataclasses
import json
import pathlib
import subprocess
import sys
import warnings

import jax
import numpy as np
import pytest
from PIL import Image

import dinalrm_jax as dina
from dinalrm_jax.cli.flags import UsageError
from dinalrm_jax.cli.images import find_images, prompts_of
from dinalrm_jax.cli.options import ScoreOptions
from dinalrm_jax.data import files
from dinalrm_jax.data.generated import save_generated
from dinalrm_jax.data.images import scoring_size, trained_size
from dinalrm_jax.evaluation import ranking
from dinalrm_jax.evaluation.scoring import score_images
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.noise import NoiseDraw
from dinalrm_jax.reward_model import ranks
from tests.conftest import ROOT

SIZES = [(64, 64), (48, 80), (64, 64), (80, 48), (64, 64), (64, 64), (48, 80), (64, 64), (64, 64), (64, 64)]
PROMPTS = [
    "a red fox",
    "two dogs",
    "a red fox",
    "",
    "two dogs",
    "one cat",
    "one cat",
    "a red fox",
    "three birds",
    "two dogs",
]


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)) for size in SIZES]


def alone(model, prompt, picture, sigma, seed=0):
    return model.score_latents(model.encode_image([picture]), model.encode_prompt([prompt]), sigma, seed=seed)[0]


def test_images_of_many_sizes_score_as_alone(scene_model, pictures, tmp_path):
    sigma = (0.2, 0.7)
    pictures[1].save(tmp_path / "one.png")
    given = [pictures[0], tmp_path / "one.png", np.asarray(pictures[2]), *pictures[3:]]
    expected = [alone(scene_model, *row, sigma) for row in zip(PROMPTS, pictures)]
    found = scene_model.score(PROMPTS, given, sigma, batch_size=4)
    assert type(found) is list
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(scene_model.score(PROMPTS[:1], given[:1], sigma), expected[:1], atol=1e-5)
    one_prompt = scene_model.score("two dogs", given[4:5], sigma)
    np.testing.assert_allclose(one_prompt, expected[4:5], atol=1e-5)


def test_samples_are_a_mean_over_seeds(scene_model, pictures):
    expected = np.mean([alone(scene_model, "two dogs", pictures[0], 0.4, seed) for seed in (5, 6, 7)])
    assert scene_model.score("two dogs", pictures[:1], seed=5, samples=3)[0] == pytest.approx(expected, abs=1e-5)


def test_ranks_are_of_the_input_order(scene_model, pictures):
    found, scores = scene_model.rank("two dogs", pictures[:4])
    np.testing.assert_allclose(scores, scene_model.score("two dogs", pictures[:4]), atol=1e-6)
    best_first = np.argsort(-np.array(scores))
    assert [found[index] for index in best_first] == [1, 2, 3, 4]
    assert ranks([0.5, 2.0, 2.0, -1.0]) == [3, 1, 1, 4]
    assert dina.normalize(-10.0) == 0.0


def test_each_prompt_is_encoded_once_while_it_is_kept(scene_model, pictures, monkeypatch):
    encoded = []
    plain = dina.RewardModel.encode_prompt
    monkeypatch.setattr(
        dina.RewardModel, "encode_prompt", lambda model, prompts: encoded.extend(prompts) or plain(model, prompts)
    )
    scene_model.score(PROMPTS, pictures, batch_size=1)
    assert sorted(encoded) == sorted(set(PROMPTS))
    encoded.clear()
    many = [f"{number} dogs" for number in range(12)]  # more than are kept
    found = scene_model.score([*many, *many], 24 * [pictures[0]], batch_size=1)
    assert sorted(encoded) == sorted([*many, *many])
    np.testing.assert_allclose(found[:12], found[12:], atol=1e-6)
    assert found[3] == pytest.approx(alone(scene_model, "3 dogs", pictures[0], 0.4), abs=1e-5)


def test_one_unread_picture_in_many_rows(scene_model, pictures, tmp_path):
    """PIL reads when it is asked to, and not from several threads at once."""
    pictures[0].save(tmp_path / "one.png")
    expected = scene_model.score("two dogs", pictures[:1])
    for _ in range(5):
        found = scene_model.score("two dogs", 32 * [Image.open(tmp_path / "one.png")])
        np.testing.assert_allclose(found, 32 * expected, atol=1e-5)


def test_scores_that_are_not_finite_are_an_error(scene_model, pictures):
    broken = {**scene_model.params, "head.head.weight": scene_model.params["head.head.weight"] * np.nan}
    with pytest.raises(ValueError, match="the model scores NaN or infinity"):
        dina.RewardModel(scene_model.config, broken).score("two dogs", pictures[:1])


def test_what_cannot_be_read_is_named_and_the_rest_scored(scene_model, pictures, tmp_path):
    (tmp_path / "garbage.png").write_bytes(b"garbage")
    pictures[0].save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    names = [tmp_path / name for name in ("garbage.png", "whole.png", "cut.png", "missing.png")]
    found = score_images(scene_model, 4 * ["two dogs"], names, [0.4], [NoiseDraw(0, shared=True)])
    assert np.isnan(found.scores[[0, 2, 3]]).all()
    assert found.scores[1, 0, 0] == pytest.approx(alone(scene_model, "two dogs", pictures[0], 0.4), abs=1e-5)
    assert set(found.problems) == {0, 2, 3}
    with pytest.raises(
        ValueError, match=r"3 of 4 images cannot be read:\n.*\n.*images\[2\].*\n.*images\[3\]: there is no file"
    ):
        scene_model.score("two dogs", names)


def test_an_error_of_the_file_system_is_none_of_the_image(scene_model, pictures, tmp_path, monkeypatch):
    """The system's own EIO, by path, by function, and from a picture whose pixels are yet to be read."""
    monkeypatch.setattr(files, "PAUSES", (0.0,))
    pictures[0].save(tmp_path / "good.png")
    broken = tmp_path / "broken.png"
    broken.symlink_to("/proc/self/mem")
    for source in (broken, lambda: broken.open("rb")):
        with pytest.raises(OSError, match=r"cannot read .*Input/output error"):
            scene_model.score("two dogs", [tmp_path / "good.png", source])
    picture = Image.open(tmp_path / "good.png")
    picture.fp.close()
    picture.fp = broken.open("rb")
    with pytest.raises(OSError, match="Input/output error"):
        scene_model.score("two dogs", [picture])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a", []), "images must be a list of at least one image"),
        (("a", "one.png"), r"for one: \[image\]"),
        ((["a", "b"], ["one.png"]), "2 prompts but 1 images"),
    ],
)
def test_bad_arguments(scene_model, arguments, message):
    with pytest.raises(ValueError, match=message):
        scene_model.score(*arguments)


def test_bad_levels_and_sizes(scene_model, pictures):
    with pytest.raises(ValueError, match=r"sigma must lie in \[0, 1\]"):
        scene_model.score("a", pictures[:1], 1.5)
    for size in ((60, 64), (64,), 64):
        with pytest.raises(ValueError, match=r"size must be \(height, width\) in positive multiples of 16 pixels"):
            scene_model.score("a", pictures[:1], size=size)
    np.testing.assert_allclose(
        scene_model.score("a", pictures[:1], size=[64, 64]), scene_model.score("a", pictures[:1]), atol=1e-6
    )
    with pytest.raises(ValueError, match="rank compares images of one prompt"):
        scene_model.rank(["a"], pictures[:1])


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1024, 1024), (1024, 1024)),
        ((512, 512), (512, 512)),
        ((832, 1472), (832, 1472)),  # the largest of training's buckets stays
        ((1000, 750), (992, 752)),
        ((4000, 3000), (1296, 976)),  # 1.2 times the model's own area
        ((10, 200), (16, 192)),
        ((100, 60000), (16, 6144)),  # as long as the position table
    ],
)
def test_scoring_size(size, expected):
    assert scoring_size(size, native_side=1024, longest_side=6144, unit=16) == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((96, 64), (96, 64)),  # trained on
        ((150, 100), (96, 64)),  # of the area of 96 x 64
        ((960, 640), (624, 416)),  # of that of 512 x 512, to multiples of 16
        ((700, 700), (512, 512)),
        ((256, 256), (512, 512)),  # nearer to 512 than to 64
        ((10, 9000), (16, 640)),  # as long as the position table
    ],
)
def test_trained_size(size, expected):
    assert trained_size(size, [(64, 64), (96, 64), (512, 512)], longest_side=640, unit=16) == expected


def test_a_model_that_knows_its_training_sizes_scores_there(scene_model, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 100, 3), np.uint8))
    known = dataclasses.replace(scene_model, image_sizes=((64, 64),))
    known.save(tmp_path / "model")
    loaded = dina.RewardModel.from_pretrained(tmp_path / "model", dtype="float32")
    assert loaded.image_sizes == ((64, 64),)
    assert loaded.score("a", [image]) == scene_model.score("a", [image], size=(96, 48))
    assert loaded.score("a", [image], size=(64, 96)) == scene_model.score("a", [image], size=(64, 96)), "asked for"
    latents, prompt = np.zeros((1, 16, 16, 16), np.float32), scene_model.encode_prompt(["a"])
    with pytest.warns(UserWarning, match="128x128 pixels, but this model was trained at 64x64"):
        loaded.score_latents(latents, prompt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded.score_latents(latents[:, :8, :12], prompt)
        scene_model.score_latents(latents, prompt)


def test_rows_are_split_over_the_devices_that_hold_the_model(scene_model, pictures):
    from dinalrm_jax.devices.local import on_every_device

    spread = dina.RewardModel(scene_model.config, on_every_device(scene_model.params), scene_model.execution)
    assert len(jax.local_devices()) == 4
    np.testing.assert_allclose(spread.score(PROMPTS, pictures), scene_model.score(PROMPTS, pictures), atol=1e-5)


# ------------------------------------------------------------------------------- command


@pytest.fixture(scope="module")
def checkpoint(scene_model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("scored") / "model"
    scene_model.save(directory)
    return directory


def run(*arguments):
    command = [sys.executable, "-m", "dinalrm_jax.score", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_score_command(scene_model, checkpoint, pictures, tmp_path):
    """A directory and files, two prompts, a broken file; every output."""
    (tmp_path / "images").mkdir()
    for index in (0, 1):
        pictures[index].save(tmp_path / "images" / f"{index}.png")
    for index in (2, 3):
        pictures[index].save(tmp_path / f"{index}.jpg", quality=100)
    (tmp_path / "images" / "2.png").write_bytes(b"garbage")
    (tmp_path / "prompts.txt").write_text("two dogs\ntwo dogs\ntwo dogs\none cat\none cat\n")
    files = [tmp_path / "images", tmp_path / "2.jpg", tmp_path / "3.jpg"]
    result = run(
        f"--checkpoint={checkpoint}", "--dtype=float32", f"--prompt-file={tmp_path / 'prompts.txt'}", "--samples=2",
        "--json=-", f"--csv={tmp_path / 'scores.csv'}", f"--sheet={tmp_path / 'sheet.png'}", *files,
    )  # fmt: skip
    assert result.returncode == 1, result.stderr
    assert "2.png: not a readable image" in result.stderr
    rows = json.loads(result.stdout)
    assert [(row["prompt"], row["rank"]) for row in rows] == [
        ("two dogs", 1),
        ("two dogs", 2),
        ("one cat", 1),
        ("one cat", 2),
    ]
    for row in rows:
        each = [scene_model.score(row["prompt"], [row["image"]], seed=seed)[0] for seed in (0, 1)]
        assert row["score"] == pytest.approx(np.mean(each), abs=1e-5)
        assert row["standard_error"] == pytest.approx(abs(each[0] - each[1]) / 2, abs=1e-5)
        assert row["normalized"] == pytest.approx(np.mean(each) / 10 + 1, abs=1e-5)
    assert rows[0]["score"] > rows[1]["score"]
    with (tmp_path / "scores.csv").open() as file:
        assert [row["image"] for row in csv.DictReader(file)] == [row["image"] for row in rows]
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 300


def test_score_table(scene_model, pictures):
    found = score_images(scene_model, 3 * ["two dogs"], pictures[:3], [0.4], [NoiseDraw(0, shared=True)])
    text = ranking.as_table(ranking.scored_rows(3 * ["two dogs"], ["a.png", "b.png", "c.png"], found))
    header, *lines = [line.split() for line in text.splitlines()]
    assert header == ["rank", "score", "normalized", "image"]
    best = np.argsort(-found.scores[:, 0, 0])
    assert [line[-1] for line in lines] == [["a.png", "b.png", "c.png"][i] for i in best]
    assert [float(line[1]) for line in lines] == pytest.approx(sorted(found.scores[:, 0, 0], reverse=True), abs=1e-3)


def test_contact_sheets_of_any_text(pictures, tmp_path):
    name = tmp_path / ("狐" * 40 + " $^$.png")
    pictures[0].save(name)
    rows = [ranking.ScoredImage(1, 0.5, str(name), prompt, None, 1.05) for prompt in ("' $^$ '", "狐" * 200)]
    ranking.draw_sheet(tmp_path / "sheet.png", rows)
    assert (tmp_path / "sheet.png").stat().st_size > 0
    assert ranking.shortened("狐" * 200, 100).startswith("狐" * 97)


def asked(*images, prompt=None, prompt_file=None):
    options = ScoreOptions(checkpoint="c", images=images, prompt=prompt, prompt_file=prompt_file)
    return prompts_of(options, list(images))


def test_score_command_inputs(pictures, tmp_path):
    with pytest.raises(ConfigError, match="holds no images"):
        find_images([str(tmp_path)])
    with pytest.raises(ConfigError, match="name at least one image"):
        find_images([])
    with pytest.raises(ConfigError, match=r"several levels stand between commas: --sigma 0.2,0.5"):
        find_images([str(tmp_path / "a.png"), "0.5"])
    with pytest.raises(ConfigError, match="--prompt is empty"):
        asked("a.png", prompt=" ")
    with pytest.raises(UsageError, match="give either --prompt or --prompt-file"):
        asked("a.png", prompt="a", prompt_file="b")
    file = tmp_path / "prompts.txt"
    file.write_text("a\nb\n")
    with pytest.raises(ConfigError, match="2 lines for 3 images"):
        asked("1.png", "2.png", "3.png", prompt_file=str(file))
    file.write_text("a\n")
    assert asked("1.png", "2.png", "3.png", prompt_file=str(file)) == ["a", "a", "a"]
    pictures[0].save(tmp_path / "plain.png")
    with pytest.raises(ConfigError, match="plain.png does not say its prompt"):
        asked(str(tmp_path / "plain.png"))


def test_images_of_generate_say_their_prompts(pictures, tmp_path):
    for name, prompt in (("b.png", "ein roter Würfel"), ("a.png", "two dogs")):
        save_generated(tmp_path / name, np.asarray(pictures[0].convert("RGB")), {"prompt": prompt})
    rows = [ranking.ScoredImage(1, 0.5, str(tmp_path / "a.png"), "two dogs", None, 1.05)]
    ranking.draw_sheet(tmp_path / "of my own.png", rows)  # a contact sheet says that it is one
    images = find_images([str(tmp_path)])
    assert [pathlib.Path(image).name for image in images] == ["a.png", "b.png"]
    assert asked(*images) == ["two dogs", "ein roter Würfel"]
    (tmp_path / "torn.png").write_bytes(b"\x89PNG")
    missing = str(tmp_path / "nowhere.png")
    assert asked(images[0], str(tmp_path / "torn.png"), missing) == ["two dogs", "", ""]  # to be reported
    (tmp_path / "prompts.txt").write_text("a\n\nb\n")
    with pytest.raises(ConfigError, match="line 2: an empty prompt"):
        asked("1.png", "2.png", "3.png", prompt_file=str(tmp_path / "prompts.txt"))
