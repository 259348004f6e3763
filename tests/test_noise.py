import hashlib

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from scipy import stats

from dinalrm_jax import noise, preference
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.noise import NoiseDraw, SigmaConfig
from dinalrm_jax.preference import LossConfig

DRAWS = 20_000


def mode_cdf(scale):
    u = np.linspace(0, 1, 20_001)
    sigma = 1 - u - scale * (np.cos(np.pi * u / 2) ** 2 - 1 + u)
    return lambda x: 1 - np.interp(x, sigma[::-1], u[::-1])


DISTRIBUTIONS = [
    ("uniform", (), stats.uniform.cdf),
    ("logit_normal", (0.3, 0.7), lambda x: stats.norm.cdf((np.log(x / (1 - x)) - 0.3) / 0.7)),
    ("mode", (1.29,), mode_cdf(1.29)),
    ("power", (2.0,), lambda x: np.sqrt(x)),
    ("beta", (2.0, 5.0), stats.beta(2, 5).cdf),
]


@pytest.mark.parametrize(("name", "parameters", "cdf"), DISTRIBUTIONS, ids=[row[0] for row in DISTRIBUTIONS])
def test_level_distributions(name, parameters, cdf):
    draws = np.asarray(noise.sampler(SigmaConfig(name, parameters))(jax.random.key(3), (DRAWS,)))
    assert draws.min() >= 0
    assert draws.max() <= 1
    # Kolmogorov-Smirnov: another distribution, or another parameter by a tenth, lies far below 1e-3.
    assert stats.kstest(draws, cdf).pvalue > 1e-3


def test_constant_level():
    draws = noise.sampler(SigmaConfig("constant", (0.4,)))(jax.random.key(0), (3,))
    np.testing.assert_array_equal(draws, np.full(3, 0.4, np.float32))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SigmaConfig("logit_normal", (0.0,)), r"takes parameters \(mean, std\), got \(0.0,\)"),
        (SigmaConfig("uniform", (1.0,)), r"takes parameters \(\)"),
        (SigmaConfig("mode", (3.0,)), "scale in"),
        (SigmaConfig("constant", (1.2,)), r"value in \[0, 1\]"),
    ],
)
def test_parameters_that_leave_the_unit_interval(config, message):
    with pytest.raises(ConfigError, match=message):
        noise.sampler(config)


def test_add_noise_interpolates_per_row():
    latents, eps = np.full((2, 2, 2, 1), 3.0, np.float32), np.full((2, 2, 2, 1), -1.0, np.float32)
    noisy = noise.add_noise(jnp.asarray(latents), jnp.array([0.0, 0.25]), eps)
    np.testing.assert_allclose(noisy[0], 3.0)
    np.testing.assert_allclose(noisy[1], 2.0)
    assert noise.timestep(0.25) == 250.0


def test_a_draw_gives_every_image_its_own_noise_or_all_the_same():
    """Of seed and name only, on any machine; the numbers are SHA-256's."""
    names = ["a", "b", "a"]
    own, shared = NoiseDraw(7).keys(names), NoiseDraw(7, shared=True).keys(names)
    digest = hashlib.sha256(b"7\0a").digest()
    assert own[0].tolist() == [int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")]
    assert own[0].tolist() == own[2].tolist() != own[1].tolist()
    assert NoiseDraw(8).keys(["a"]).tolist() != own[:1].tolist()
    np.testing.assert_array_equal(shared, np.tile(noise.seed_key(7), (3, 1)))
    eps = np.asarray(noise.draw_noise(own, (3, 4, 4, 2)))
    np.testing.assert_array_equal(eps[0], eps[2])
    assert abs(np.corrcoef(eps[0].ravel(), eps[1].ravel())[0, 1]) < 0.6
    np.testing.assert_array_equal(
        noise.draw_noise(shared, (3, 4, 4, 2))[1], noise.draw_noise(noise.seed_key(7), (1, 4, 4, 2))[0]
    )
    assert len(NoiseDraw(0).keys(["\udcff", "\u72d0"])) == 2, "names of any bytes"


def test_the_schedule_runs_from_pure_noise_to_its_smallest_level():
    """diffusers' FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas, without the zero that it appends for sampling."""
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas.numpy()
    np.testing.assert_allclose(noise.schedule_sigmas(), theirs[:1000], rtol=1e-6)
    assert noise.nearest_schedule_sigma(1.0) == 1.0
    assert noise.nearest_schedule_sigma(0.0) == pytest.approx(3 * 0.001 / 1.002)


def test_seeds_have_sixty_four_bits():
    assert noise.seed_key(2**32 + 5).tolist() == [1, 5]
    assert noise.seed_key(-1).tolist() == [2**32 - 1, 2**32 - 1]
    assert noise.seed_key([0, 7]).tolist() == [[0, 0], [0, 7]]
    np.testing.assert_array_equal(noise.seed_key(7), jax.random.key_data(jax.random.key(7)))
    with pytest.raises(ValueError, match="a seed is an integer of 64 bits, got 9223372036854775808"):
        noise.seed_key(2**63)


def test_axes_are_checked_in_tests():
    """The import hook of tests/conftest.py is alive."""
    with pytest.raises(jaxtyping.TypeCheckError, match="rejected"):
        preference.pair_loss(np.zeros(3, np.float32), np.zeros(4, np.float32), np.zeros(3, np.float32), LossConfig())
    with pytest.raises(jaxtyping.TypeCheckError, match="noise"):
        noise.add_noise(np.zeros((2, 4, 4, 3), np.float32), 0.5, np.zeros((2, 4, 4, 2), np.float32))


def test_shapes_that_would_broadcast_are_refused_without_the_hook_too():
    loss, noised = preference.pair_loss.__wrapped__, noise.add_noise.__wrapped__
    with pytest.raises(ValueError, match=r"one number a pair, got \(3,\), \(1,\) and \(3,\)"):
        loss(np.zeros(3, np.float32), np.zeros(1, np.float32), np.zeros(3, np.float32), LossConfig())
    with pytest.raises(ValueError, match="noise of their own shape and a sigma a row"):
        noised(np.zeros((2, 4, 4, 3), np.float32), np.zeros(1, np.float32), np.zeros((2, 4, 4, 3), np.float32))
