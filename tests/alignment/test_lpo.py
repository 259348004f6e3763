"""LPO's rollout and update against the steps written out one by one; and what its configuration refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinalrm_jax import preference, sampling
from dinalrm_jax.alignment.lpo import StepPairs, lpo
from dinalrm_jax.alignment.policy import row_randomness
from dinalrm_jax.alignment.rewards import LatentReward, Rewards
from dinalrm_jax.config import JudgeConfig, LPOConfig, RewardConfig
from dinalrm_jax.devices.mesh import MeshConfig, make_mesh
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.lora import LoRAConfig
from dinalrm_jax.model.reward import reward_functional
from dinalrm_jax.noise import draw_noise
from dinalrm_jax.preference import LossConfig
from tests.alignment.helpers import collected, trained, velocities

LPO = LPOConfig(steps=5, guidance=1.5, candidates=3, threshold=(0.02, 0.04), pairs=4, beta=30.0)
LIKELIHOOD = LossConfig(k=60.0, sigma_0=2.5)  # of scores as far apart as a random model's


@pytest.fixture(scope="module")
def likely(parts):
    """The parts, with a reward that says how it was trained."""
    policy, rewards, params, batch, keys = parts
    reward, weight = rewards.members["reward"]
    reward = dataclasses.replace(reward, model=dataclasses.replace(reward.model, likelihood=LIKELIHOOD))
    return policy, Rewards({"reward": (reward, weight)}), params, batch, keys


def of_levels(rewards, sigma):
    """The same reward as an ensemble."""
    reward, weight = rewards.members["reward"]
    return Rewards({"reward": (dataclasses.replace(reward, sigma=sigma), weight)})


def by_hand(config, likely):
    """Per trajectory and step: (latents, winner, loser, kept), and the kinds of numbers that chose them."""
    policy, rewards, params, batch, keys = likely
    reward = rewards.members["reward"][0]
    together = np.sqrt(np.mean(np.square(reward.sigma)))  # an ensemble's variance is the mean of its levels'
    own = {name: params[known] for name, known in reward.names.items()}
    model = reward_functional(reward.model.config, reward.model.execution).bind(own)
    score = jax.jit(lambda noisy, prompt, level: model.score_noisy(noisy, prompt, level))
    tuned, _ = velocities(policy, params)
    sigmas = policy.schedule(config.steps)
    noise_keys, step_keys, _, reward_keys = row_randomness(keys, 4)
    clean = jax.jit(lambda latents, keys: reward(params, latents, batch, keys))
    x, found = draw_noise(noise_keys, (8, *policy.shape)), []
    stds = np.array(
        [
            sampling.transition(config.kind, x[:1], x[:1], *sigmas[i : i + 2], config.noise_level, sigmas[1]).std
            for i in range(config.steps - 1)
        ]
    )
    low, high = config.threshold

    def guided(x, sigma):
        level = jnp.full(8, sigma)
        without = tuned(x, level, batch.negative)
        return without + config.guidance * (tuned(x, level, batch.prompt) - without)

    for step in range(config.steps - 1):
        sigma, following = sigmas[step : step + 2]
        velocity = guided(x, sigma)
        t = sampling.transition(config.kind, x, velocity, sigma, following, config.noise_level, sigmas[1])
        z_keys, next_keys = row_randomness(jax.vmap(jax.random.fold_in, (0, None))(step_keys, step), 2)
        z = jnp.stack([jax.random.normal(key, (config.candidates, *policy.shape)) for key in z_keys])
        outcomes = [t.mean + float(t.std) * z[:, k] for k in range(config.candidates)]
        told = jnp.full(8, {"next": following, "current": sigma, "clean": together}[config.scored_at])
        if config.scored_at == "clean":
            once = jax.vmap(jax.random.fold_in, (0, None))(reward_keys, step)  # one noise for all outcomes of a state
            scores = np.stack([clean(outcome - following * guided(outcome, following), once) for outcome in outcomes])
        else:
            scores = np.stack([score(outcome, batch.reward_prompt, told) for outcome in outcomes])
        rows = np.arange(8)
        best, worst = scores.argmax(axis=0), scores.argmin(axis=0)
        sure = 2 * preference.preferred(scores[best, rows], scores[worst, rows], told, LIKELIHOOD) - 1
        threshold = low + (stds[step] - stds.min()) / (stds.max() - stds.min()) * (high - low)
        outcomes = np.stack(outcomes)
        found.append((np.asarray(x), outcomes[best, rows], outcomes[worst, rows], np.asarray(sure) > threshold))
        chosen = [int(jax.random.randint(key, (), 0, config.candidates)) for key in next_keys]
        x = jnp.asarray(outcomes[chosen, rows])
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scored_at": "clean", "threshold": (0.01, 0.02)},
        pytest.param({"kind": "sde", "noise_level": 0.7, "scored_at": "current"}, marks=pytest.mark.heavy),
    ],
)
def test_pairs_are_the_best_and_the_worst_outcome_of_a_step(likely, changes):
    config = dataclasses.replace(LPO, **changes)
    if config.scored_at == "clean":
        likely = likely[0], of_levels(likely[1], (0.1, 0.8)), *likely[2:]
    found, _ = collected(lpo(likely[0], likely[1], config), *likely[2:])
    expected = by_hand(config, likely)
    kept = np.stack([step[3] for step in expected], axis=1)  # (B, 4)
    assert 0 < kept.sum() < kept.size, "the test's threshold must tell pairs apart"
    assert not (kept == kept[:, :1]).all()
    for row in range(8):
        taken = np.asarray(found.step[row])
        assert sorted(taken) == [0, 1, 2, 3]
        mask = kept[row][taken]
        assert list(mask) == sorted(mask, reverse=True), "kept pairs stand first"
        np.testing.assert_allclose(found.weight[row], mask * (8 / kept.sum()), rtol=1e-5)
        for place, step in enumerate(taken):
            for ours, theirs in zip((found.latents, found.winner, found.loser), expected[step]):
                # Products of two programs, along four steps.
                np.testing.assert_allclose(ours[row, place], theirs[row], atol=2e-3)
    np.testing.assert_allclose(found.metrics["kept"], kept.mean(axis=1), atol=1e-6)


def test_fewer_pairs_than_steps_are_drawn_from_those_kept(likely):
    some = dataclasses.replace(LPO, threshold=(0.005, 0.02))
    whole, _ = collected(lpo(likely[0], likely[1], some), *likely[2:])
    few, _ = collected(lpo(likely[0], likely[1], dataclasses.replace(some, pairs=2, updates=2)), *likely[2:])
    of_trajectory = (np.asarray(whole.weight) > 0).sum(axis=1)
    assert few.latents.shape[1] == 2
    np.testing.assert_array_equal((np.asarray(few.weight) > 0).sum(axis=1), np.minimum(of_trajectory, 2))
    # Each update's pairs count alike, and as a mean over its rows.
    for part in range(2):
        weight = np.asarray(few.weight)[part::2]
        assert weight.sum() == pytest.approx(4)
        assert len(np.unique(weight[weight > 0].round(4))) == 1


@pytest.mark.parametrize("updates", [1, 2])
def test_devices_along_data_weigh_the_pairs_of_all(likely, updates):
    """Two devices with four trajectories each give the weights of one with eight."""
    config = dataclasses.replace(LPO, updates=updates)
    together = lpo(likely[0], likely[1], config)[0].together
    kept = jnp.asarray(np.random.default_rng(0).random((8, 4)) < 0.4, jnp.float32)
    empty = jnp.zeros((8, 4))
    batch = jax.tree.map(np.asarray, likely[3])
    found = StepPairs(batch, empty, empty, empty, empty, kept, {})
    mesh = make_mesh(MeshConfig(data=2))
    rows = jax.sharding.PartitionSpec("data")
    split = jax.shard_map(together, mesh=mesh, in_specs=rows, out_specs=rows, axis_names={"data"}, check_vma=False)
    np.testing.assert_allclose(jax.jit(split)(found).weight, together(found).weight, rtol=1e-6)
    for part in range(updates):
        assert together(found).weight[part::updates].sum() == pytest.approx(8 / updates)


def test_the_update_raises_winners_and_lowers_losers(likely):
    """The loss against the formula by the module's pure functions, and its gradient by a finite difference."""
    policy, rewards, params, batch, keys = likely
    found, objective = collected(lpo(policy, rewards, LPO), params, batch, keys)
    sigmas = policy.schedule(LPO.steps)
    tuned, plain = velocities(policy, params)
    losses, ratios = np.zeros(8), []
    for place in range(4):
        step, x = np.asarray(found.step[:, place]), found.latents[:, place]
        level, following = jnp.asarray(sigmas[step]), jnp.asarray(sigmas[step + 1])

        without, there = (
            [velocity(x, level, p) for velocity in (tuned, plain)] for p in (batch.negative, batch.prompt)
        )
        t, reference = (
            sampling.transition(LPO.kind, x, u + LPO.guidance * (c - u), level, following, LPO.noise_level)
            for u, c in zip(without, there)
        )
        two = []
        for after in (found.winner[:, place], found.loser[:, place]):
            own, other = (jnp.square(after - m).mean(axis=(1, 2, 3)) for m in (t.mean, reference.mean))
            two.append((other - own) / (2 * jnp.square(t.std)))
        ratios.append(two)
        clipped = [
            np.clip(np.asarray(ratio, np.float64), np.log(1 - LPO.epsilon), np.log(1 + LPO.epsilon)) for ratio in two
        ]
        losses += np.asarray(found.weight[:, place]) * np.log1p(np.exp(-LPO.beta * (clipped[0] - clipped[1])))
    value, metrics = jax.jit(objective)(params, found, keys)
    np.testing.assert_allclose(value, losses, rtol=2e-3)  # of differences of squares, times beta
    weight = np.asarray(found.weight).T
    right = np.array([np.asarray(winner > loser) for winner, loser in ratios])
    np.testing.assert_allclose(metrics["accuracy"], (weight * right).sum(axis=0), atol=1e-6)

    low = dataclasses.replace(LPO, epsilon=1e-4)
    clipped = jax.jit(lpo(policy, rewards, low)[1])(params, found, keys)[1]["clipped"]
    beyond = np.abs(np.expm1(np.array(ratios, np.float64))) > 1e-4  # (pairs, winner and loser, rows)
    np.testing.assert_allclose(clipped, (weight * beyond.mean(axis=1)).sum(axis=0), atol=1e-6)
    adapters = trained(params)

    def total(adapters):
        return objective({**params, **adapters}, found, keys)[0].mean()

    gradient = jax.jit(jax.grad(total))(adapters)
    size = float(jnp.sqrt(sum(jnp.square(g).sum() for g in gradient.values())))
    step = 1e-3
    moved = jax.tree.map(lambda a, g: a - step * g / size, adapters, gradient)
    gain = float(jax.jit(total)(adapters)) - float(jax.jit(total)(moved))
    assert gain == pytest.approx(step * size, rel=0.2), "the step is not infinitely small"


