"""Steps, densities and rollouts against diffusers and the public alignment codes (tests/golden/alignment.npz)."""

import functools
import os

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from dinalrm_jax import sampling

close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


@pytest.fixture
def cases(alignment_cases):
    return alignment_cases


@pytest.mark.parametrize("steps", [10, 20, 28])
def test_schedules(cases, steps):
    close(sampling.schedule(steps), cases[f"schedule_{steps}"])
    assert sampling.schedule(steps).dtype == np.float32


def test_a_schedule_of_no_steps():
    with pytest.raises(ValueError, match="at least one step, got 0"):
        sampling.schedule(0)


@pytest.mark.parametrize("step", [0, 1, 4, 8])
@pytest.mark.parametrize(("kind", "name"), [("sde", "sde"), ("cps", "cps"), ("dance", "dance_sde")])
def test_transitions_and_their_densities(cases, step, kind, name):
    table = sampling.schedule(int(cases["steps"]))
    x, v = cases[f"step{step}_latents"], cases[f"step{step}_velocity"]
    level = float(cases[f"step{step}_{name}_noise_level"])
    levels = [np.full(len(x), table[i], np.float32) for i in (step, step + 1)]
    for sigma, following, noise_level in ((*levels, np.full(len(x), level)), (*table[[step, step + 1]], level)):
        found = sampling.transition(kind, x, v, sigma, following, noise_level, table[1])
        close(found.mean, cases[f"step{step}_{name}_mean"], atol=1e-5)  # of numbers of order one
        close(jnp.broadcast_to(found.std, len(x)), cases[f"step{step}_{name}_std"])
        density = sampling.log_prob(kind, found, cases[f"step{step}_{name}_following"])
        # The last steps' are of the order of 1e-5, of squares of differences of numbers of order one.
        close(density, cases[f"step{step}_{name}_log_prob"], atol=1e-6)


def test_ddim_is_diffusers_step_in_variance_preserving_terms():
    """A flow's state at level sigma, 1 - sigma of signal and sigma of noise, is DDIM's scaled."""
    scheduler = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(20)
    rng = np.random.default_rng(1)
    state, eps, z = (torch.from_numpy(rng.standard_normal((1, 4, 3, 3))) for _ in range(3))
    for t in (801, 401, 51):
        alphas = scheduler.alphas_cumprod[[t, t - 50]].double()
        signal, noise = alphas.sqrt(), (1 - alphas).sqrt()
        before, after = (noise / (signal + noise)).tolist()  # levels of the flow with the same ratio
        scale_before, scale_after = (1 / (signal + noise)).tolist()
        expected = scheduler.step(eps, t, state, eta=1.0, variance_noise=z).prev_sample * scale_after
        x = state.numpy() * scale_before
        clean = (state - noise[0] * eps) / signal[0]
        found = sampling.transition("ddim", x, (eps - clean).numpy(), before, after, 1.0)
        # Steps of float32, of numbers of order one, against float64.
        np.testing.assert_allclose(found.mean + found.std * z.numpy(), expected.numpy(), atol=2e-5)
        assert float(found.std) == pytest.approx(
            float(scheduler._get_variance(t, t - 50) ** 0.5) * scale_after, rel=1e-3
        )


