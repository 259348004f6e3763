"""The backbone against diffusers' `SD3Transformer2DModel` on random tiny weights, in float32."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel

from dinalrm_jax import noise
from dinalrm_jax.mapping import ConfigError, to_mapping
from dinalrm_jax.model import tables
from dinalrm_jax.model.backbone.family import transformer_functional
from dinalrm_jax.model.backbone.sd3.config import SD3Config
from dinalrm_jax.model.backbone.sd3.weights import table, unused_by_truncation
from dinalrm_jax.model.config import RewardModelConfig
from dinalrm_jax.model.execution import ExecutionConfig
from dinalrm_jax.model.reward import reward_functional
from tests.conftest import TINY_SD3, random_inputs

GEOMETRIES = {
    "SD3.5: dual attention in the first half, qk norm": TINY_SD3,
    "SD3: no dual attention, no qk norm": dataclasses.replace(TINY_SD3, dual_attention_layers=(), qk_norm=None),
    "dual attention everywhere, other widths and patch": dataclasses.replace(
        TINY_SD3, num_layers=3, num_attention_heads=3, caption_projection_dim=24, dual_attention_layers=(0, 1, 2),
        patch_size=4, in_channels=5, out_channels=7,
    ),
}  # fmt: skip


def torch_transformer(config: SD3Config) -> SD3Transformer2DModel:
    torch.manual_seed(0)
    model = SD3Transformer2DModel(**to_mapping(config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3 if parameter.ndim < 2 else parameter[0].numel() ** -0.5)
            if name.endswith(("norm_q.weight", "norm_k.weight", "norm_added_q.weight", "norm_added_k.weight")):
                parameter.add_(1.0)
    return model


def converted(config: SD3Config, model: SD3Transformer2DModel, execution: ExecutionConfig):
    module = transformer_functional(config, execution)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    params = tables.load(tensors, table(config), module.shapes, source="torch")
    return module.bind({name: jnp.asarray(array) for name, array in params.items()})


@pytest.mark.parametrize("layers", ["loop", "scan"])
@pytest.mark.parametrize("config", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_velocity_and_taps(config, layers):
    reference = torch_transformer(config)
    ours = converted(config, reference, ExecutionConfig(layers=layers))
    latents, _, prompt = random_inputs(config, height=4 * config.patch_size, width=6 * config.patch_size)
    timestep = np.array([120.0, 873.5], np.float32)

    taps = {}
    for index, block in enumerate(reference.transformer_blocks, start=1):
        block.register_forward_hook(lambda _, __, out, index=index: taps.__setitem__(index, out))
    with torch.no_grad():
        expected = reference(
            torch.from_numpy(latents).permute(0, 3, 1, 2),
            torch.from_numpy(np.array(prompt.prompt_embeds)),
            torch.from_numpy(np.array(prompt.pooled_prompt_embeds)),
            torch.from_numpy(timestep),
        ).sample

    velocity = jax.jit(ours.velocity)(latents, timestep, prompt)
    np.testing.assert_allclose(velocity, expected.permute(0, 2, 3, 1).numpy(), atol=1e-4)
    last = config.num_layers
    features = ours.features(latents, timestep, prompt, visual_taps=(1, last), text_taps=(last - 1,))
    np.testing.assert_allclose(features.visual[0], taps[1][1].numpy(), atol=1e-4)
    np.testing.assert_allclose(features.visual[1], taps[last][1].numpy(), atol=1e-4)
    np.testing.assert_allclose(features.text[0], taps[last - 1][0].numpy(), atol=1e-4)


def test_tap_zero_is_the_embedded_input():
    reference = torch_transformer(TINY_SD3)
    ours = converted(TINY_SD3, reference, ExecutionConfig())
    latents, _, prompt = random_inputs(TINY_SD3)
    features = ours.features(latents, np.array([1.0, 2.0]), prompt, visual_taps=(0, 2), text_taps=(0,))
    with torch.no_grad():
        image = reference.pos_embed(torch.from_numpy(latents).permute(0, 3, 1, 2))
        text = reference.context_embedder(torch.from_numpy(np.array(prompt.prompt_embeds)))
    np.testing.assert_allclose(features.visual[0], image.numpy(), atol=1e-5)
    np.testing.assert_allclose(features.text[0], text.numpy(), atol=1e-5)


def test_fresh_model_has_diffusers_position_table():
    """Without a checkpoint the table is computed; with one it is read: both must be diffusers'."""
    fresh = transformer_functional(TINY_SD3, ExecutionConfig()).init(0)
    written = tables.dump({"pos_embed.pos_embed": fresh["pos_embed.pos_embed"]}, table(TINY_SD3))
    expected = SD3Transformer2DModel(**to_mapping(TINY_SD3)).pos_embed.pos_embed.numpy()
    np.testing.assert_allclose(written["pos_embed.pos_embed"], expected, atol=1e-6)