def test_at_the_start_policy_and_reference_agree(likely):
    policy, rewards, params, batch, keys = likely
    first = {**params, **{name: jnp.zeros_like(x) for name, x in trained(params).items() if name.endswith("lora_B")}}
    found, objective = collected(lpo(policy, rewards, LPO), first, batch, keys)
    losses, metrics = jax.jit(objective)(first, found, keys)
    np.testing.assert_allclose(losses.mean(), np.log(2), rtol=1e-5)
    assert (metrics["clipped"] == 0).all()
    np.testing.assert_allclose(metrics["velocity_ratio"], 1, atol=1e-5)


class BrokenBelow(LatentReward):
    """Not finite at levels below 0.3."""

    def at_level(self, params, noisy, batch, levels):
        return jnp.where(levels < 0.3, jnp.nan, super().at_level(params, noisy, batch, levels))


def test_a_reward_that_is_not_finite_at_one_step_is_no_pair_left_out(likely):
    policy, rewards, params, batch, keys = likely
    broken = {name: x * jnp.nan if name == "reward0.head.head.weight" else x for name, x in params.items()}
    found, objective = collected(lpo(policy, rewards, LPO), broken, batch, keys)
    losses, metrics = jax.jit(objective)(broken, found, keys)
    assert np.isnan(losses).all()
    assert (metrics["nonfinite_reward"] == 1).all()
    # Of noisy latents only, while the clean ones have a score.
    reward = rewards.members["reward"][0]
    fields = {field.name: getattr(reward, field.name) for field in dataclasses.fields(reward)}
    found, objective = collected(
        lpo(policy, Rewards({"reward": (BrokenBelow(**fields), 1.0)}), LPO), params, batch, keys
    )
    losses, metrics = jax.jit(objective)(params, found, keys)
    assert np.isnan(losses).all()
    assert (metrics["nonfinite_reward"] == 1).all()


