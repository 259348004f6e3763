import dataclasses

import jax
import numpy as np
import pytest
from diffusers import SD3Transformer2DModel
from peft import LoraConfig, get_peft_model

from dinalrm_jax.mapping import to_mapping
from dinalrm_jax.model import lora, tables
from dinalrm_jax.model.config import LoRAConfig
from dinalrm_jax.model.execution import ExecutionConfig
from dinalrm_jax.model.reward import is_trainable, reward_functional
from dinalrm_jax.weights import released
from tests.conftest import TINY, TINY_SD3, randomized

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


@pytest.mark.parametrize("text_taps", [(1, 3), (1,)], ids=["last text stream tapped", "last text stream unread"])
def test_adapters_sit_where_peft_puts_them(text_taps):
    """Names and shapes of PEFT's adapters under the released code's targets and exclusions."""
    config = dataclasses.replace(TINY, text_taps=text_taps)
    backbone = SD3Transformer2DModel(**to_mapping(TINY_SD3))
    backbone.transformer_blocks = backbone.transformer_blocks[:3]
    unread = [f"transformer_blocks.2.attn.{name}" for name in TARGETS[4:]] if text_taps[-1] != 3 else None
    peft = get_peft_model(backbone, LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS, exclude_modules=unread))
    expected = {
        name.replace(".default", ""): tuple(parameter.shape)
        for name, parameter in peft.named_parameters()
        if "lora_" in name
    }
    shapes = reward_functional(config, ExecutionConfig()).shapes
    adapters = {name: np.empty(shape.shape) for name, shape in shapes.items() if ".lora_" in name}
    assert {name: array.shape for name, array in tables.dump(adapters, released.LORA).items()} == expected
    assert len(expected) == 2 * (3 * 8 + 2 * 4 - (0 if unread is None else 4))


def test_initial_adapters_change_nothing_and_have_pefts_spread():
    config = dataclasses.replace(TINY, lora=LoRAConfig(rank=8, alpha=16.0))
    params = reward_functional(config, ExecutionConfig()).init(0)
    lora_a = np.concatenate([array.ravel() for name, array in params.items() if name.endswith("lora_A")])
    assert lora_a.std() == pytest.approx(1 / 8, rel=0.05)  # torch.nn.init.normal_(std=1 / r)
    assert all(not array.any() for name, array in params.items() if name.endswith("lora_B"))


def test_merge_and_unmerge_are_inverse(tiny_model):
    merged = lora.merge(tiny_model.params, TINY.lora)
    weight = "backbone.transformer_blocks.0.attn.to_q"
    a, b = (np.asarray(tiny_model.params[f"{weight}.{part}"]) for part in ("lora_A", "lora_B"))
    expected = np.asarray(tiny_model.params[f"{weight}.weight"]) + 4.0 / 2 * b @ a
    np.testing.assert_allclose(merged[f"{weight}.weight"], expected, atol=1e-6)

    adapters = {name: array for name, array in tiny_model.params.items() if ".lora_" in name}
    restored = lora.unmerge(merged, adapters, TINY.lora)
    assert restored.keys() == tiny_model.params.keys()
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), restored, tiny_model.params)


def test_what_trains():
    module = reward_functional(TINY, ExecutionConfig())
    params = randomized(module.init(0))
    trainable = {name for name in params if is_trainable(name)}
    assert {name for name in trainable if name.startswith("backbone.")} == {n for n in params if ".lora_" in n}
    assert {name for name in params if name.startswith("head.")} <= trainable
