"""Judges against transformers' CLIP and the published heads' arithmetic, on random small towers."""

import csv
import gzip
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from dinalrm_jax.cli.flags import UsageError
from dinalrm_jax.cli.options import JudgeOptions
from dinalrm_jax.data.generated import save_generated
from dinalrm_jax.encoders.clip_files import load_open_clip
from dinalrm_jax.encoders.clip_pair import MEAN, STD, prepared
from dinalrm_jax.evaluation.judges.clip import AESTHETIC_PLACES, AESTHETIC_WIDTHS, HPSV2_FILE, Judge
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.tables import WeightsError
from dinalrm_jax.scenes import draw
from dinalrm_jax.weights.torch_file import TorchFileError
from tests.conftest import ROOT
from tests.golden import hpsv2
from tests.random_clip import tokenizer_of, write_clip

VOCABULARY = ROOT.parent / "shared" / "data" / "clip_tokenizer" / "bpe_simple_vocab_16e6.txt.gz"
PROMPTS = ["a red fox in the snow", "two blue squares on the left of a very long sentence"]


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def theirs(request, tmp_path_factory, tiny_pipeline):
    """A random CLIP of either activation, saved as published ones are, with its tokenizer beside it."""
    directory = tmp_path_factory.mktemp("clip")
    return write_clip(directory, request.param, tiny_pipeline), directory, tokenizer_of(directory)


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    found = []
    for number, size in enumerate([(42, 42), (42, 42)]):
        path = tmp_path / f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(path)
        found.append(path)
    return found