@pytest.fixture
def optimized():
    """What users compile: the suite's own programs are hardly optimised, and so do not round as theirs do."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1")


def test_every_step_of_ddim_is_finite_when_compiled(optimized):
    """From pure noise with eta 1, where nothing of the noise before is left, over schedules of any length."""
    rng = np.random.default_rng(0)
    x, v = rng.standard_normal((2, 1, 4, 4, 3)).astype(np.float32)
    step = jax.jit(lambda sigma, following: sampling.transition("ddim", x, v, sigma, following, 1.0))
    for steps in range(3, 50):
        table = sampling.schedule(steps)
        for sigma, following in zip(table[:-2], table[1:-1]):
            found = step(sigma, following)
            assert np.isfinite(found.mean).all(), (steps, sigma)
            assert 0 < found.std <= following, (steps, sigma)
    first = step(*sampling.schedule(20)[:2])
    np.testing.assert_allclose(first.mean, (1 - sampling.schedule(20)[1]) * (x - v), atol=1e-6)


@pytest.mark.parametrize("kind", ["sde", "cps", "dance", "ddim"])
def test_without_noise_every_step_is_eulers(kind):
    rng = np.random.default_rng(0)
    x, v = rng.standard_normal((2, 2, 4, 4, 3)).astype(np.float32)
    found = sampling.transition(kind, x, v, 0.7, 0.5, 0.0, 0.9)
    np.testing.assert_allclose(found.mean, x - np.float32(0.2) * v, atol=1e-6)
    assert float(found.std) == 0
    np.testing.assert_allclose(sampling.transition("euler", x, v, 0.7, 0.5).mean, found.mean, atol=1e-6)


def test_densities_without_a_density():
    x = np.zeros((2, 3), np.float32)
    still = sampling.transition("sde", x, x, 0.7, 0.5, np.array([0.0, 0.5]), 0.9)
    gradient = jax.grad(lambda mean: sampling.log_prob("sde", still._replace(mean=mean), x + 1).sum())(still.mean)
    assert np.isfinite(gradient).all()
    assert (gradient[0] == 0).all()
    assert (gradient[1] != 0).all()
    assert sampling.log_prob("sde", still, x)[0] == 0
    with pytest.raises(ValueError, match="deterministic and has no log-probability"):
        sampling.log_prob("euler", still, x)
    with pytest.raises(ValueError, match="kind must be euler, sde, cps, dance or ddim"):
        sampling.transition("heun", x, x, 0.7, 0.5)


def test_no_gradient_flows_to_the_latents_of_a_density():
    t = sampling.Transition(jnp.ones((2, 3)), jnp.full(2, 0.5))
    assert (jax.grad(lambda x: sampling.log_prob("sde", t, x).sum())(jnp.zeros((2, 3))) == 0).all()


def linear(latents, sigma):
    """A velocity that depends on both of its arguments."""
    return 0.5 * latents - sigma[:, None, None, None]


def test_rollouts_are_the_steps_one_by_one():
    """Windows of each row's own, whose noise does not depend on the batch; and no other program for another window."""
    table = sampling.schedule(6)
    noise = jax.random.normal(jax.random.key(0), (3, 2, 2, 4))
    keys, begin, length = jax.random.split(jax.random.key(1), 3), np.array([0, 2, 3]), 2
    traced = []

    @jax.jit
    def sample(noise, keys, begin, start, stop):
        traced.append(1)
        return sampling.rollout(
            linear, noise, table, start, stop, kind="cps", noise_level=0.8, keys=keys, window=begin, length=length
        )

    found = sample(noise, keys, begin, 0, 6)
    for row in range(3):
        x = noise[row : row + 1]
        for step in range(6):
            place = step - begin[row]
            inside = 0 <= place < length
            v = linear(x, jnp.array([table[step]]))
            t = sampling.transition("cps", x, v, table[step], table[step + 1], 0.8 if inside else 0.0)
            if inside:
                np.testing.assert_allclose(found.window[place, row], x[0], atol=1e-5)
            z = jax.random.normal(jax.random.fold_in(keys[row], step), x.shape[1:])
            x = t.mean + (t.std * z if inside else 0.0)
            if inside:
                np.testing.assert_allclose(found.window[place + 1, row], x[0], atol=1e-5)
                np.testing.assert_allclose(found.log_prob[place, row], sampling.log_prob("cps", t, x)[0], rtol=1e-4)
        np.testing.assert_allclose(found.latents[row], x[0], atol=1e-5)
    halfway = sample(noise, keys, np.array([5, 5, 5]), 0, 4)
    np.testing.assert_allclose(halfway.latents, sampling.euler(linear, noise, table[:5]), atol=1e-5)
    rest = sample(halfway.latents, keys, np.array([9, 9, 9]), 4, 6)
    np.testing.assert_allclose(rest.latents, sampling.euler(linear, noise, table), atol=1e-5)
    assert len(traced) == 1