def test_without_pairs_nothing_is_learned(likely):
    policy, rewards, params, batch, keys = likely
    found, objective = collected(lpo(policy, rewards, dataclasses.replace(LPO, threshold=(0.98, 0.99))), *likely[2:])
    assert isinstance(found, StepPairs)
    assert (found.weight == 0).all()
    gradient = jax.jit(jax.grad(lambda a: objective({**params, **a}, found, keys)[0].mean()))(trained(params))
    assert all((g == 0).all() for g in gradient.values())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"threshold": (0.6, 0.45)}, r"threshold is \(low, high\) with 0 <= low <= high < 1, got \(0.6, 0.45\)"),
        ({"candidates": 1}, "candidates must be at least 2, got 1"),
        ({"pairs": 20}, "a trajectory of 20 steps has 19 pairs, got pairs 20"),
        ({"noise_level": 0.0}, "noise_level 0.0 must be above 0"),
        ({"noise_level": 1.5}, "of ddim, whose eta it is, at most 1"),
        ({"epsilon": 1.0}, r"epsilon in \(0, 1\), got 500.0 and 1.0"),
        ({"steps": 2}, "steps must be at least 3"),
    ],
)
def test_bad_configs_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        LPOConfig(**values)


def test_clean_outcomes_train_at_the_rewards_level(config):
    """Which is then no level to watch at; noisy ones train at every step's own."""
    watched = dataclasses.replace(config.evaluation, sigma=config.reward.sigma)
    changed = {"refl": None, "lora": LoRAConfig(2, 4.0), "evaluation": watched}
    dataclasses.replace(config, lpo=LPOConfig(pairs=4), **changed)
    with pytest.raises(ConfigError, match="must be other levels than those that train, 0.4"):
        dataclasses.replace(config, lpo=LPOConfig(pairs=4, scored_at="clean"), **changed)


