"""Sampling against diffusers' pipeline, adapters against PEFT and diffusers, and the command."""

import csv
import json
import subprocess
import sys
import weakref

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusion3Pipeline
from peft import LoraConfig, PeftModel
from PIL import Image
from safetensors.numpy import load_file, save_file

import dinalrm_jax as dina
from dinalrm_jax.encoders import load
from dinalrm_jax.encoders.load import load_prompt_encoder
from dinalrm_jax.encoders.taesd3 import Preview
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.backbone.family import transformer_functional
from dinalrm_jax.model.config import RewardModelConfig
from dinalrm_jax.model.encoding import EncodersConfig
from dinalrm_jax.model.execution import ExecutionConfig
from dinalrm_jax.model.lora import LoRAConfig, init_adapters, merge
from dinalrm_jax.model.tables import WeightsError
from dinalrm_jax.noise import timestep
from dinalrm_jax.weights.adapter import load_adapter, save_adapter
from dinalrm_jax.weights.digest import digest
from tests.conftest import ROOT

PROMPTS = ["a red fox in the snow", "two blue squares"]
TAESD3 = ROOT.parent / "shared" / "data" / "taesd3"


@pytest.fixture(scope="module")
def pipe(tiny_pipeline):
    found = StableDiffusion3Pipeline.from_pretrained(tiny_pipeline, torch_dtype=torch.float32)
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def generator(tiny_pipeline):
    return dina.Generator.from_pretrained(tiny_pipeline)