def test_no_gradient_flows_through_a_rollout():
    table = sampling.schedule(3)
    noise = jnp.ones((1, 2, 2, 4))
    through = jax.grad(lambda scale: sampling.rollout(lambda x, s: scale * x, noise, table).latents.sum())(1.0)
    assert through == 0


def test_rollouts_that_have_no_log_probabilities():
    noise, table = jnp.ones((2, 2, 2, 4)), sampling.schedule(3)
    with pytest.raises(ValueError, match="2 steps of a window need noise .* noise level 0.0; use sde"):
        sampling.rollout(linear, noise, table, kind="cps", length=2)
    with pytest.raises(ValueError, match="need keys, one a row"):
        sampling.rollout(linear, noise, table, kind="cps", noise_level=0.5, length=2)


def test_guidance():
    x, sigma = jnp.ones((2, 2, 2, 4)), jnp.array([0.2, 0.7])
    condition, negative = jnp.array([1.0, 2.0]), jnp.array([10.0, 20.0])
    rows = []

    def velocity(latents, sigma, condition):
        rows.append(len(latents))
        return latents * (condition + sigma)[:, None, None, None]

    found = sampling.guided(velocity, condition, negative, 4.5)(x, sigma)
    wanted = negative + sigma + 4.5 * (condition - negative)
    np.testing.assert_allclose(found[:, 0, 0, 0], wanted, rtol=1e-6)
    alone = sampling.guided(velocity, condition, negative, 1.0)(x, sigma)
    np.testing.assert_allclose(alone[:, 0, 0, 0], condition + sigma, rtol=1e-6)
    assert rows == [4, 2]


def test_the_jump_to_clean_latents():
    x, v = np.random.default_rng(0).standard_normal((2, 2, 2, 2, 4)).astype(np.float32)
    found = sampling.clean(x, v, np.array([0.25, 0.5]))
    np.testing.assert_allclose(found, x - np.array([0.25, 0.5], np.float32)[:, None, None, None] * v, atol=1e-6)


def field(x, sigma):
    """Some velocity that depends on both."""
    return 0.7 * x - sigma * sigma * x**2 + 0.3


def test_euler_is_diffusers():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(7)
    noise = np.random.default_rng(0).standard_normal((2, 4, 6, 3)).astype(np.float32)
    latents = torch.from_numpy(noise)
    for timestep in scheduler.timesteps:
        latents = scheduler.step(field(latents, timestep / 1000), timestep, latents).prev_sample
    np.testing.assert_allclose(sampling.schedule(7), scheduler.sigmas.numpy(), atol=1e-6)
    found = sampling.euler(lambda x, sigma: field(x, sigma[:, None, None, None]), noise, scheduler.sigmas.numpy())
    np.testing.assert_allclose(found, latents.numpy(), atol=1e-5)


def test_a_straight_path_needs_one_step():
    clean, noise = np.random.default_rng(0).standard_normal((2, 1, 2, 2, 4)).astype(np.float32)
    found = sampling.euler(lambda x, sigma: noise - clean, noise, np.array([1.0, 0.0]))
    np.testing.assert_allclose(found, clean, atol=1e-6)


@pytest.mark.parametrize("kind", ["cps", "sde", "dance"])
def test_a_ratio_is_the_difference_of_two_log_probabilities(kind):
    rng = np.random.default_rng(0)
    x, v, w = (rng.standard_normal((3, 4, 4, 2)) for _ in range(3))
    sigma, following = np.array([0.9, 0.6, 0.3]), np.array([0.8, 0.5, 0.1])
    now, before = (sampling.transition(kind, x, each, sigma, following, 0.7, 0.95) for each in (v, v + 0.1 * w))
    after = before.mean + 0.3 * rng.standard_normal(x.shape)
    wanted = sampling.log_prob(kind, now, after) - sampling.log_prob(kind, before, after)
    np.testing.assert_allclose(sampling.log_ratio(kind, now, before.mean, after), wanted, rtol=2e-4, atol=1e-6)
    np.testing.assert_array_equal(sampling.log_ratio(kind, now, now.mean, after), 0)