def test_rewards_that_know_no_level_are_refused(config):
    changed = dataclasses.replace(config, refl=None, lpo=LPOConfig(pairs=4), lora=LoRAConfig(2, 4.0))
    for wrong in (
        {"reward": RewardConfig(judge=JudgeConfig("scenes"))},
        {"mixed": (config.reward,)},
        {"reward_noises": 2},
    ):
        with pytest.raises(ConfigError, match="lpo compares a step's outcomes by one reward model, whose likelihood"):
            dataclasses.replace(changed, **wrong)
    with pytest.raises(ConfigError, match="lpo's loss holds the policy near its reference"):
        dataclasses.replace(changed, reference_weight=1.0)


@pytest.mark.parametrize(("scored_at", "steps"), [("next", [1, 2, 3, 4]), ("current", [0, 1, 2, 3])])
def test_kept_pairs_are_logged_by_the_level_that_is_scored(likely, scored_at, steps):
    found, _ = collected(lpo(likely[0], likely[1], dataclasses.replace(LPO, scored_at=scored_at)), *likely[2:])
    levels = 10 * np.asarray(likely[0].schedule(LPO.steps))[steps]
    share = [np.mean((low <= levels) & ((levels < low + 1) | (low == 9))) for low in range(10)]
    np.testing.assert_allclose(found.metrics["share_by_sigma"], np.tile(share, (8, 1)), atol=1e-6)
    np.testing.assert_allclose(found.metrics["kept_by_sigma"].sum(axis=1), found.metrics["kept"], atol=1e-6)
    assert found.metrics["kept"].sum() > 0
