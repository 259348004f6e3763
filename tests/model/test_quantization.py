"""Frozen matrices in int8: how far scores are from those of the weights as they are, and what is not done with them."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dinalrm_jax as dina
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.parameters import split
from dinalrm_jax.model.quantization import is_quantized, quantized, whole
from dinalrm_jax.model.reward import is_trainable
from tests.conftest import GOLDEN
from tests.server.serving import running


@pytest.fixture(scope="module")
def rounded():
    return dina.RewardModel.from_pretrained(GOLDEN, GOLDEN, dtype="int8")


def test_frozen_matrices_are_int8_and_nothing_else_is(golden_model, rounded):
    for name, array in golden_model.params.items():
        matrix = not is_trainable(name) and name.endswith(".weight") and array.ndim == 2
        found = rounded.params[name]
        assert is_quantized(found) == matrix, name
        if matrix:
            step = np.abs(np.asarray(array)).max(axis=1, keepdims=True) / 127  # a row's own
            # Half a step, and what float32 rounds.
            assert (np.abs(np.asarray(whole(found)) - array) <= 0.5001 * step + 1e-9).all(), name
        else:
            np.testing.assert_array_equal(found, array)
    trained, frozen = split(rounded.params, is_trainable)
    whole_size = sum(x.nbytes for x in split(golden_model.params, is_trainable)[1].values())
    assert sum(x.nbytes for x in jax.tree.leaves(frozen)) < 0.4 * whole_size, "float32 there, about a quarter here"


def test_scores_and_gradients_are_near(golden_model, rounded, cases, golden_prompt):
    latents = np.concatenate([cases["latents_chosen"], cases["latents_rejected"]])
    prompt = jax.tree.map(lambda x: np.concatenate([x, x]), golden_prompt)
    for level in (0.4, (0.2, 0.5, 0.7)):
        exact, near = (model.score_latents(latents, prompt, level) for model in (golden_model, rounded))
        assert np.abs(exact - near).max() < 0.05 * np.ptp(exact), "127 steps a row, through all blocks"
        assert np.abs(exact - near).max() > 0

    def gradient(model):
        reward = model.reward_fn(0.4)
        return jax.jit(jax.grad(lambda x: reward(model.params, x, prompt, jax.random.key(0)).sum()))(latents)

    ours, theirs = np.asarray(gradient(rounded)), np.asarray(gradient(golden_model))
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.99


def test_what_int8_weights_are_not_for(golden_model, rounded, tmp_path, monkeypatch):
    assert rounded.digest != golden_model.digest
    for action in (
        lambda: rounded.save(tmp_path / "a"),
        lambda: rounded.export_released(tmp_path / "b"),
        rounded.merge_lora,
    ):
        with pytest.raises(ValueError, match="int8 weights are rounded, and are not"):
            action()
    with pytest.raises(ConfigError, match="a given backbone is used as it is"):
        dina.RewardModel.from_pretrained(GOLDEN, GOLDEN, dtype="int8", backbone={})
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ConfigError, match=r"need the package qwix: pip install -e '.\[int8\]'"):
        quantized(dict(golden_model.params), lambda name: True)


def test_a_server_says_that_weights_are_int8(tiny_model):
    model = dataclasses.replace(tiny_model, params=quantized(dict(tiny_model.params), lambda n: not is_trainable(n)))
    with running(model, warmup=("4x4x5",), max_batch_size=1) as server:
        _, info = server.request("/v1/info")
        assert (info["dtype"], info["weights"]) == ("int8", model.digest)
        assert info["weights"] != tiny_model.digest


def test_bfloat16_matrices_have_float32_scales_and_are_taken_out():
    matrix = jnp.asarray(np.random.default_rng(0).standard_normal((6, 64)), jnp.bfloat16)
    params, exact = {"a.weight": matrix, "a.bias": jnp.ones(6)}, np.asarray(matrix, np.float32)
    found = whole(quantized(params, lambda name: True)["a.weight"])
    assert (params, found.dtype) == ({}, jnp.float32)
    assert (np.abs(np.asarray(found) - exact) <= 0.5001 * np.abs(exact).max(axis=1, keepdims=True) / 127).all()
