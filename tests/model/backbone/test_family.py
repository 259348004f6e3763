"""Backbones beside SD3.5-Medium: its siblings through the same family, and another family in one file."""

import json

import jax
import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel

import dinalrm_jax as dina
from dinalrm_jax import train
from dinalrm_jax.config import EvaluationConfig, OptimizerConfig, StageConfig, TrainConfig
from dinalrm_jax.convert import convert
from dinalrm_jax.data.records import Records
from dinalrm_jax.devices.mesh import MeshConfig
from dinalrm_jax.mapping import ConfigError, from_mapping, keys_below, to_mapping, with_defaults
from dinalrm_jax.model.backbone.family import BackboneConfig, Family, family_of, register, transformer_functional
from dinalrm_jax.model.backbone.sd3.config import SD3Config
from dinalrm_jax.model.config import HeadConfig, LoRAConfig, RewardModelConfig
from dinalrm_jax.model.encoding import EncodersConfig
from dinalrm_jax.model.execution import ExecutionConfig
from dinalrm_jax.model.reward import reward_functional
from dinalrm_jax.noise import add_noise, nearest_schedule_sigma
from dinalrm_jax.scenes.config import RehearsalConfig, ScenesConfig
from dinalrm_jax.server.protocol import serialize
from dinalrm_jax.weights.pretrained import export_diffusers, load_backbone
from tests.conftest import random_inputs
from tests.model.backbone import toy
from tests.server.serving import running

