"""The Latent Reward Model's head and criterion: against the public criterion, numpy, and finite differences."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import dinalrm_jax as dina
from dinalrm_jax import preference
from dinalrm_jax.mapping import ConfigError, from_mapping, to_mapping
from dinalrm_jax.model.batch import PromptEmbeds
from dinalrm_jax.model.config import RewardModelConfig
from dinalrm_jax.model.encoding import EncodersConfig
from dinalrm_jax.model.execution import ExecutionConfig
from dinalrm_jax.model.lrm import LRMHeadConfig, cosine_score
from dinalrm_jax.model.reward import is_trainable, reward_functional
from dinalrm_jax.noise import add_noise, timestep
from dinalrm_jax.server.config import ServerConfig
from dinalrm_jax.server.protocol import Limits
from dinalrm_jax.server.shapes import warmup_shapes
from tests.conftest import TINY, randomized

LRM = dataclasses.replace(
    TINY, text_taps=(), head=LRMHeadConfig(width=12), encoders=EncodersConfig("tiny", text_length=5)
)


@pytest.fixture(scope="module")
def model():
    params = randomized(reward_functional(LRM, ExecutionConfig()).init(0))
    return dina.RewardModel(LRM, jax.tree.map(jnp.asarray, params))


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(3)
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in ((3, 8, 6, 16), (3, 5, 24), (3, 20))]
    return arrays[0], PromptEmbeds(*arrays[1:])


@pytest.fixture(scope="module")
def criterion():
    """What `step_clip_criterion.py` computes on random features."""
    return dict(np.load(pathlib.Path(__file__).parent.parent / "golden" / "lrm.npz"))


def test_public_criterion(criterion):
    def loss(image_0, text):
        scores = [cosine_score(image, text, criterion["scale"]) for image in (image_0, criterion["image_1"])]
        losses = preference.soft_pair_loss(*scores, criterion["label_0"])
        return (preference.prompt_weights(criterion["counts"]) * losses).sum()

    value, gradients = jax.value_and_grad(loss, (0, 1))(*(jnp.asarray(criterion[k]) for k in ("image_0", "text")))
    np.testing.assert_allclose(value, criterion["pair_loss"], rtol=1e-5)
    for name, gradient in zip(("image_0", "text"), gradients):
        np.testing.assert_allclose(gradient, criterion[f"pair_grad_{name}"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(preference.prompt_weights(criterion["counts"]).sum(), 1, rtol=1e-6)
    assert float(preference.soft_pair_loss(jnp.ones(1), jnp.ones(1), jnp.full(1, 0.5))[0]) == pytest.approx(0, abs=1e-7)


def by_hand(model, noisy, sigma, prompt):
    """The score in plain numpy, of features that the backbone gives for one prompt at a time."""
    bound, weights = reward_functional(model.config, model.execution).bind(model.params), model.params
    empty = PromptEmbeds(
        *(np.repeat(weights[f"head.unconditional_{name}"], len(noisy), axis=0) for name in ("embeds", "pooled"))
    )
    taps = model.config.visual_taps

    def pooled(read):
        found = bound.backbone.features(noisy, timestep(sigma), read, visual_taps=taps, text_taps=()).visual
        return [np.asarray(tap, np.float64).mean(axis=1) for tap in found]

    with_prompt, without = pooled(prompt), pooled(empty)
    deepest = without[-1] + 7.5 * (with_prompt[-1] - without[-1])
    image = (
        np.concatenate([*with_prompt[:-1], deepest], axis=1) @ np.asarray(weights["head.visual_projection.weight"]).T
    )
    text = prompt.pooled_prompt_embeds @ np.asarray(weights["head.text_projection.weight"]).T
    cosine = (image * text).sum(axis=1) / np.linalg.norm(image, axis=1) / np.linalg.norm(text, axis=1)
    return np.exp(float(weights["head.log_scale"])) * cosine


def test_score_is_the_scaled_cosine_of_enhanced_features(model, inputs):
    latents, prompt = inputs
    noise = np.random.default_rng(4).standard_normal(latents.shape).astype(np.float32)
    noisy = np.asarray(add_noise(latents, jnp.full(3, 0.3), noise))
    expected = by_hand(model, noisy, jnp.full(3, 0.3), prompt)
    np.testing.assert_allclose(model.score_latents(latents, prompt, 0.3, noise), expected, rtol=1e-4, atol=1e-5)
    bound = reward_functional(model.config, model.execution).bind(model.params)
    np.testing.assert_allclose(bound.score_noisy(noisy, prompt, jnp.full(3, 0.3)), expected, rtol=1e-4, atol=1e-5)
    assert np.ptp(expected) > 0.1


def test_an_ensemble_compares_the_mean_of_its_levels_features(model, inputs):
    latents, prompt = inputs
    same = model.score_latents(latents, prompt, (0.4, 0.4, 0.4))
    np.testing.assert_allclose(same, model.score_latents(latents, prompt, 0.4), atol=1e-5)
    mixed, single = model.score_latents(latents, prompt, (0.1, 0.7)), model.score_latents(latents, prompt, 0.1)
    assert np.abs(mixed - single).max() > 1e-3


def test_gradients_by_finite_differences(inputs):
    """Float64, of the head; and all that trains has a gradient, the empty prompt's encoding too."""
    latents, prompt = inputs
    with jax.enable_x64(True):
        params = randomized(reward_functional(LRM, ExecutionConfig()).init(1))
        wide = {name: jnp.asarray(array, jnp.float64) for name, array in params.items()}
        head = reward_functional(LRM, ExecutionConfig()).bind(wide).head
        rng = np.random.default_rng(5)
        image, text = jnp.asarray(rng.standard_normal((3, 1, 32))), jnp.asarray(rng.standard_normal((3, 1, 20)))
        check_grads(lambda *tokens: head.score(*map(jnp.asarray, tokens)).sum(), (image, text), order=1, modes=["rev"])

    def total(params, latents):
        bound = reward_functional(LRM, ExecutionConfig()).bind(params)
        return bound.score_noisy(latents, prompt, jnp.full(3, 0.2)).sum()

    of_params = jax.grad(total)(jax.tree.map(jnp.asarray, params), latents)
    idle = {name for name, gradient in of_params.items() if is_trainable(name) and not gradient.any()}
    assert idle == set()


