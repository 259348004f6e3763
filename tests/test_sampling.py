"""Euler's method against diffusers' scheduler."""

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from dinalrm_jax import noise as schedule
from dinalrm_jax import sampling


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
    np.testing.assert_allclose(schedule.sampling_sigmas(7), scheduler.sigmas.numpy(), atol=1e-6)
    found = sampling.euler(lambda x, sigma: field(x, sigma[:, None, None, None]), noise, scheduler.sigmas.numpy())
    np.testing.assert_allclose(found, latents.numpy(), atol=1e-5)


def test_a_straight_path_needs_one_step():
    clean, noise = np.random.default_rng(0).standard_normal((2, 1, 2, 2, 4)).astype(np.float32)
    found = sampling.euler(lambda x, sigma: noise - clean, noise, np.array([1.0, 0.0]))
    np.testing.assert_allclose(found, clean, atol=1e-6)
