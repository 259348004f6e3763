"""What a stage minimises: the released loss on the golden model, and each row's own noise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import dinalrm_jax as dina
from dinalrm_jax.config import EnsembleTermConfig
from dinalrm_jax.model.reward import reward_functional
from dinalrm_jax.noise import SigmaConfig
from dinalrm_jax.preference import LossConfig
from dinalrm_jax.training.objectives import flow_matching_objective, reward_losses, reward_objective
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

    @jax.jit
    def mean_loss(batch, sigma):
        losses, _ = reward_losses(module, RELEASED, golden_model.params, batch, sigma, cases["noise"])
        return losses.mean()

    assert mean_loss(golden_batch, cases["sigma"]) == pytest.approx(float(cases["loss_thurstone"]), abs=1e-5)
    swapped = dataclasses.replace(golden_batch, chosen=golden_batch.rejected, rejected=golden_batch.chosen)
    assert abs(mean_loss(swapped, cases["sigma"]) - cases["loss_thurstone"]) > 1e-2
    assert abs(mean_loss(golden_batch, cases["sigma"][::-1]) - cases["loss_thurstone"]) > 1e-3


class Reading:
    """Stands in for the reward model: the "score" of an image is what `read` makes of its level and noise."""

    def __init__(self, read, ensemble=None):
        self.read, self.read_ensemble = read, ensemble

    def bind(self, params):
        return self

    def __call__(self, latents, prompt, levels, eps):
        return self.read(levels, eps)

    def ensemble(self, latents, prompt, levels, eps):
        return self.read_ensemble(latents, prompt, levels, eps)


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


def test_the_ensemble_term_scores_both_images_at_several_levels_of_the_row(golden_model, golden_batch, cases):
    """The single level is among them, eps is the pair's own, and the variance is the levels' mean."""
    seen = {}

    def ensemble(latents, prompt, levels, eps):
        seen.update(levels=levels, eps=eps, latents=latents, pooled=prompt.pooled_prompt_embeds)
        return latents.mean(axis=(1, 2, 3))

    rows = len(golden_batch.chosen)
    keys, term = row_keys(0, 0, rows), EnsembleTermConfig(count=3, weight=0.25)
    module = Reading(lambda levels, eps: levels, ensemble)
    losses, metrics = reward_objective(module, LossConfig(), SigmaConfig(), term)({}, golden_batch, keys)
    levels = np.asarray(seen["levels"])
    assert levels.shape == (3, 2 * rows)
    np.testing.assert_array_equal(levels[:, ::2], levels[:, 1::2])
    np.testing.assert_array_equal(levels[0, ::2], metrics["score_chosen"])
    assert len(np.unique(levels)) == 3 * rows
    np.testing.assert_array_equal(seen["eps"][::2], seen["eps"][1::2])
    np.testing.assert_array_equal(seen["latents"][::2], golden_batch.chosen)
    np.testing.assert_array_equal(seen["latents"][1::2], golden_batch.rejected)
    np.testing.assert_array_equal(seen["pooled"][1::2], golden_batch.prompt.pooled_prompt_embeds)
    difference = np.asarray(golden_batch.chosen).mean(axis=(1, 2, 3)) - np.asarray(golden_batch.rejected).mean(
        axis=(1, 2, 3)
    )
    variance = (2 * levels[:, ::2] ** 2 + 0.01).mean(axis=0)
    together = 1 - np.sqrt(stats.norm.cdf(difference / np.sqrt(2 * variance)))
    np.testing.assert_allclose(losses, 0.75 * (1 - np.sqrt(0.5)) + 0.25 * together, rtol=1e-5)
    np.testing.assert_array_equal(metrics["ensemble_accuracy"], difference > 0)


def test_pure_noise_falls_into_the_last_bin(batch):
    keys = row_keys(0, 0, ROWS)
    _, metrics = reward_objective(Reading(lambda levels, eps: levels), LossConfig(), SigmaConfig("constant", (1.0,)))(
        {}, batch, keys
    )
    np.testing.assert_array_equal(metrics["share_by_sigma"], np.tile(np.eye(10)[9], (ROWS, 1)))


def test_the_velocity_that_leads_to_the_image_costs_nothing(batch):
    """`(x_sigma - x0) / sigma`, which is eps - x0; the timestep is 1000 sigma. The opposite velocity costs."""

    class Leading:
        sign = 1.0

        def bind(self, params):
            return self

        def velocity(self, noisy, timestep, prompt):
            return self.sign * (noisy - batch.chosen) / (timestep / 1000)[:, None, None, None]

    module, keys = Leading(), row_keys(0, 0, ROWS)
    objective = flow_matching_objective(module, SigmaConfig("constant", (0.5,)))
    np.testing.assert_allclose(objective({}, batch, keys)[0], 0, atol=1e-8)
    module.sign = -1.0
    assert (np.asarray(objective({}, batch, keys)[0]) > 1).all()


@pytest.mark.parametrize("name", ["fidelity", "nll", "bradley_terry"])
def test_labels_and_weights(golden_model, golden_batch, cases, name):
    """A soft label is the loss of both orders, by their share; a weight multiplies a loss; accuracy counts alike."""
    module = reward_functional(golden_model.config, golden_model.execution)
    loss, rows = LossConfig(name=name), len(cases["sigma"])

    @jax.jit
    def found(batch):
        losses, metrics = reward_losses(module, loss, golden_model.params, batch, cases["sigma"], cases["noise"])
        return losses, metrics["accuracy"]

    turned = dataclasses.replace(golden_batch, chosen=golden_batch.rejected, rejected=golden_batch.chosen)
    (sure, right), (wrong, left) = found(golden_batch), found(turned)
    label = np.linspace(0.5, 1, rows).astype(np.float32)
    weight = np.arange(1, rows + 1, dtype=np.float32)
    losses, accuracy = found(dataclasses.replace(golden_batch, label=label, weight=weight))
    np.testing.assert_allclose(accuracy, label * right + (1 - label) * left, atol=1e-6)
    if name == "fidelity":  # whose labels stand under roots
        expected = 1 - np.sqrt(label) * (1 - sure) - np.sqrt(1 - label) * (1 - wrong)
    else:
        expected = label * sure + (1 - label) * wrong
        expected -= np.log(2) * (label == 0.5) if name == "bradley_terry" else 0
    np.testing.assert_allclose(losses, weight * expected, rtol=1e-4, atol=1e-5)


def test_the_ensembles_loss_has_labels_and_weights_too(batch):
    term = EnsembleTermConfig(count=2, weight=1.0)

    def loss(**values):
        reading = Reading(lambda levels, eps: levels, lambda latents, prompt, levels, eps: latents[:, 0, 0, 0])
        objective = reward_objective(reading, LossConfig("bradley_terry"), SigmaConfig(), term)
        return objective({}, dataclasses.replace(batch, **values), row_keys(3, 7, ROWS))[0]

    half = jnp.full(ROWS, 0.5)
    difference = batch.chosen[:, 0, 0, 0] - batch.rejected[:, 0, 0, 0]
    np.testing.assert_allclose(loss(), np.log1p(np.exp(-difference)), rtol=1e-4)
    tie = 0.5 * (np.log1p(np.exp(-difference)) + np.log1p(np.exp(difference))) - np.log(2)
    np.testing.assert_allclose(loss(label=half, weight=3 * half), 1.5 * tie, rtol=1e-4, atol=1e-6)
