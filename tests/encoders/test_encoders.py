"""Text encoders and VAE against transformers and diffusers, through files in the real layout."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image

import dinalrm_jax as dina
from dinalrm_jax.encoders.clip import CLIPTextConfig, CLIPTextModel
from dinalrm_jax.encoders.load import SD3Codec, load_image_codec, load_prompt_encoder
from dinalrm_jax.encoders.pipeline import load_vae
from dinalrm_jax.encoders.prompt import SD3PromptEncoder
from dinalrm_jax.encoders.t5 import T5Config, T5Encoder, relative_position_buckets
from dinalrm_jax.encoders.vae import AutoencoderKL, VAEConfig
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.config import LoRAConfig, RewardModelConfig
from dinalrm_jax.model.encoding import EncodersConfig
from dinalrm_jax.model.parameters import functional
from dinalrm_jax.model.tables import WeightsError
from dinalrm_jax.scenes import rehearsal
from dinalrm_jax.timing.programs import CLIP_G, CLIP_L
from dinalrm_jax.weights.verify import ReleasedInTorch
from tests.conftest import ROOT, randomized

PROMPTS = ["a red fox, sleeping in snow!", "", "Zürich " * 60, "RED  circle\tto the left"]


@pytest.fixture(scope="module")
def torch_pipeline(tiny_pipeline):
    return StableDiffusion3Pipeline.from_pretrained(tiny_pipeline)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (2, 48, 80, 3), dtype=np.uint8)


@pytest.mark.parametrize("text_length", [128, 256])
def test_prompts_are_diffusers(tiny_pipeline, torch_pipeline, text_length):
    ours = SD3PromptEncoder(tiny_pipeline, text_length, "float32")(PROMPTS)
    with torch.no_grad():
        embeds, _, pooled, _ = torch_pipeline.encode_prompt(
            PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=text_length
        )
    assert ours.prompt_embeds.shape == (4, 77 + text_length, 48)
    np.testing.assert_allclose(ours.prompt_embeds, embeds, atol=1e-4)
    np.testing.assert_allclose(ours.pooled_prompt_embeds, pooled, atol=1e-4)


def test_eos_by_id_is_transformers(tiny_pipeline, torch_pipeline):
    """Configs with the real end token pool at its first occurrence, not at the highest id."""
    tower = torch_pipeline.text_encoder
    ids = np.array([[514, 7, 9, 3, 3], [514, 3, 511, 512, 500]], np.int32)
    config = json.loads((tiny_pipeline / "text_encoder" / "config.json").read_text())
    known = {key: value for key, value in config.items() if key in CLIPTextConfig.__dataclass_fields__}
    module = functional(lambda rngs: CLIPTextModel(CLIPTextConfig(**{**known, "eos_token_id": 3}), rngs=rngs))
    params = {name: jnp.asarray(tensor.numpy()) for name, tensor in tower.state_dict().items()}
    params = {name: array for name, array in params.items() if name in module.shapes}
    hidden, pooled = jax.jit(lambda p: module.bind(p)(ids, "float32"))(params)
    tower.text_model.eos_token_id = tower.text_model.config.eos_token_id = 3
    with torch.no_grad():
        out = tower(torch.from_numpy(ids).long(), output_hidden_states=True)
    tower.text_model.eos_token_id = tower.text_model.config.eos_token_id = 2
    np.testing.assert_allclose(pooled, out.text_embeds, atol=1e-4)
    np.testing.assert_allclose(hidden, out.hidden_states[-2], atol=1e-4)


def test_relative_positions_are_t5s():
    """By hand: 32 buckets, half for keys behind the query; exact below 8, then logarithmic to 128."""
    buckets = relative_position_buckets(200, 32, 128)
    assert buckets[0, :9].tolist() == [0, 17, 18, 19, 20, 21, 22, 23, 24]
    assert buckets[:9, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    # 8 + floor(log(d / 8) / log(16) * 8): 12 -> 9, 16 -> 10, 64 -> 14, 128 and more -> 15.
    assert [buckets[d, 0] for d in (11, 12, 16, 64, 127, 128, 199)] == [8, 9, 10, 14, 15, 15, 15]


def test_vae_is_diffusers(tiny_pipeline, torch_pipeline, images):
    config, module, params = load_vae(tiny_pipeline / "vae")
    pixels = images / np.float32(127.5) - 1
    vae = torch_pipeline.vae
    with torch.no_grad():
        posterior = vae.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2)).latent_dist
        z = posterior.sample(torch.Generator().manual_seed(0))
        noise = ((z - posterior.mean) / posterior.std).permute(0, 2, 3, 1).numpy()
        decoded = vae.decode(z).sample.permute(0, 2, 3, 1).numpy()
    scaled = ((z - vae.config.shift_factor) * vae.config.scaling_factor).permute(0, 2, 3, 1).numpy()
    mean, std = jax.jit(lambda p: module.bind(p).posterior(pixels))(params)
    np.testing.assert_allclose(mean, posterior.mean.permute(0, 2, 3, 1), atol=1e-4)
    np.testing.assert_allclose(std, posterior.std.permute(0, 2, 3, 1), atol=1e-4)
    np.testing.assert_allclose(jax.jit(lambda p: module.bind(p).encode(pixels, noise))(params), scaled, atol=1e-4)
    np.testing.assert_allclose(jax.jit(lambda p: module.bind(p).decode(scaled))(params), decoded, atol=1e-4)


def test_quantisation_convolutions(images):
    """SD3's VAE has none; of another AutoencoderKL they are used."""
    from diffusers import AutoencoderKL as TorchVAE

    settings = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
    theirs = TorchVAE(
        **settings, down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2
    )  # fmt: skip
    config = VAEConfig(**settings, use_quant_conv=True, use_post_quant_conv=True)
    module = functional(lambda rngs: AutoencoderKL(config, rngs=rngs))
    params = randomized(module.init(0))
    theirs.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in params.items()})
    pixels = images[:, :16, :16] / np.float32(127.5) - 1
    with torch.no_grad():
        mean = theirs.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2)).latent_dist.mean
        decoded = theirs.decode(mean).sample.permute(0, 2, 3, 1)
    ours = jax.jit(lambda p: module.bind(p).posterior(pixels)[0])(params)
    np.testing.assert_allclose(ours, mean.permute(0, 2, 3, 1), rtol=1e-4, atol=1e-4)
    scaled = (ours - config.shift_factor) * config.scaling_factor
    np.testing.assert_allclose(jax.jit(lambda p: module.bind(p).decode(scaled))(params), decoded, rtol=1e-4, atol=1e-4)