@pytest.mark.parametrize("guidance", [4.5, 1.0])
def test_images_are_those_of_diffusers(pipe, generator, guidance):
    """The same noise, 28 steps: latents and pixels."""
    height, width = 64, 96
    noise = np.random.default_rng(0).standard_normal((2, height // 8, width // 8, 16)).astype(np.float32)
    negative = "blurred" if guidance > 1 else None
    arguments = {
        "prompt": PROMPTS, "negative_prompt": 2 * [negative] if negative else None, "height": height, "width": width,
        "num_inference_steps": 28, "guidance_scale": guidance, "max_sequence_length": 16,
        "latents": torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
    }  # fmt: skip
    with torch.no_grad():
        theirs = pipe(**arguments, output_type="latent").images.numpy().transpose(0, 2, 3, 1)
    ours = generator.sample(PROMPTS, guidance=guidance, noise=noise, negative_prompts=negative, text_length=16)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
    with torch.no_grad():
        pixels = pipe(**arguments, output_type="np").images
    # A rounding to 8 bits: at most half a level apart.
    np.testing.assert_allclose(generator.decode(ours) / 255, pixels, atol=0.5 / 255 + 1e-3)


def test_an_image_does_not_depend_on_its_batch(generator):
    several = [*PROMPTS, PROMPTS[0]]
    options = {"size": (64, 64), "steps": 3, "seed": 7, "text_length": 16}
    together = generator.sample(several, **options, batch_size=3)
    alone = generator.sample(several[:1], **options)
    np.testing.assert_allclose(alone[0], together[0], atol=1e-5)
    np.testing.assert_allclose(generator.sample(several, **options, batch_size=2), together, atol=1e-5)
    assert np.abs(together[2] - together[0]).max() > 0.1  # the second image of a prompt is another one
    other = generator.sample(several[:1], **{**options, "seed": 8})
    assert np.abs(other[0] - alone[0]).max() > 0.1


def test_text_encoders_go_before_the_first_image(generator, monkeypatch):
    """And come back, with the same images."""
    options = {"size": (64, 64), "steps": 2, "text_length": 16, "batch_size": 1}
    first = generator.sample(PROMPTS, **options)
    misses = load._sd3_prompt_encoder.cache_info().misses
    loaded = weakref.ref(load._sd3_prompt_encoder(generator.base_model, EncodersConfig.text_length, "float32"))
    assert load._sd3_prompt_encoder.cache_info().misses == misses, "not the ones that sampling had"
    seen = []
    again = generator.sample(PROMPTS, **options, keep_encoders=False, progress=lambda count: seen.append(loaded()))
    assert seen == [None, None]
    np.testing.assert_array_equal(again, first)


def test_what_cannot_be_sampled(generator):
    for arguments, message in (
        (([],), "at least one text"),
        (("a fox",), "prompts must be a list"),
        ((PROMPTS, (60, 64)), "positive multiples of 16 pixels"),
        ((PROMPTS, (64, 64), 0), "at least one step"),
    ):
        with pytest.raises(ValueError, match=message):
            generator.sample(*arguments, text_length=16)
    with pytest.raises(ValueError, match="2 prompts but 1 negative prompts"):
        generator.sample(PROMPTS, negative_prompts=["a"], text_length=16)
    with pytest.raises(ValueError, match="2 prompts but initial noise for 1"):
        generator.sample(PROMPTS, noise=np.zeros((1, 8, 8, 16), np.float32), text_length=16)
    for guidance, negative in ((float("nan"), None), (-1.0, None), (1.0, "a dog")):
        with pytest.raises(ValueError, match="guidance is a number from 0 on, and above 1 for negative prompts"):
            generator.sample(PROMPTS, guidance=guidance, negative_prompts=negative, text_length=16)
    assert generator.cut_prompts(["a fox", "fox " * 40], 16) == [1]


def test_prompts_that_the_tiny_encoder_cuts():
    encode = load_prompt_encoder(EncodersConfig("tiny", 4), None, "float32")
    assert encode.longer(["one two three four", "one, two three: four 5"]) == [1]
    cut, short = (encode([prompt]) for prompt in ("one two three four five", "one two three four"))
    np.testing.assert_array_equal(cut.prompt_embeds, short.prompt_embeds)


def random_adapters(config, lora, seed=0):
    shapes = transformer_functional(config, ExecutionConfig(), lora=lora).shapes
    rng = np.random.default_rng(seed)
    drawn = init_adapters(shapes, lora, seed)
    assert drawn.keys() == {name for name in shapes if ".lora_" in name}
    assert all((array == 0).all() for name, array in drawn.items() if name.endswith("lora_B"))
    deviations = [array.std() * lora.rank for name, array in drawn.items() if name.endswith("lora_A")]
    assert np.mean(deviations) == pytest.approx(1.0, abs=0.1)
    return {name: 0.1 * rng.standard_normal(array.shape).astype(np.float32) for name, array in drawn.items()}


def inputs(config):
    rng = np.random.default_rng(1)
    spec = config.latents
    latents = rng.standard_normal((2, 8, 12, spec.channels)).astype(np.float32)
    prompt = dina.PromptEmbeds(
        rng.standard_normal((2, 9, spec.text_width)).astype(np.float32),
        rng.standard_normal((2, spec.pooled_width)).astype(np.float32),
    )
    return latents, np.array([0.3, 0.8], np.float32), prompt


def our_velocity(config, params, lora=None):
    latents, sigma, prompt = inputs(config)
    module = transformer_functional(config, ExecutionConfig(), lora=lora).bind(params)
    return np.asarray(module.velocity(latents, timestep(sigma), prompt))


def their_velocity(transformer, config):
    latents, sigma, prompt = inputs(config)
    with torch.no_grad():
        found = transformer(
            hidden_states=torch.from_numpy(latents.transpose(0, 3, 1, 2).copy()),
            timestep=torch.from_numpy(1000 * sigma),
            encoder_hidden_states=torch.from_numpy(np.asarray(prompt.prompt_embeds)),
            pooled_projections=torch.from_numpy(np.asarray(prompt.pooled_prompt_embeds)),
        ).sample
    return found.numpy().transpose(0, 2, 3, 1)


def test_diffusers_reads_our_adapters(tiny_pipeline, generator, tmp_path):
    config, lora = generator.config, LoRAConfig(rank=4, alpha=8.0)
    adapters = random_adapters(config, lora)
    save_adapter(tmp_path / "policy", lora, adapters, digest(generator.params, lambda name: False))
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny_pipeline, torch_dtype=torch.float32)
    plain = their_velocity(pipe.transformer, config)
    pipe.load_lora_weights(tmp_path / "policy")
    theirs = their_velocity(pipe.transformer, config)
    scale = np.abs(theirs).max()
    assert np.abs(theirs - plain).max() > 0.01 * scale
    params = {**generator.params, **adapters}
    np.testing.assert_allclose(our_velocity(config, params, lora) / scale, theirs / scale, atol=1e-5)
    for written in ("policy", "."):  # "." as the workdir of an alignment
        policy = dina.Generator.from_pretrained(tiny_pipeline, tmp_path / written)
        np.testing.assert_allclose(our_velocity(config, policy.params) / scale, theirs / scale, atol=1e-5)


def test_peft_reads_our_adapters(tiny_pipeline, generator, tmp_path):
    config, lora = generator.config, LoRAConfig(rank=4, alpha=8.0)
    adapters = random_adapters(config, lora)
    save_adapter(tmp_path / "policy", lora, adapters)
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny_pipeline, torch_dtype=torch.float32)
    theirs = their_velocity(PeftModel.from_pretrained(pipe.transformer, str(tmp_path / "policy")), config)
    scale = np.abs(theirs).max()
    params = {**generator.params, **adapters}
    np.testing.assert_allclose(our_velocity(config, params, lora) / scale, theirs / scale, atol=1e-5)