def features(model, tokenizer, images):
    """transformers' normalised embeddings, of images that are as large as the tower reads."""
    pixels = np.stack([np.asarray(Image.open(path)) for path in images]).astype(np.float32) / 255
    pixels = (pixels - np.array([0.48145466, 0.4578275, 0.40821073])) / np.array([0.26862954, 0.26130258, 0.27577711])
    tokens = tokenizer(PROMPTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    with torch.no_grad():
        text = model.text_projection(model.text_model(input_ids=tokens["input_ids"]).pooler_output)
        image = model.visual_projection(
            model.vision_model(torch.from_numpy(pixels.transpose(0, 3, 1, 2)).float()).pooler_output
        )
    return tuple(x / x.norm(dim=-1, keepdim=True) for x in (text, image))


def test_clip_and_pickscore(theirs, images):
    model, directory, tokenizer = theirs
    text, image = features(model, tokenizer, images)
    cosine = (text * image).sum(dim=-1).numpy()
    assert np.abs(cosine).max() > 0.01
    clip = Judge.from_pretrained("clip", directory)
    np.testing.assert_allclose(clip(PROMPTS, images), 100 * np.maximum(cosine, 0), atol=1e-3)  # of up to 100
    pick = Judge.from_pretrained("pickscore", directory)
    scale = model.logit_scale.exp().item()
    np.testing.assert_allclose(pick(PROMPTS, images) / scale, cosine, atol=1e-5)


def test_the_aesthetic_head(theirs, images, tmp_path):
    model, directory, tokenizer = theirs
    _, image = features(model, tokenizer, images)
    widths = (24, *AESTHETIC_WIDTHS)
    head = torch.nn.Sequential()
    for place in range(8):
        number = AESTHETIC_PLACES.index(place) if place in AESTHETIC_PLACES else None
        head.append(torch.nn.Dropout(0.2) if number is None else torch.nn.Linear(widths[number], widths[number + 1]))
    head.eval()
    torch.save({f"layers.{name}": array for name, array in head.state_dict().items()}, tmp_path / "head.pth")
    with torch.no_grad():
        wanted = head(image)[:, 0].numpy()
    judge = Judge.from_pretrained("aesthetic", directory, tmp_path / "head.pth")
    np.testing.assert_allclose(judge(PROMPTS, images), wanted, atol=1e-5)


def test_scores_have_gradients(theirs, images):
    _, directory, _ = theirs
    judge = Judge.from_pretrained("pickscore", directory)
    ids = np.asarray(judge.tokenizer(PROMPTS[:1], padding="max_length", max_length=77, truncation=True)["input_ids"])
    pixels = jnp.asarray(np.random.default_rng(0).uniform(0.1, 0.9, (1, 60, 80, 3)), jnp.float32)
    way = jnp.asarray(np.random.default_rng(1).standard_normal(pixels.shape), jnp.float32)
    gradient = jax.grad(lambda x: judge.score(judge.params, x, ids).sum())(pixels)
    step = 1e-2
    ahead, behind = (judge.score(judge.params, pixels + sign * step * way, ids)[0] for sign in (1, -1))
    assert float((gradient * way).sum()) == pytest.approx(float(ahead - behind) / (2 * step), rel=0.05)


def test_what_a_tower_reads():
    """The middle of the image, its shorter side as long as the tower's; near what PIL's bicubic makes of it."""
    rng = np.random.default_rng(0)
    smooth = np.asarray(Image.fromarray(rng.integers(0, 256, (6, 9, 3), np.uint8)).resize((180, 120), Image.BICUBIC))
    resized = np.asarray(Image.fromarray(smooth).resize((63, 42), Image.BICUBIC))[:, 10:52] / 255
    found = prepared(jnp.asarray(smooth[None] / 255, jnp.float32), 42, "crop")[0] * np.array(STD) + np.array(MEAN)
    np.testing.assert_allclose(found, resized, atol=2.5 / 255)  # PIL rounds to 8 bits between its two passes


@pytest.fixture(scope="module")
def golden():
    """What the published HPSv2 code computes; tests/golden/hpsv2.py."""
    with np.load(hpsv2.PATH) as found:
        return dict(found)


@pytest.fixture
def hpsv2_directory(golden, tmp_path, tiny_pipeline):
    """As it is published, with CLIP's tokenizer beside it."""
    state = {name: torch.from_numpy(array) for name, array in hpsv2.weights(hpsv2.read_shapes(golden["tiny"])).items()}
    torch.save({"epoch": 1, "state_dict": state}, tmp_path / HPSV2_FILE)
    transformers.CLIPTokenizer.from_pretrained(tiny_pipeline / "tokenizer").save_pretrained(tmp_path)
    return tmp_path


def test_hpsv2(golden, hpsv2_directory):
    """Its preprocessing, towers and score, of images wider, higher and smaller than the tower's square."""
    judge = Judge.from_pretrained("hpsv2", hpsv2_directory)
    for number in range(len(golden["ids"])):
        pixels = golden[f"image_{number}"][None].astype(np.float32) / 255
        np.testing.assert_allclose(prepared(pixels, hpsv2.SIDE, "pad")[0], golden["pixels"][number], atol=2e-5)
        found = judge.score(judge.params, pixels, golden["ids"][[number]].astype(np.int32))
        np.testing.assert_allclose(found, golden["scores"][[number]], atol=1e-5)
    in_a_file = Judge.from_pretrained("hpsv2", hpsv2_directory / HPSV2_FILE)
    image = golden["image_0"]
    (plain,), (written,) = judge(["red & blue"], [image]), in_a_file(["red &amp;amp; blue"], [image])
    assert plain == written


def test_hpsv2_at_full_size(golden):
    """Every name and shape of ViT-H-14 as it is published."""
    shapes = hpsv2.read_shapes(golden["full"])
    state = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    config, _, params = load_open_clip(hpsv2.PATH, state)
    assert sum(array.size for array in params.values()) == 986_109_441
    assert (config.vision.num_attention_heads, config.text.num_attention_heads) == (16, 16)
    assert (config.vision.image_size, config.projection_dim) == (224, 1024)


@pytest.mark.skipif(not VOCABULARY.is_file(), reason="needs CLIP's vocabulary")
def test_tokens_of_hpsv2(golden, hpsv2_directory, tmp_path):
    """With CLIP's own vocabulary, as its tokenizer's; but for what stands behind the end."""
    merges = gzip.decompress(VOCABULARY.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    letters = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("\u00a1"), ord("\u00ac") + 1),
        *range(ord("\u00ae"), ord("\u00ff") + 1),
    ]
    letters = [chr(code) for code in letters] + [chr(256 + number) for number in range(256 - len(letters))]
    ends = [f"{letter}</w>" for letter in letters]
    words = [*letters, *ends, *(merge.replace(" ", "") for merge in merges), "<|startoftext|>", "<|endoftext|>"]
    own = tmp_path / "clip"
    own.mkdir()
    (own / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (own / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    judge = Judge.from_pretrained("hpsv2", hpsv2_directory, tokenizer=own)
    for ours, theirs in zip(judge.tokens(hpsv2.PROMPTS), golden["tokens"]):
        length = theirs.argmax() + 1
        np.testing.assert_array_equal(ours[:length], theirs[:length])


def test_judges_that_are_not_there(theirs, tmp_path):
    _, directory, _ = theirs
    with pytest.raises(ConfigError, match="'aesthetic' needs its head"):
        Judge.from_pretrained("aesthetic", directory)
    with pytest.raises(ConfigError, match="'clip' has no head"):
        Judge.from_pretrained("clip", directory, tmp_path / "head.pth")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ConfigError, match="is a 'bert', expected a CLIP with both towers"):
        Judge.from_pretrained("clip", tmp_path)
    with pytest.raises(FileNotFoundError, match=f"holds no {HPSV2_FILE}"):
        Judge.from_pretrained("hpsv2", directory)
    with pytest.raises(ValueError, match="2 prompts but 1 images"):
        Judge.from_pretrained("clip", directory)(PROMPTS, [np.zeros((42, 42, 3), np.uint8)])


def test_files_that_are_no_hpsv2(golden, hpsv2_directory):
    file = hpsv2_directory / HPSV2_FILE
    state = torch.load(file)["state_dict"]
    narrow = {name: array[:, :100] if name == "token_embedding.weight" else array for name, array in state.items()}
    for changed, error, message in (
        ({"model": state}, TorchFileError, "holds no 'state_dict'"),
        (
            {"state_dict": {"weight": torch.ones(2)}},
            WeightsError,
            "no CLIP in open_clip's layout: 'visual.conv1.weight'",
        ),
        ({"state_dict": narrow}, WeightsError, "heads are 80 and 64 wide: its text tower is 100 wide"),
        (
            {"state_dict": {name: array for name, array in state.items() if "1.attn.in_proj_bias" not in name}},
            WeightsError,
            r"missing: visual.transformer.resblocks.1.attn.in_proj_bias\[q\]",
        ),
    ):
        torch.save(changed, file)
        with pytest.raises(error, match=message):
            Judge.from_pretrained("hpsv2", hpsv2_directory)
    (hpsv2_directory / "elsewhere").mkdir()
    torch.save({"state_dict": state}, hpsv2_directory / "elsewhere" / HPSV2_FILE)
    with pytest.raises(ConfigError, match="holds no tokenizer: none of tokenizer.json"):
        Judge.from_pretrained("hpsv2", hpsv2_directory / "elsewhere")


def run(*arguments):
    command = [sys.executable, "-m", "dinalrm_jax.judge", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("theirs", ["gelu"], indirect=True)
def test_judge_command(theirs, images, tmp_path):
    """PickScores of transformers' own embeddings, ranked; a broken file is named and the others are judged."""
    model, directory, tokenizer = theirs
    text, image = features(model, tokenizer, images)
    expected = (model.logit_scale.exp() * (text[0] * image).sum(dim=-1)).tolist()
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"garbage")
    weights = (f"--model={directory}", f"--json={tmp_path / 'found.json'}")
    done = run("--judge=pickscore", *weights, f"--prompt={PROMPTS[0]}", *images, broken)
    assert done.returncode == 1, done.stderr
    assert "broken.png: not a readable image" in done.stderr
    rows = json.loads((tmp_path / "found.json").read_text())
    assert [row["rank"] for row in rows] == [1, 2]
    assert [row["score"] for row in rows] == pytest.approx(sorted(expected, reverse=True), rel=1e-4)
    assert rows[0]["image"] == str(images[int(np.argmax(expected))])
    assert done.stdout.splitlines()[0].split() == ["rank", "score", "image"]


def test_rules_judge_the_pictures_that_say_their_captions(tmp_path):
    rng = np.random.default_rng(3)
    scene = (draw.Group(2, "red", "circle", "left"),)
    wrong = (draw.Group(2, "blue", "circle", "left"),)
    for name, shown in (("wrong.png", wrong), ("right.png", scene)):
        save_generated(tmp_path / name, draw.render(shown, 64, rng), {"prompt": draw.caption(scene)})
    (tmp_path / "torn.png").write_bytes(b"garbage")
    done = run("--judge=scenes", tmp_path, "--csv=-")
    assert done.returncode == 1, done.stderr
    assert "not scored: " in done.stderr
    (tmp_path / "torn.png").unlink()
    right, broken = csv.DictReader(done.stdout.splitlines())
    assert right["image"].endswith("right.png")
    assert [float(right[name]) for name in ("score", "count", "color", "shape", "position")] == [1.0] * 5
    assert [float(broken[name]) for name in ("score", "count", "color", "shape", "position")] == [0.75, 1, 0, 1, 1]
    done = run("--judge=scenes", "--prompt=a red fox", tmp_path)
    assert done.returncode == 2
    assert "a red fox" in done.stderr.splitlines()[-1]


def test_what_the_judge_command_refuses():
    with pytest.raises(UsageError, match="the judge clip needs its weights"):
        JudgeOptions(judge="clip", images=("a.png",))
    with pytest.raises(UsageError, match="scenes is rules and has no weights"):
        JudgeOptions(judge="scenes", model="m")
    with pytest.raises(UsageError, match="aesthetic reads no prompt"):
        JudgeOptions(judge="aesthetic", model="m", prompt="a")