def test_from_pixels_and_prompt_to_the_score(tiny_pipeline, torch_pipeline, images, tmp_path):
    """The whole path in Flax against the whole path in torch, noise shared."""
    transformer = rehearsal.TRANSFORMER
    config = RewardModelConfig(
        transformer, num_blocks=2, visual_taps=(1, 2), text_taps=(1, 2), lora=LoRAConfig(2, 4.0)
    )  # fmt: skip
    random = dina.RewardModel.init(config)
    params = randomized(random.params)
    dina.RewardModel(config, params, random.execution).export_released(tmp_path / "released")
    model = dina.RewardModel.from_pretrained(tmp_path / "released", tiny_pipeline, dtype="float32")
    noise = np.random.default_rng(1).standard_normal((2, 6, 10, 16)).astype(np.float32)
    pictures = [Image.fromarray(image) for image in images]
    latents, prompt = model.encode_image(pictures), model.encode_prompt(PROMPTS[:2])
    ours = model.score_latents(latents, prompt, (0.2, 0.6), noise)

    with torch.no_grad():
        pixels = torch.from_numpy(images / np.float32(127.5) - 1).permute(0, 3, 1, 2)
        vae = torch_pipeline.vae
        z = (vae.encode(pixels).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor
        embeds, _, pooled, _ = torch_pipeline.encode_prompt(
            PROMPTS[:2], None, None, do_classifier_free_guidance=False, max_sequence_length=128
        )
    oracle = ReleasedInTorch(tmp_path / "released", tiny_pipeline, config)
    theirs = oracle.score(
        z.permute(0, 2, 3, 1).numpy(), dina.PromptEmbeds(embeds.numpy(), pooled.numpy()), (0.2, 0.6), noise
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    assert np.abs(ours[0] - ours[1]) > 1e-2


def test_images_as_people_have_them(tiny_pipeline, images, tmp_path):
    codec = load_image_codec(EncodersConfig(), tiny_pipeline)
    expected = codec.encode(images)
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    config = RewardModelConfig(rehearsal.TRANSFORMER, 2, (1, 2), (1, 2), None)
    model = dina.RewardModel.init(config)
    with pytest.raises(ConfigError, match="come from a Stable Diffusion 3 pipeline; name it: base_model"):
        model.encode_image([images[0]])
    with pytest.raises(ConfigError, match="name it: base_model"):
        model.encode_prompt(["a"])
    model = dataclasses.replace(model, base_model=str(tiny_pipeline))
    given = [tmp_path / "a.png", Image.fromarray(images[1]).convert("RGBA")]
    np.testing.assert_allclose(model.encode_image(given), expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"images have different sizes: 48x80, 40x80"):
        model.encode_image([images[0], images[0][:40]])
    for wrong in ("a.png", []):
        with pytest.raises(ValueError, match="images must be a list of at least one image"):
            model.encode_image(wrong)
    with pytest.raises(ValueError, match=r"size must be \(height, width\) in pixels, got 64"):
        model.encode_image([images[0]], size=64)
    for wrong in ("a fox", []):
        with pytest.raises(ValueError, match="prompts must be a list of at least one text"):
            model.encode_prompt(wrong)
    with pytest.raises(ValueError, match=r"48x72 pixels is not a multiple of 16"):
        model.encode_image([images[0][:, :72]])
    assert model.encode_image([images[0][:, :72]], size=(48, 80)).shape == (1, 6, 10, 16)


@pytest.mark.parametrize("surroundings", ["default", "bfloat16", "highest"])
def test_the_vae_multiplies_in_float32_whatever_the_surroundings_set(tiny_pipeline, surroundings):
    """By default TPUs and GPUs round what they multiply to bfloat16 and TF32; the program must ask for better."""
    with jax.default_matmul_precision(surroundings):
        codec = SD3Codec(tiny_pipeline)
        pixels, latents = jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 2, 2, 16))
        programs = [
            codec._encode.lower(codec._params, pixels, latents).as_text(),
            codec._decode.lower(codec._params, latents).as_text(),
        ]
    for text in programs:
        products = [line for line in text.split("\n") if re.search(r"stablehlo\.(convolution|dot_general)", line)]
        assert len(products) > 10
        # MLIR prints the precision of both factors, unless it is the default.
        loose = [line for line in products if not re.search(r"HIGHEST.*HIGHEST", line)]
        assert not loose