def test_we_read_adapters_of_peft(tiny_pipeline, generator, tmp_path):
    """In PEFT's own layout and in diffusers', with an alpha that is not the rank."""
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny_pipeline, torch_dtype=torch.float32)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    pipe.transformer.add_adapter(LoraConfig(r=3, lora_alpha=12, target_modules=targets))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in pipe.transformer.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    theirs = their_velocity(pipe.transformer, generator.config)
    pipe.transformer.save_lora_adapter(tmp_path / "diffusers")
    (written,) = (tmp_path / "diffusers").glob("*.safetensors")
    tensors = load_file(written)
    (tmp_path / "peft").mkdir()
    save_file(
        {f"base_model.model.{name}": array for name, array in tensors.items()},
        tmp_path / "peft" / "adapter_model.safetensors",
    )
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": 12, "bias": "none"}))
    for path in (written, tmp_path / "peft", tmp_path / "peft" / "adapter_model.safetensors"):
        policy = dina.Generator.from_pretrained(tiny_pipeline, path)
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(our_velocity(policy.config, policy.params) / scale, theirs / scale, atol=1e-5)


def test_adapters_that_do_not_fit(generator, tiny_pipeline, tmp_path):
    lora = LoRAConfig(rank=2, alpha=2.0)
    adapters = random_adapters(generator.config, lora)
    save_adapter(tmp_path / "other", lora, adapters, "0123456789abcdef")
    with pytest.raises(WeightsError, match="was trained on a backbone with the digest 0123456789abcdef"):
        dina.Generator.from_pretrained(tiny_pipeline, tmp_path / "other")
    first = next(iter(adapters))
    wrong = {**adapters, first: np.zeros((2, 5), np.float32), "transformer_blocks.99.attn.to_q.lora_A": adapters[first]}
    save_adapter(tmp_path / "wrong", lora, wrong)
    with pytest.raises(WeightsError, match=r"(?s)no LoRA.*, 2 problems.*misshapen.*unknown.*blocks\.99"):
        load_adapter(tmp_path / "wrong", generator.config)
    half = {name: array for name, array in adapters.items() if not name.endswith("lora_B")}
    save_adapter(tmp_path / "half", lora, half)
    with pytest.raises(WeightsError, match="missing: .*lora_B"):
        load_adapter(tmp_path / "half", generator.config)
    with pytest.raises(FileNotFoundError, match="holds no LoRA"):
        load_adapter(tmp_path, generator.config)
    (tmp_path / "run" / "tuning").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="an alignment that has not ended"):
        load_adapter(tmp_path / "run", generator.config)
    whole = (tmp_path / "wrong" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "torn.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match="torn.safetensors is not a whole safetensors file"):
        load_adapter(tmp_path / "torn.safetensors", generator.config)
    (tmp_path / "dora").mkdir()
    named = {f"base_model.model.{name}.weight": array for name, array in adapters.items()}
    save_file(named, tmp_path / "dora" / "adapter_model.safetensors")
    (tmp_path / "dora" / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2, "use_dora": True}))
    with pytest.raises(ConfigError, match="a LoRA with use_dora"):
        load_adapter(tmp_path / "dora", generator.config)


def test_merged_adapters_are_those_beside_the_weights(generator):
    lora = LoRAConfig(rank=2, alpha=6.0)
    params = {**generator.params, **random_adapters(generator.config, lora)}
    merged = merge(jax.tree.map(jax.numpy.asarray, params), lora)
    beside, added = our_velocity(generator.config, params, lora), our_velocity(generator.config, merged)
    np.testing.assert_allclose(added, beside, atol=1e-4 * np.abs(beside).max())


def write_taesd3(directory, seed=0):
    """Random weights of TAESD3 in their layout; the torch module that has them."""
    torch.manual_seed(seed)
    theirs = AutoencoderTiny(latent_channels=16, scaling_factor=1.0, shift_factor=0.0)
    for part, offset in (("encoder", 0), ("decoder", 1)):  # theirs begins behind the decoder's clamp, the file with it
        file = {}
        for name, tensor in theirs.state_dict().items():
            if name.startswith(f"{part}.layers."):
                place, _, rest = name.removeprefix(f"{part}.layers.").partition(".")
                file[f"{int(place) + offset}.{rest}"] = tensor.numpy()
        save_file(file, directory / f"taesd3_{part}.safetensors")
    return theirs


