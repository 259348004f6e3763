"""Losses against what the public alignment codes compute (tests/golden/alignment.npz)."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinalrm_jax import alignment

close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


@pytest.fixture
def cases(alignment_cases):
    return alignment_cases


def test_advantages(cases):
    for scale in ("global", "group"):
        found = alignment.group_advantages(cases["rewards"], cases["groups"], scale)
        close(found, cases[f"advantages_{scale}"])
    assert (alignment.group_advantages(np.ones(4, np.float32), np.array([0, 0, 1, 1])) == 0).all()
    assert (alignment.group_advantages(np.array([1.0, 5.0]), np.array([0, 1]), "group") == 0).all()
    with pytest.raises(ValueError, match='scale must be "global" or "group"'):
        alignment.group_advantages(np.ones(4), np.ones(4, int), "batch")


def test_policy_loss(cases):
    loss = functools.partial(
        alignment.policy_loss,
        old_log_prob=cases["old_log_prob"],
        advantages=cases["advantages"],
        clip_range=float(cases["grpo_clip_range"]),
    )
    value, gradient = jax.value_and_grad(loss)(jnp.asarray(cases["log_prob"]))
    close(value, cases["grpo_loss"])
    close(gradient, cases["grpo_grad"])


def test_guarded_policy_loss(cases):
    found = alignment.guarded_policy_loss(
        cases["log_prob"][:3], cases["old_log_prob"][:3], cases["advantages"][:3],
        cases["guard_mean"], cases["guard_old_mean"], float(cases["guard_std"]), float(cases["guard_sqrt_dt"]),
        float(cases["grpo_clip_range"]),
    )  # fmt: skip
    close(found, cases["guard_loss"])


def test_dpo_loss(cases):
    names = ("velocity", "ref_velocity", "latents", "noise")
    found = alignment.dpo_loss(*(cases[f"dpo_{name}"] for name in names), beta=float(cases["dpo_beta"]))
    close(found, cases["dpo_loss"])


def test_nft_loss(cases):
    names = ("velocity", "old_velocity", "ref_velocity", "x0", "x_sigma", "sigma", "weight")
    arrays = [cases[f"nft_{name}"] for name in names]
    close(
        alignment.nft_loss(*arrays, float(cases["nft_beta"]), float(cases["nft_kl"])),
        cases["nft_loss"],
    )
    close(alignment.nft_weight(cases["advantages"]), cases["nft_weight_of_advantages"])
    # The reference and the policy that sampled are given, not trained.
    derived = jax.grad(
        lambda old, reference: alignment.nft_loss(arrays[0], old, reference, *arrays[3:], 0.1, 1.0), (0, 1)
    )
    assert all((gradient == 0).all() for gradient in derived(*map(jnp.asarray, arrays[1:3])))


def test_lpo(cases):
    threshold = alignment.lpo_threshold(cases["lpo_stds"], 0.35, 0.5)
    close(threshold, cases["lpo_threshold"])
    # DanceGRPO's steps of an even schedule differ by rounding only.
    close(alignment.lpo_threshold(0.2 + np.array([0, 3e-8, -2e-8], np.float32), 0.35, 0.5), 0.35)
    winner, loser, kept = alignment.lpo_pairs(cases["lpo_scores"], cases["lpo_threshold"])
    np.testing.assert_array_equal(winner, cases["lpo_winner"])
    np.testing.assert_array_equal(loser, cases["lpo_loser"])
    np.testing.assert_array_equal(kept, cases["lpo_valid"])
    assert 0 < kept.sum() < len(kept)
    loss = functools.partial(alignment.lpo_loss, beta=float(cases["lpo_beta"]), epsilon=float(cases["lpo_epsilon"]))
    ratios = [jnp.asarray(cases[f"lpo_log_ratio_{side}"]) for side in ("winner", "loser")]
    value, (of_winner, of_loser) = jax.value_and_grad(loss, argnums=(0, 1))(*ratios)
    close(value, cases["lpo_loss"])
    close(of_winner, cases["lpo_grad_winner"], rtol=1e-4)  # of ratios times 500
    inside = np.abs(np.exp(ratios[1]) - 1) < 0.1
    assert (np.asarray(of_loser)[inside] >= 0).all()
    assert (np.asarray(of_loser)[~inside] == 0).all()
    assert math.isclose(float(alignment.lpo_loss(jnp.zeros(2), jnp.zeros(2))), math.log(2), rel_tol=1e-6)
