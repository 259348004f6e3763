"""Against the released PyTorch code's outputs on the released-layout golden model, in float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dinalrm_jax as dina
from dinalrm_jax.model.backbone.family import transformer_functional
from dinalrm_jax.model.execution import ExecutionConfig
from dinalrm_jax.model.reward import is_trainable, reward_functional
from dinalrm_jax.preference import LossConfig, pair_loss
from dinalrm_jax.weights.pretrained import load_backbone
from tests.conftest import GOLDEN

# The released constants: sigma_0^2 = 0.05, 1e-6 inside both roots (docs/method.md, Loss).
RELEASED_LOSSES = {
    "loss_bt": LossConfig(name="bradley_terry"),
    "loss_bt-margin": LossConfig(name="bradley_terry", margin=1.0),
    "loss_thurstone": LossConfig(sigma_0=0.05**0.5, epsilon=1e-6),
    "loss_thurstone-constant": LossConfig(variance="constant", constant_variance=0.5, epsilon=1e-6),
}
EXECUTIONS = {
    "loop": ExecutionConfig(),
    "loop, blocks rematerialised": ExecutionConfig(remat="block"),
    "scan, dots kept": ExecutionConfig(layers="scan", remat="dots"),
}


def relative_error(ours, theirs) -> float:
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


@pytest.fixture(scope="module")
def bound(golden_model):
    return reward_functional(golden_model.config, golden_model.execution).bind(golden_model.params)


def test_taps_and_conditioning(bound, cases, golden_prompt):
    features = bound.features(cases["latents_chosen"], golden_prompt, cases["sigma"], cases["noise"])
    np.testing.assert_allclose(features.temb, cases["temb"], atol=1e-4)
    for index, tap in enumerate((1, 3, 5)):
        np.testing.assert_allclose(features.visual[index], cases[f"visual_{tap}"], atol=1e-4)
        np.testing.assert_allclose(features.text[index], cases[f"text_{tap}"], atol=1e-4)


@pytest.mark.parametrize("role", ["chosen", "rejected"])
def test_score_with_a_level_per_row(bound, cases, golden_prompt, role):
    scores = bound(cases[f"latents_{role}"], golden_prompt, jnp.asarray(cases["sigma"]), cases["noise"])
    expected = cases["score_chosen" if role == "chosen" else "score_reject"][:, 0]
    np.testing.assert_allclose(scores, expected, atol=1e-4)


def test_public_scores_and_ensemble(golden_model, cases, golden_prompt):
    levels = cases["ensemble_sigmas"].tolist()
    for sigma, expected in zip(levels, cases["score_by_sigma"]):
        scores = golden_model.score_latents(cases["latents_chosen"], golden_prompt, sigma, cases["noise"])
        np.testing.assert_allclose(scores, expected[:, 0], atol=1e-4)
    ensemble = golden_model.score_latents(cases["latents_chosen"], golden_prompt, levels, cases["noise"])
    np.testing.assert_allclose(ensemble, cases["score_ensemble"][:, 0], atol=1e-4)
    mean = cases["score_by_sigma"].mean(axis=0)[:, 0]
    assert np.abs(ensemble - mean).max() > 0.1, "the ensemble must not be the mean of the single scores"


@pytest.mark.parametrize("execution", EXECUTIONS.values(), ids=EXECUTIONS.keys())
def test_latent_gradient_however_it_is_computed(golden_model, cases, golden_prompt, execution):
    model = dataclasses.replace(golden_model, execution=execution)
    module = reward_functional(model.config, model.execution)

    @jax.jit
    def total(latents):
        return module.bind(model.params)(latents, golden_prompt, jnp.asarray(cases["sigma"]), cases["noise"]).sum()

    gradient = jax.grad(total)(jnp.asarray(cases["latents_chosen"]))
    assert relative_error(gradient, cases["grad_latents"]) < 1e-3


@pytest.mark.parametrize("name", RELEASED_LOSSES)
def test_released_losses(cases, name):
    losses = pair_loss(cases["score_chosen"][:, 0], cases["score_reject"][:, 0], cases["sigma"], RELEASED_LOSSES[name])
    np.testing.assert_allclose(losses.mean(), cases[name], atol=1e-6)


def test_training_gradients(golden_model, cases, golden_prompt):
    module = reward_functional(golden_model.config, golden_model.execution)
    trainable = {name: array for name, array in golden_model.params.items() if is_trainable(name)}
    frozen = {name: array for name, array in golden_model.params.items() if not is_trainable(name)}

    def loss(trainable):
        model = module.bind({**frozen, **trainable})
        sigma = jnp.asarray(cases["sigma"])
        chosen, rejected = (
            model(cases[f"latents_{role}"], golden_prompt, sigma, cases["noise"]) for role in ("chosen", "rejected")
        )
        return pair_loss(chosen, rejected, sigma, RELEASED_LOSSES["loss_thurstone"]).mean()

    gradients = jax.jit(jax.grad(loss))(trainable)
    compared = 0
    for key in cases:
        if key.startswith("grad:backbone."):
            path = key.removeprefix("grad:backbone.base_model.model.").replace(".default.weight", "")
            assert relative_error(gradients[f"backbone.{path}"], cases[key]) < 1e-3, key
            compared += 1
        elif key.startswith("grad:reward_head."):
            assert relative_error(gradients["head." + key.removeprefix("grad:reward_head.")], cases[key]) < 1e-3, key
            compared += 1
    assert compared == 6
    np.testing.assert_allclose(optax.global_norm(gradients), cases["grad_norm"], rtol=1e-3)


@pytest.mark.parametrize("layers", ["loop", "scan"])
def test_velocity_of_the_whole_transformer(cases, golden_prompt, layers):
    execution = ExecutionConfig(layers=layers)
    config, params = load_backbone(GOLDEN, execution)
    module = transformer_functional(config, execution).bind(params)
    sigma = jnp.asarray(cases["sigma"])
    noisy = dina.noise.add_noise(cases["latents_chosen"], sigma, cases["noise"])
    velocity = module.velocity(noisy, dina.noise.timestep(sigma), golden_prompt)
    np.testing.assert_allclose(velocity, cases["velocity_base"], atol=1e-4)


def test_released_nearest_sigma(cases):
    sigma = dina.noise.nearest_schedule_sigma(cases["schedule_u"])
    np.testing.assert_allclose(sigma, cases["schedule_sigma"], atol=1e-6)
    np.testing.assert_allclose(dina.noise.timestep(sigma), cases["schedule_timestep"], atol=1e-3)


def test_merged_adapters_score_the_same(golden_model, cases, golden_prompt):
    arguments = (cases["latents_chosen"], golden_prompt, 0.5, cases["noise"])
    merged = golden_model.merge_lora()
    assert not any("lora" in name for name in merged.params)
    np.testing.assert_allclose(merged.score_latents(*arguments), golden_model.score_latents(*arguments), atol=1e-4)
