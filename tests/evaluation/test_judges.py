"""Judges against transformers' CLIP and the published heads' arithmetic, on random small towers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from dinalrm_jax.encoders.clip_pair import prepared
from dinalrm_jax.evaluation.judges.clip import AESTHETIC_WIDTHS, Judge
from dinalrm_jax.mapping import ConfigError

PROMPTS = ["a red fox in the snow", "two blue squares on the left of a very long sentence"]


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def theirs(request, tmp_path_factory, tiny_pipeline):
    """A random CLIP of either activation, saved as published ones are, with its tokenizer beside it."""
    torch.manual_seed(0)
    act = request.param
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
            "vocab_size": 49408, "hidden_act": act, "eos_token_id": 49407, "bos_token_id": 49406}  # fmt: skip
    vision = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 3,
              "image_size": 42, "patch_size": 14, "hidden_act": act}  # fmt: skip
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                parameter.normal_(std=0.5 if parameter.ndim < 2 else 0.5 * parameter[0].numel() ** -0.5)
    directory = tmp_path_factory.mktemp("clip")
    model.save_pretrained(directory)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tiny_pipeline / "tokenizer")
    tokenizer.save_pretrained(directory)
    return model, directory, tokenizer


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
    places = (0, 2, 4, 6, 7)
    head = torch.nn.Sequential()
    for place in range(8):
        number = places.index(place) if place in places else None
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
    found = prepared(jnp.asarray(smooth[None] / 255, jnp.float32), 42)[0] * np.array(
        [0.26862954, 0.26130258, 0.27577711]
    )
    found = found + np.array([0.48145466, 0.4578275, 0.40821073])
    np.testing.assert_allclose(found, resized, atol=2.5 / 255)  # PIL rounds to 8 bits between its two passes


def test_judges_that_are_not_there(theirs, tmp_path):
    _, directory, _ = theirs
    with pytest.raises(ConfigError, match="'aesthetic' needs its head"):
        Judge.from_pretrained("aesthetic", directory)
    with pytest.raises(ConfigError, match="'clip' has no head"):
        Judge.from_pretrained("clip", directory, tmp_path / "head.pth")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ConfigError, match="is a 'bert', expected a CLIP with both towers"):
        Judge.from_pretrained("clip", tmp_path)
    with pytest.raises(ValueError, match="2 prompts but 1 images"):
        Judge.from_pretrained("clip", directory)(PROMPTS, [np.zeros((42, 42, 3), np.uint8)])
