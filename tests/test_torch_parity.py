"""Random tiny models, exported to the released layout and run by diffusers, PEFT and torch.

Scores, ensembles and all trainable gradients, for geometries that the golden model does not have.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import dinalrm_jax as dina
from dinalrm_jax.model import tables
from dinalrm_jax.model.config import HeadConfig
from dinalrm_jax.model.execution import ExecutionConfig
from dinalrm_jax.model.reward import is_trainable, reward_functional
from dinalrm_jax.weights import pretrained, released
from dinalrm_jax.weights.verify import ReleasedInTorch
from tests.conftest import TINY, TINY_SD3, random_inputs, randomized

MODELS = {
    "dual attention in two of four blocks": TINY,
    "no dual attention, no qk norm, last text block unadapted": dataclasses.replace(
        TINY,
        transformer=dataclasses.replace(TINY_SD3, dual_attention_layers=(), qk_norm=None),
        visual_taps=(2, 3),
        text_taps=(1, 2),
    ),
    "frozen backbone, input taps, another head": dataclasses.replace(
        TINY, lora=None, visual_taps=(0, 3), text_taps=(0, 2), head=HeadConfig(width=32, use_proj_in=True)
    ),
}
LEVELS = (0.35, (0.2, 0.5, 0.7))


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS.keys())
def both(request, tmp_path_factory):
    """(our model, the same in torch), the weights having passed through files."""
    config, directory = request.param, tmp_path_factory.mktemp("parity")
    whole = randomized(pretrained.transformer_functional(config.transformer, ExecutionConfig()).init(0), seed=1)
    params = randomized(reward_functional(config, ExecutionConfig()).init(0), seed=2)
    params |= pretrained.truncate(whole, config)
    model = dina.RewardModel(config, params)
    pretrained.export_diffusers(config.transformer, whole, directory / "base")
    model.export_released(directory / "released")
    again = dina.RewardModel.from_pretrained(directory / "released", directory / "base", dtype="float32")
    assert again.config == config
    chex.assert_trees_all_equal(again.params, params)
    return model, ReleasedInTorch(str(directory / "released"), str(directory / "base"), config)


@pytest.mark.parametrize("sigma", LEVELS)
def test_scores(both, sigma):
    model, reference = both
    latents, eps, prompt = random_inputs(TINY_SD3)
    expected = reference.score(latents, prompt, sigma, eps)
    np.testing.assert_allclose(model.score_latents(latents, prompt, sigma, eps), expected, atol=1e-4)


@pytest.mark.parametrize("sigma", LEVELS)
def test_gradients(both, sigma):
    model, reference = both
    latents, eps, prompt = random_inputs(TINY_SD3)
    reward = model.reward_fn(sigma)
    weights = jnp.array([1.0, -2.0])  # unequal, so that no bias cancels

    def total(trainable, x):
        return weights @ reward({**model.params, **trainable}, x, prompt, jax.random.key(0), noise=jnp.asarray(eps))

    trainable = {name: array for name, array in model.params.items() if is_trainable(name)}
    ours, ours_latents = jax.jit(jax.grad(total, argnums=(0, 1)))(trainable, jnp.asarray(latents))

    tensors = [torch.from_numpy(np.array(array)) for array in (latents, *jax.tree.leaves(prompt), eps)]
    tensors[0].requires_grad_(True)
    for weight in reference.head.values():
        weight.requires_grad_(True)
        weight.grad = None
    reference.transformer.zero_grad()
    (reference.forward(*tensors, sigma) * torch.tensor([1.0, -2.0])).sum().backward()

    size = max(float(jnp.abs(gradient).max()) for gradient in ours.values())
    assert_close(ours_latents, tensors[0].grad, size, "latents")
    theirs = {f"head.{name}": weight.grad for name, weight in reference.head.items()}
    adapters = {
        f"base_model.model.{name.replace('.default', '')}": parameter.grad
        for name, parameter in reference.transformer.named_parameters()
        if ".lora_" in name
    }
    lora = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in ours.items() if ".lora_" in name}
    theirs |= tables.load(adapters, released.LORA, lora, source="torch")
    assert theirs.keys() == ours.keys()
    for name, gradient in ours.items():
        assert_close(gradient, theirs[name], size, name)


def assert_close(ours, theirs, size, name):
    """1e-3 relative; what is zero but for rounding (a key's bias, under softmax) is held against the largest."""
    theirs = theirs.detach().numpy()
    error = np.abs(np.asarray(ours) - theirs).max()
    assert error <= 1e-3 * np.abs(theirs).max() + 1e-6 * size, (name, error, np.abs(theirs).max())