SIBLINGS = {"SD3-Medium": SD3Config.sd3_medium(), "SD3.5-Large": SD3Config.sd35_large()}
# Their published config.json, key by key; the first was written before there were the keys of the second.
PUBLISHED = {
    "SD3-Medium": {
        "attention_head_dim": 64, "caption_projection_dim": 1536, "in_channels": 16, "joint_attention_dim": 4096,
        "num_attention_heads": 24, "num_layers": 24, "out_channels": 16, "patch_size": 2,
        "pooled_projection_dim": 2048, "pos_embed_max_size": 192, "sample_size": 128,
    },
    "SD3.5-Large": {
        "attention_head_dim": 64, "caption_projection_dim": 2432, "in_channels": 16, "joint_attention_dim": 4096,
        "num_attention_heads": 38, "num_layers": 38, "out_channels": 16, "patch_size": 2,
        "pooled_projection_dim": 2048, "pos_embed_max_size": 192, "sample_size": 128,
        "dual_attention_layers": [], "qk_norm": "rms_norm",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SIBLINGS)
def test_published_siblings_have_diffusers_parameters(name, tmp_path):
    """Read from their `config.json`, whole, name by name and shape by shape, without their arrays."""
    values = {"_class_name": "SD3Transformer2DModel", **PUBLISHED[name]}
    config = family_of(SIBLINGS[name]).diffusers.read_config(values, "config.json")
    assert config == SIBLINGS[name]
    with torch.device("meta"):
        reference = SD3Transformer2DModel(**to_mapping(config))
    expected = {name: tuple(parameter.shape) for name, parameter in reference.named_parameters()}
    expected["pos_embed.proj.weight"] = (config.width, 4 * 16)
    expected["pos_embed.pos_embed"] = (2, config.pos_embed_max_size, config.width // 2)
    shapes = transformer_functional(config, ExecutionConfig()).shapes
    assert {name: shape.shape for name, shape in shapes.items()} == expected


def test_a_reward_model_on_the_large_one_has_a_head_and_adapters_of_its_width():
    model = RewardModelConfig(transformer=SIBLINGS["SD3.5-Large"])
    shapes = reward_functional(model, ExecutionConfig()).shapes
    assert len({name.split(".")[2] for name in shapes if name.startswith("backbone.transformer_blocks.")}) == 12
    assert shapes["backbone.transformer_blocks.0.attn.to_q.lora_A"].shape == (64, 2432)
    assert shapes["head.head.weight"].shape == (1, 2432)


@pytest.mark.parametrize("name", SIBLINGS)
def test_a_siblings_directory_gives_its_velocity(name, tmp_path):
    """A tiny one of the same kind, written by diffusers, and back."""
    torch.manual_seed(0)
    small = {"sample_size": 8, "num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8}
    small |= {"joint_attention_dim": 24, "caption_projection_dim": 16, "pooled_projection_dim": 20}
    small["pos_embed_max_size"] = 12
    kind = {key: value for key, value in PUBLISHED[name].items() if key in ("dual_attention_layers", "qk_norm")}
    reference = SD3Transformer2DModel(**small, **kind).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(std=0.3)
    reference.save_pretrained(tmp_path / "sibling")
    config, params = load_backbone(tmp_path / "sibling")
    assert (config.qk_norm, config.dual_attention_layers) == (SIBLINGS[name].qk_norm, ())
    latents, eps, prompt = random_inputs(config)
    noisy, timestep = add_noise(latents, 0.4, eps), np.full(2, 400, np.float32)
    found = transformer_functional(config, ExecutionConfig()).bind(params).velocity(noisy, timestep, prompt)
    with torch.no_grad():
        expected = reference(
            *(torch.from_numpy(np.array(x)) for x in (noisy.transpose(0, 3, 1, 2), *jax.tree.leaves(prompt), timestep))
        ).sample
    np.testing.assert_allclose(found, expected.permute(0, 2, 3, 1).numpy(), atol=2e-4 * expected.abs().max().item())
    export_diffusers(config, params, tmp_path / "back")
    again = SD3Transformer2DModel.from_pretrained(tmp_path / "back")
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0, atol=0)


# ------------------------------------------------------------------------------------- another family

TOY = RewardModelConfig(
    transformer=toy.ToyConfig(),
    num_blocks=2,
    visual_taps=(0, 1, 2),
    text_taps=(),
    lora=LoRAConfig(rank=2, alpha=4.0),
    head=HeadConfig(num_attn_heads=2),
    encoders=EncodersConfig("tiny", 16),
)


def test_a_family_is_told_apart_by_its_name():
    assert to_mapping(toy.ToyConfig(num_layers=5)) == {"family": "toy", "num_layers": 5, "width": 16, "text_width": 64}
    assert from_mapping(RewardModelConfig, to_mapping(TOY)) == TOY
    assert "family" not in to_mapping(RewardModelConfig())["transformer"], "files of SD3 models stay as they are"
    assert from_mapping(BackboneConfig, {"num_layers": 4}) == SD3Config(num_layers=4)
    defaults = with_defaults(RewardModelConfig, {"transformer": {"family": "toy"}}).transformer
    assert dict(defaults) == {"family": "toy", "num_layers": 3, "width": 16, "text_width": 64}
    with pytest.raises(ConfigError, match="no backbone family 'toi'; known: sd3, toy"):
        from_mapping(RewardModelConfig, {"transformer": {"family": "toi"}})
    with pytest.raises(ConfigError, match="no text stream; leave it empty"):
        RewardModelConfig(transformer=toy.ToyConfig(), num_blocks=2, visual_taps=(1,), text_taps=(1,))
    assert {"num_layers", "dual_attention_layers", "head"} <= keys_below(TrainConfig), "of every family, for hints"
    with pytest.raises(ConfigError, match="config.transformer: there is no"):
        from_mapping(RewardModelConfig, {"transformer": {"family": "toi"}})
    with pytest.raises(ConfigError, match="a rehearsal makes an SD3 pipeline, .* family 'toy'"):
        TrainConfig("x", TOY, StageConfig(1, 1), rehearsal=RehearsalConfig())
    register(toy.FAMILY)  # the same again
    with pytest.raises(ValueError, match="a backbone family 'toy' already"):
        register(Family(toy.ToyConfig, toy.Toy, lambda *_: [], ()))


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """A whole run, generator and reward stage, on two by two devices."""
    workdir = tmp_path_factory.mktemp("toy") / "run"
    optimizer = OptimizerConfig(learning_rate=3e-3, warmup_steps=2)
    stage = {"steps": 6, "batch_size": 4, "checkpoint_every": 3, "optimizer": optimizer}
    config = TrainConfig(
        "toy",
        TOY,
        StageConfig(evaluate_every=3, **stage),
        generator=StageConfig(**stage),
        scenes=ScenesConfig(train_pairs=8, eval_pairs=4, image_size=32),
        evaluation=EvaluationConfig(levels=(0.2,), batch_size=4),
        mesh=MeshConfig(data=2, fsdp=2),
    )
    train.run(config, workdir)
    return workdir


def test_another_family_trains_scores_converts_and_serves(toy_run, tmp_path):
    model = dina.RewardModel.from_pretrained(toy_run / "model", dtype="float32")
    assert model.config == TOY
    fresh = reward_functional(TOY, model.execution).init(0)
    moved = [name for name in fresh if name.endswith("lora_B") and np.abs(model.params[name]).max() > 0]
    assert len(moved) == 4, "the adapters of both blocks have learnt"
    pair = Records(toy_run / "data").pairs("eval")[0]
    records = Records(toy_run / "data")
    latents = records.images[pair.chosen].latents[None].astype(np.float32)
    text = records.prompts[pair.prompt]
    prompt = dina.PromptEmbeds(text.prompt_embeds[None], text.pooled_prompt_embeds[None])
    score = model.score_latents(latents, prompt, sigma=0.4, seed=3)
    assert np.isfinite(score).all()

    best = next((toy_run / "reward" / "best").iterdir())
    convert(
        "native", checkpoint=str(best), base_model=None, output=str(tmp_path / "native"), dtype="float32", verify=False
    )
    config = json.loads((tmp_path / "native" / "config.json").read_text())["config"]
    assert config["transformer"]["family"] == "toy"
    again = dina.RewardModel.from_pretrained(tmp_path / "native", dtype="float32")
    assert again.config == TOY

    height, width, tokens = *latents.shape[1:3], prompt.prompt_embeds.shape[1]
    with running(model, warmup=(f"{height}x{width}x{tokens}",)) as server:
        body = serialize(latents, prompt, np.full(1, 0.4, np.float32), np.array([3]))
        served = server.score(body)
    level = float(nearest_schedule_sigma(np.float32(0.4)))  # the protocol's levels are the scheduler's
    expected = model.score_latents(latents, prompt, sigma=level, seed=[3])
    assert served["raw_scores"] == pytest.approx(expected.tolist(), abs=1e-5)