def test_posterior_samples_depend_on_the_name_only(tiny_pipeline, images):
    codec = SD3Codec(tiny_pipeline)
    both = codec.encode(images, ["a", "b"])
    np.testing.assert_allclose(codec.encode(images[1:], ["b"]), both[1:], atol=1e-5)
    assert np.abs(codec.encode(images[1:], ["c"]) - both[1:]).max() > 0.1


def test_tiny_encoders_share_the_interface(images):
    codec = load_image_codec(EncodersConfig("tiny", 4), None)
    smooth = np.broadcast_to(np.linspace(0, 255, 80).astype(np.uint8)[None, None, :, None], images.shape)
    assert np.abs(codec.decode(codec.encode(smooth)).astype(int) - smooth).max() < 8
    prompt = load_prompt_encoder(EncodersConfig("tiny", 4), None, "float32")(["red circle"])
    assert prompt.prompt_embeds.shape == (1, 4, 64)
    assert not prompt.prompt_embeds[:, 2:].any()


def test_sharded_and_half_precision_files(tiny_pipeline, torch_pipeline, tmp_path):
    """As published: several files and an index, in float16."""
    torch_pipeline.to(torch.float16).save_pretrained(tmp_path / "half", max_shard_size="60KB")
    torch_pipeline.to(torch.float32)
    assert list((tmp_path / "half" / "text_encoder_3").glob("*.index.json"))
    exact = SD3PromptEncoder(tiny_pipeline, 16, "float32")(PROMPTS)
    half = SD3PromptEncoder(tmp_path / "half", 16, "float32")(PROMPTS)
    # float16 weights: 5e-4 relative each, a few layers deep.
    np.testing.assert_allclose(half.prompt_embeds, exact.prompt_embeds, atol=2e-2)
    bfloat16 = SD3PromptEncoder(tiny_pipeline, 16, "bfloat16")(PROMPTS)
    # bfloat16: 4e-3 of values up to 6, as deep.
    np.testing.assert_allclose(bfloat16.prompt_embeds, exact.prompt_embeds, atol=0.1)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda d: shutil.rmtree(d / "text_encoder_2"), FileNotFoundError, "text_encoder_2"),
        (lambda d: shutil.rmtree(d / "tokenizer"), ConfigError, "tokenizer holds no tokenizer"),
        (lambda d: (d / "tokenizer_2" / "vocab.json").unlink(), ConfigError, "tokenizer_2 holds no tokenizer"),
        (lambda d: (d / "text_encoder_3" / "model.safetensors").unlink(), FileNotFoundError, "holds neither"),
        (lambda d: change(d / "text_encoder" / "config.json", hidden_size=32), WeightsError, "misshapen"),
        (lambda d: change(d / "text_encoder_3" / "config.json", d_model=32), WeightsError, "misshapen"),
        (lambda d: change(d / "text_encoder" / "config.json", hidden_act="relu"), ConfigError, "hidden_act is 'relu'"),
    ],
)
def test_incomplete_pipelines(tiny_pipeline, tmp_path, damage, error, message):
    directory = shutil.copytree(tiny_pipeline, tmp_path / "pipeline")
    damage(directory)
    with pytest.raises(error, match=message):
        SD3PromptEncoder(directory, 16, "float32")


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def count(module):
    return sum(shape.size for shape in module.shapes.values())


