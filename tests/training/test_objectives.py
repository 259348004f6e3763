"""What a stage minimises: the released loss on the golden model, and each row's own noise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dinalrm_jax as dina
from dinalrm_jax.config import LossConfig, SigmaConfig
from dinalrm_jax.reward_model import reward_functional
from dinalrm_jax.training.objectives import reward_losses, reward_objective
from dinalrm_jax.training.step import row_keys
from tests.conftest import TINY_SD3, random_inputs

RELEASED = LossConfig(sigma_0=0.05**0.5, epsilon=1e-6)
ROWS = 6


@pytest.fixture(scope="module")
def golden_batch(cases, golden_prompt):
    latents = (jnp.asarray(cases[f"latents_{role}"]) for role in ("chosen", "rejected"))
    return dina.PreferenceBatch(*latents, golden_prompt)


def test_the_released_loss_of_the_golden_pairs(golden_model, golden_batch, cases):
    """With the released code's sigma of each row, which differ, and its noise."""
    assert len(set(cases["sigma"].tolist())) > 1
    module = reward_functional(golden_model.config, golden_model.execution)

    def mean_loss(batch, sigma):
        losses, _ = reward_losses(module, RELEASED, golden_model.params, batch, jnp.asarray(sigma), cases["noise"])
        return float(losses.mean())

    assert mean_loss(golden_batch, cases["sigma"]) == pytest.approx(float(cases["loss_thurstone"]), abs=1e-5)
    swapped = dataclasses.replace(golden_batch, chosen=golden_batch.rejected, rejected=golden_batch.chosen)
    assert abs(mean_loss(swapped, cases["sigma"]) - cases["loss_thurstone"]) > 1e-2
    assert abs(mean_loss(golden_batch, cases["sigma"][::-1]) - cases["loss_thurstone"]) > 1e-3


class Reading:
    """Stands in for the reward model: the "score" of an image is what `read` makes of its level and noise."""

    def __init__(self, read):
        self.read = read

    def bind(self, params):
        return lambda latents, prompt, levels, eps: self.read(levels, eps)


@pytest.fixture(scope="module")
def batch():
    chosen, rejected, prompt = random_inputs(TINY_SD3, batch=ROWS, height=4, width=4)
    return jax.tree.map(jnp.asarray, dina.PreferenceBatch(chosen, rejected, prompt))


def drawn(read, batch, keys, sigma=SigmaConfig()):
    """(B,) what `read` sees for the chosen image of each row, and for the rejected one."""
    _, metrics = reward_objective(Reading(read), LossConfig(), sigma)({}, batch, keys)
    return np.asarray(metrics["score_chosen"]), np.asarray(metrics["score_rejected"])


def test_every_row_draws_its_own_level_and_noise_and_shares_them_within_the_pair(batch):
    keys = row_keys(3, 7, ROWS)
    for read in (lambda levels, eps: levels, lambda levels, eps: eps[:, 1, 2, 3]):
        chosen, rejected = drawn(read, batch, keys)
        np.testing.assert_array_equal(chosen, rejected)
        assert len(set(chosen.tolist())) == ROWS
    pixels = drawn(lambda levels, eps: eps.std(axis=(1, 2, 3)), batch, keys)[0]
    assert (pixels > 0.7).all(), "a row's noise is one number"


def test_a_row_draws_the_same_beside_other_rows(batch):
    """So that neither mesh nor micro-batches change what a pair sees."""
    keys = row_keys(3, 7, ROWS)
    some = np.array([4, 1])
    few = jax.tree.map(lambda x: x[some], batch)
    for read in (lambda levels, eps: levels, lambda levels, eps: eps[:, 1, 2, 3]):
        np.testing.assert_array_equal(drawn(read, few, keys[some])[0], drawn(read, batch, keys)[0][some])


def test_the_configured_distribution_is_drawn_from(batch):
    levels, _ = drawn(lambda levels, eps: levels, batch, row_keys(0, 0, ROWS), SigmaConfig("constant", (0.3,)))
    np.testing.assert_allclose(levels, 0.3)
    small, _ = drawn(lambda levels, eps: levels, batch, row_keys(0, 0, ROWS), SigmaConfig("power", (8.0,)))
    uniform, _ = drawn(lambda levels, eps: levels, batch, row_keys(0, 0, ROWS))
    np.testing.assert_allclose(small, uniform**8, rtol=1e-5)


def test_keys_depend_on_seed_step_and_row():
    data = [np.asarray(jax.random.key_data(row_keys(*which, 3))) for which in ((0, 0), (1, 0), (0, 1))]
    assert len(np.unique(np.concatenate(data), axis=0)) == 9