@pytest.mark.parametrize("published", [False, True])
def test_the_preview_is_autoencoder_tiny(published, tmp_path):
    """On the published weights, where they are at hand, and on random ones in their layout."""
    if published and not TAESD3.is_dir():
        pytest.skip("shared/data/taesd3 is not there")
    directory, theirs = TAESD3 if published else tmp_path, write_taesd3(tmp_path)
    if published:
        tensors = {}
        for name, array in load_file(TAESD3 / "taesd3_decoder.safetensors").items():
            place, _, rest = name.partition(".")
            tensors[f"decoder.layers.{int(place) - 1}.{rest}"] = torch.from_numpy(array.astype(np.float32))
        assert tensors.keys() == {name for name in theirs.state_dict() if name.startswith("decoder.layers.")}
        theirs.load_state_dict(tensors, strict=False)
    latents = 2 * np.random.default_rng(0).standard_normal((2, 6, 8, 16)).astype(np.float32)
    with torch.no_grad():
        pixels = theirs.decode(torch.from_numpy(latents.transpose(0, 3, 1, 2).copy())).sample
    preview = Preview(directory)
    ours = np.asarray(preview._decode(preview._params, latents))
    np.testing.assert_allclose(2 * ours - 1, pixels.numpy().transpose(0, 2, 3, 1), atol=1e-4)
    assert preview.decode(latents).dtype == np.uint8


def run(*arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, "-m", "dinalrm_jax.generate", *map(str, arguments)], cwd=cwd, capture_output=True, text=True
    )


def test_the_command(tiny_pipeline, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    small = ("--base-model", tiny_pipeline, "--steps", 2, "--size", "64x64", "--text-length", 16)
    done = run(*small, "--prompts", tmp_path / "prompts.txt", "--count", 2, "--output", tmp_path / "out", "--seed", 3)
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [
        "0000-a-red-fox-in-the-snow-01.png", "0000-a-red-fox-in-the-snow-02.png", "0001-two-blue-squares-01.png",
        "0001-two-blue-squares-02.png", "sheet.png",
    ]  # fmt: skip
    image = Image.open(tmp_path / "out" / names[1])
    told = json.loads(image.text["dinalrm"])
    assert (told["prompt"], told["seed"], told["number"], told["steps"]) == (PROMPTS[0], 3, 1, 2)
    generator = dina.Generator.from_pretrained(tiny_pipeline)
    wanted = generator.decode(generator.sample([PROMPTS[0]] * 2, (64, 64), 2, seed=3, text_length=16))[1]
    assert np.abs(np.asarray(image).astype(int) - wanted).max() <= 1
    again = run(*small, "--prompt", "a, b", "--output", tmp_path / "out")
    assert again.returncode == 2
    assert "is not empty" in again.stderr
    assert "holds an empty prompt" in run(*small, "--prompt", " ", "--output", tmp_path / "x").stderr
    assert "give either --prompt" in run(*small, "--output", tmp_path / "x").stderr


def test_the_command_ranks_by_reward(tiny_pipeline, tmp_path):
    generator = dina.Generator.from_pretrained(tiny_pipeline)
    config = RewardModelConfig(
        transformer=generator.config,
        num_blocks=2,
        visual_taps=(1, 2),
        text_taps=(1,),
        encoders=EncodersConfig("sd3", 16),
    )
    dina.RewardModel.init(config).save(tmp_path / "reward")
    done = run(
        "--base-model", tiny_pipeline, "--prompt", "a, b", "--count", 3, "--steps", 2, "--size", "64x64",
        "--text-length", 16, "--checkpoint", tmp_path / "reward", "--output", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "out" / "ranking.csv").open()))
    scores = [float(row["score"]) for row in rows]
    assert [int(row["rank"]) for row in rows] == [1, 2, 3]
    assert scores == sorted(scores, reverse=True)
    assert {row["prompt"] for row in rows} == {"a, b"}
    model = dina.RewardModel.from_pretrained(tmp_path / "reward", tiny_pipeline)
    latents = generator.sample(["a, b"] * 3, (64, 64), 2, text_length=16)
    wanted = model.score_latents(latents, model.encode_prompt(["a, b"] * 3), sigma=(0.2, 0.5, 0.7))
    np.testing.assert_allclose(scores, sorted(wanted, reverse=True), atol=1e-4)