def test_full_size_parameter_counts():
    """SD3.5's own: CLIP ViT-L/14 and ViT-bigG/14 with their projections, T5-XXL's encoder, the 16-channel VAE."""
    assert count(functional(lambda rngs: CLIPTextModel(CLIP_L, rngs=rngs))) == 123_650_304
    assert count(functional(lambda rngs: CLIPTextModel(CLIP_G, rngs=rngs))) == 694_659_840
    assert count(functional(lambda rngs: T5Encoder(T5Config(), rngs=rngs))) == 4_762_310_656
    vae = functional(lambda rngs: AutoencoderKL(VAEConfig(), rngs=rngs))
    assert count(vae) == 83_819_683
    images = jax.ShapeDtypeStruct((1, 832, 1216, 3), jnp.float32)
    latents = jax.eval_shape(lambda p, x: vae.bind(p).encode(x), vae.shapes, images)
    assert latents.shape == (1, 104, 152, 16)
    assert jax.eval_shape(lambda p, z: vae.bind(p).decode(z), vae.shapes, latents).shape == images.shape


def test_encoding_needs_no_torch(tiny_pipeline):
    code = f"""
import sys
sys.modules["torch"] = sys.modules["diffusers"] = None
from dinalrm_jax.encoders.prompt import SD3PromptEncoder
from dinalrm_jax.encoders.load import SD3Codec
import numpy as np
print(SD3PromptEncoder({str(tiny_pipeline)!r}, 4, "float32")(["a"]).prompt_embeds.shape)
print(SD3Codec({str(tiny_pipeline)!r}).encode(np.zeros((1, 16, 16, 3), np.uint8)).shape)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[:2] == ["(1, 81, 48)", "(1, 2, 2, 16)"]
