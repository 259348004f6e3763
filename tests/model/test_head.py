"""The head in the forms that the golden model does not have, against the released forward in torch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from dinalrm_jax.model.backbone.family import Features
from dinalrm_jax.model.batch import PromptEmbeds
from dinalrm_jax.model.config import HeadConfig
from dinalrm_jax.model.head import RewardHead
from dinalrm_jax.model.parameters import functional
from dinalrm_jax.weights.verify import torch_head, torch_head_tokens
from tests.conftest import TINY, randomized

FORMS = {
    "input projections asked for": dataclasses.replace(TINY, head=HeadConfig(use_proj_in=True)),
    "another width": dataclasses.replace(TINY, head=HeadConfig(width=32, num_queries=3, num_attn_heads=4)),
    "no text taps": dataclasses.replace(TINY, text_taps=()),
}


def reward_head(config, rngs):
    taps = len(config.visual_taps), len(config.text_taps)
    return RewardHead(config.head, config.transformer.width, *taps, rngs=rngs)


@pytest.mark.parametrize("config", FORMS.values(), ids=FORMS.keys())
def test_forms_of_the_head(config):
    module = functional(lambda rngs: reward_head(config, rngs))
    params = randomized(module.init(0))
    rng = np.random.default_rng(0)
    temb = rng.standard_normal((2, 16)).astype(np.float32)
    image = [rng.standard_normal((2, 6, 16)).astype(np.float32) for _ in config.visual_taps]
    text = [rng.standard_normal((2, 5, 16)).astype(np.float32) for _ in config.text_taps]
    head: RewardHead = module.bind(params)
    features = jax.tree.map(jnp.asarray, Features(temb, tuple(image), tuple(text)))
    prompt = PromptEmbeds(np.zeros((2, 5, 24)), np.zeros((2, 20)))  # which this head reads in the backbone only
    score = head.score(*head.tokens(features, prompt))
    weights = {name: torch.from_numpy(np.array(array)) for name, array in params.items()}
    image, text = ([torch.from_numpy(tap) for tap in taps] for taps in (image, text))
    tokens = torch_head_tokens(weights, image, text, torch.from_numpy(temb))
    expected = torch_head(weights, *tokens, config.head.num_attn_heads)
    np.testing.assert_allclose(score, expected.numpy(), atol=1e-5)


def test_fresh_head_starts_without_modulation_and_with_half_open_gates():
    head = reward_head(TINY, nnx.Rngs(0))
    for adapter in (*head.layer_adapters_visual, *head.layer_adapters_text):
        assert not adapter.cond_mlp[2].weight[...].any()
    assert not head.attn1.gate_vis[2].weight[...].any()
    assert not head.attn1.gate_text[2].bias[...].any()
    assert head.attn2.gate_vis is None
    assert float(head.query_tokens[...].std()) == pytest.approx(0.02, rel=0.5)