def test_without_guidance_the_backbone_reads_the_prompts_only(inputs):
    config = dataclasses.replace(LRM, head=LRMHeadConfig(guidance=1.0))
    module = reward_functional(config, ExecutionConfig())
    assert not any("unconditional" in name for name in module.shapes)
    latents, prompt = inputs
    features = module.bind(randomized(module.init(0))).features(latents, prompt, jnp.full(3, 0.2), latents)
    assert features.visual[0].shape[0] == 3


def test_saved_loaded_and_refused(model, inputs, tmp_path):
    latents, prompt = inputs
    model.save(tmp_path / "lrm")  # a scalar among its weights
    loaded = dina.RewardModel.from_pretrained(tmp_path / "lrm", dtype="float32")
    assert loaded.config == LRM
    assert loaded.digest == model.digest
    np.testing.assert_array_equal(loaded.score_latents(latents, prompt), model.score_latents(latents, prompt))
    assert from_mapping(RewardModelConfig, to_mapping(LRM)) == LRM
    with pytest.raises(ConfigError, match="only models with the Q-Former head can be exported"):
        model.export_released(tmp_path / "released")
    longer = PromptEmbeds(np.concatenate(2 * [prompt.prompt_embeds], axis=1), prompt.pooled_prompt_embeds)
    with pytest.raises(ValueError, match="empty prompt has 5 tokens, the prompts have 10"):
        model.score_latents(latents, longer)
    with pytest.raises(ConfigError, match="the lrm head reads no text stream; leave it empty"):
        dataclasses.replace(TINY, head=LRMHeadConfig())
    with pytest.raises(ConfigError, match="there is no head 'lmr'; known: q_former, lrm"):
        from_mapping(RewardModelConfig, to_mapping(LRM) | {"head": {"kind": "lmr"}})
    with pytest.raises(ConfigError, match="guidance must be at least 1"):
        LRMHeadConfig(guidance=0.5)


def test_a_server_warms_up_and_takes_prompts_of_the_empty_ones_length(model):
    limits = Limits.of(LRM, 4)
    (shape,) = warmup_shapes(ServerConfig(), model, limits)
    assert shape.tokens == 5
    assert limits.problems(8, 8, 5) == []
    assert limits.problems(8, 8, 333) == ["the prompt has 333 tokens, this model takes 5, as its own empty prompt has"]
    assert Limits.of(TINY, 4).problems(8, 8, 333) == []
    sd3 = dataclasses.replace(LRM, encoders=EncodersConfig("sd3", 128))
    assert warmup_shapes(ServerConfig(), dina.RewardModel.init(sd3), Limits.of(sd3, 4))[0].tokens == 77 + 128


def test_a_feature_of_zero_is_no_nan():
    """The tiny encoders pool a prompt without words to zeros."""
    found, gradient = jax.value_and_grad(lambda x: cosine_score(x, jnp.ones((1, 4)), 2.0)[0])(jnp.zeros((1, 4)))
    assert found == 0
    assert np.isfinite(gradient).all()
