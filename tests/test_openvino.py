"""The reward by OpenVINO, where it is installed; and the program that its front end is given, anywhere."""

import importlib.util
import sys

import jax
import numpy as np
import pytest

import dinalrm_jax as dina
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.openvino import CALLS, NOTHING, OpenVINOReward, flattened
from tests.conftest import GOLDEN


@pytest.mark.heavy
def test_flattening_changes_no_number(golden_model, cases, golden_prompt):
    reward = golden_model.reward_fn((0.2, 0.7))
    rows = jax.tree.map(np.asarray, (cases["latents_chosen"], golden_prompt))

    def score(latents, embeds, pooled):
        return reward(
            golden_model.params, latents, dina.PromptEmbeds(embeds, pooled), jax.random.key(0), cases["noise"]
        )

    arguments = rows[0], rows[1].prompt_embeds, rows[1].pooled_prompt_embeds
    closed = jax.make_jaxpr(score)(*arguments)
    flat = flattened(closed, [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arguments])
    left = {equation.primitive.name for equation in flat.jaxpr.eqns}
    assert not left & {*CALLS, *NOTHING, "split", "unstack", "iota", "sin"}
    assert any(equation.primitive.name in CALLS for equation in closed.jaxpr.eqns), "there were calls"
    (found,) = jax.core.eval_jaxpr(flat.jaxpr, flat.consts, *arguments)
    np.testing.assert_allclose(found, score(*arguments), atol=1e-6)


def test_scores_are_those_of_xla(golden_model, cases, golden_prompt):
    if importlib.util.find_spec("openvino") is None:
        pytest.skip("openvino is not installed: pip install -e '.[openvino]'")
    latents, tokens = cases["latents_chosen"], golden_prompt.prompt_embeds.shape[1]
    compiled = OpenVINOReward(golden_model, *latents.shape[:3], tokens, sigma=0.4)
    expected = golden_model.score_latents(latents, golden_prompt, 0.4, seed=3)
    np.testing.assert_allclose(compiled(latents, golden_prompt, seed=3), expected, atol=1e-5)
    with pytest.raises(ValueError, match="this was compiled for"):
        compiled(latents[:1], golden_prompt[:1])


def test_what_it_needs(golden_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ConfigError, match=r"pip install -e '.\[openvino\]'"):
        OpenVINOReward(golden_model, 1, 16, 16, 20)
    monkeypatch.setitem(sys.modules, "openvino", sys)
    half = dina.RewardModel.from_pretrained(GOLDEN, GOLDEN, dtype="bfloat16")
    with pytest.raises(ConfigError, match="compiles a model of float32, this one is bfloat16"):
        OpenVINOReward(half, 1, 16, 16, 20)