def test_a_table_that_is_not_separable_is_refused():
    model = torch_transformer(TINY_SD3)
    tensors = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    tensors["pos_embed.pos_embed"][0, 7, 3] += 1e-3
    shapes = transformer_functional(TINY_SD3, ExecutionConfig()).shapes
    with pytest.raises(tables.WeightsError, match="not a sin-cos table"):
        tables.load(tensors, table(TINY_SD3), shapes, source="torch")


def test_bfloat16_stays_close():
    reference = torch_transformer(TINY_SD3)
    exact = converted(TINY_SD3, reference, ExecutionConfig())
    half = converted(TINY_SD3, reference, ExecutionConfig(dtype="bfloat16"))
    latents, eps, prompt = random_inputs(TINY_SD3)
    noisy = noise.add_noise(latents, 0.4, eps)
    timestep = np.array([400.0, 400.0], np.float32)
    expected, found = (model.velocity(noisy, timestep, prompt) for model in (exact, half))
    assert found.dtype == jnp.bfloat16
    # bfloat16 keeps 8 bits: 4 layers of such roundings stay within a few per cent of the output's size.
    assert np.abs(found.astype(np.float32) - expected).max() < 0.05 * np.abs(expected).max()


def test_full_size_has_diffusers_parameters():
    """Names and shapes of SD3.5-Medium, truncated to 12 blocks, against diffusers on the meta device."""
    config = SD3Config()
    with torch.device("meta"):
        reference = SD3Transformer2DModel(**to_mapping(config))
    expected = {name: tuple(parameter.shape) for name, parameter in reference.named_parameters()}
    expected["pos_embed.proj.weight"] = (1536, 64)
    expected["pos_embed.pos_embed"] = (2, 384, 768)
    model = reward_functional(RewardModelConfig(), ExecutionConfig()).shapes
    kept = {name.removeprefix("backbone."): shape.shape for name, shape in model.items() if "lora" not in name}
    kept = {name: shape for name, shape in kept.items() if not name.startswith("head.")}
    pattern = unused_by_truncation(12)
    assert kept == {name: shape for name, shape in expected.items() if not re.fullmatch(pattern, name)}


def test_full_size_parameter_counts():
    """The published model's counts (docs/method.md, Backbone and Head)."""
    shapes = reward_functional(RewardModelConfig(), ExecutionConfig()).shapes
    count = {"lora": 0, "head": 0, "frozen": 0}
    for name, shape in shapes.items():
        part = "lora" if ".lora_" in name else "head" if name.startswith("head.") else "frozen"
        count[part] += 0 if name.endswith("pos_embed.pos_embed") else int(np.prod(shape.shape))
    assert count["lora"] == 28_311_552
    assert abs(count["head"] - 139.3e6) < 0.05e6
    # Name by name diffusers' (above); with the adapters 1,261M, about 1,260M.
    assert count["frozen"] == 1_232_739_840


def test_geometry_errors():
    with pytest.raises(ConfigError, match="caption_projection_dim is 8.*width.*= 16"):
        dataclasses.replace(TINY_SD3, caption_projection_dim=8)
    truncated = reward_functional(
        RewardModelConfig(transformer=TINY_SD3, num_blocks=3, visual_taps=(1,), text_taps=()), ExecutionConfig()
    )
    model = truncated.bind(truncated.init(0))
    latents, _, prompt = random_inputs(TINY_SD3)
    with pytest.raises(ValueError, match="keeps 3 of 4 blocks and has no output layers"):
        model.backbone.velocity(latents, np.array([1.0, 1.0]), prompt)
