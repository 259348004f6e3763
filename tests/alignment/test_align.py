"""The alignment command on a tiny SD3 pipeline and a reward on its backbone; and what its objectives compute."""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import dinalrm_jax as dina
from dinalrm_jax import align, sampling
from dinalrm_jax.alignment.dpo import best_against_worst, dpo, of_judged
from dinalrm_jax.alignment.flow_grpo import flow_grpo
from dinalrm_jax.alignment.held_out import HeldOutPrompts, verdict
from dinalrm_jax.alignment.nft import nft
from dinalrm_jax.alignment.opened import open_rewards
from dinalrm_jax.alignment.policy import PromptBatch, PromptStream, read_prompts
from dinalrm_jax.alignment.pretraining import BesideImages, with_pretraining
from dinalrm_jax.alignment.refl import refl
from dinalrm_jax.alignment.rewards import LatentReward, Rewards, SceneRules, broken_prompt
from dinalrm_jax.config import (
    DPOConfig,
    FlowGRPOConfig,
    JudgeConfig,
    LPOConfig,
    NFTConfig,
    PolicyEvaluationConfig,
    ReFLConfig,
    RewardConfig,
)
from dinalrm_jax.devices.mesh import MeshConfig, make_mesh
from dinalrm_jax.encoders import tiny
from dinalrm_jax.encoders.load import image_codec, prompt_encoder
from dinalrm_jax.evaluation.judges.clip import Judge
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.batch import PreferenceBatch
from dinalrm_jax.model.encoding import EncodersConfig
from dinalrm_jax.noise import NoiseDraw, SigmaConfig, draw_noise
from dinalrm_jax.scenes import draw
from dinalrm_jax.scenes.config import SceneCaptionsConfig
from dinalrm_jax.training.metrics import NonFiniteLoss
from dinalrm_jax.weights.pretrained import load_backbone
from tests.alignment.conftest import PROMPTS, REFL
from tests.alignment.helpers import collected, trained, velocities
from tests.conftest import ROOT
from tests.random_clip import write_clip
from tests.test_launch import free_port

GRPO = FlowGRPOConfig(steps=5, window=2, last=4, group=4, noise_level=0.7, updates=1)


def test_refl_is_the_rewards_gradient_at_one_step(parts):
    """Loss and gradient against the step written out, with the rollout's latents as constants."""
    policy, reward, params, batch, keys = parts
    one = dataclasses.replace(REFL, first=2, last=2)
    objective = refl(policy, reward, one, 0.3)
    adapters = trained(params)

    def loss(adapters):
        losses, metrics = objective({**params, **adapters}, batch, keys)
        return losses.mean(), metrics

    (value, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(adapters)
    noise_keys, _, reward_keys = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys)
    noise = jax.vmap(lambda key: jax.random.normal(key, policy.shape))(noise_keys)
    sigmas = sampling.schedule(4)
    tuned, _ = velocities(policy, params)
    x = noise
    for index in range(2):
        level = jnp.full(8, sigmas[index])
        with_prompt, without = tuned(x, level, batch.prompt), tuned(x, level, batch.negative)
        x = x + (sigmas[index + 1] - sigmas[index]) * (without + 1.5 * (with_prompt - without))

    def written(adapters):
        everything = {**params, **adapters}
        v = policy.velocity(everything)(x, jnp.full(8, sigmas[2]), batch.prompt)
        plain = policy.reference(params)(x, jnp.full(8, sigmas[2]), batch.prompt)
        raw = reward(params, x - sigmas[2] * v, batch, reward_keys)["reward"]
        return (-0.1 * raw + 0.3 * jnp.square(v - plain).mean(axis=(1, 2, 3))).mean(), raw

    (wanted, raw), derived = jax.jit(jax.value_and_grad(written, has_aux=True))(adapters)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    np.testing.assert_allclose(metrics["reward"], raw, rtol=1e-4, atol=1e-5)
    scale = max(np.abs(array).max() for array in derived.values())
    assert scale > 0
    for name, array in derived.items():
        np.testing.assert_allclose(gradient[name] / scale, array / scale, atol=1e-4, err_msg=name)


def test_the_step_that_trains_is_drawn_and_makes_no_other_program(parts):
    policy, reward, params, batch, keys = parts
    drawn = jax.jit(refl(policy, reward, REFL, 0.0))
    fixed = [jax.jit(refl(policy, reward, dataclasses.replace(REFL, first=stop, last=stop), 0.0)) for stop in (1, 2, 3)]
    seen = set()
    for seed in range(6):
        keys = jax.random.split(jax.random.key(seed), 8)
        found = drawn(params, batch, keys)[0]
        (stop,) = [n for n, one in enumerate(fixed) if np.allclose(found, one(params, batch, keys)[0], rtol=1e-4)]
        seen.add(stop)
    assert drawn._cache_size() == 1
    assert len(seen) > 1


@pytest.mark.parametrize(("kind", "noise_level"), [("cps", 0.8), ("sde", 0.7)])
def test_flow_grpo_is_the_policy_gradient(parts, kind, noise_level):
    """Ratios of exactly 1, a KL of 0 without adapters, and `-A grad log p` as the gradient."""
    policy, reward, params, batch, keys = parts
    grpo = dataclasses.replace(GRPO, kind=kind, noise_level=noise_level, last=2, guidance=1.5)  # the window begins at 0
    rolled, objective = collected(flow_grpo(policy, reward, grpo, 0.0), params, batch, keys)
    adapters = trained(params)

    def loss(adapters):
        losses, metrics = objective({**params, **adapters}, rolled, keys)
        return losses.mean(), metrics

    (_, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(adapters)
    assert float(metrics["log_ratio"].max()) == 0
    assert float(metrics["clipped"].max()) == 0
    advantages = dina.alignment.group_advantages(metrics["reward"], np.array([0] * 4 + [1] * 4))
    np.testing.assert_allclose(rolled.advantage, advantages, rtol=1e-4)
    # A later update of the same policy: its forward pass is not the rollout's to the bit, and hardly off.
    _, later = jax.jit(objective)(params, dataclasses.replace(rolled, fresh=jnp.zeros(8, bool)), keys)
    assert float(later["log_ratio"].max()) < 1e-6

    noise_keys, _, step_keys, _ = jax.vmap(lambda key: jax.random.split(key, 4), out_axes=1)(keys)
    x = jax.vmap(lambda key: jax.random.normal(key, policy.shape))(noise_keys)
    sigmas, visited = sampling.schedule(5), []

    @functools.partial(jax.jit, static_argnums=2)
    def transition(params, x, index):
        level = jnp.full(8, sigmas[index])
        v, without = (policy.velocity(params)(x, level, prompt) for prompt in (batch.prompt, batch.negative))
        v = without + 1.5 * (v - without)
        return sampling.transition(kind, x, v, sigmas[index], sigmas[index + 1], noise_level, sigmas[1])

    for index in range(2):
        t = transition(params, x, index)
        z = jax.vmap(lambda key, i=index: jax.random.normal(jax.random.fold_in(key, i), policy.shape))(step_keys)
        after = t.mean + t.std * z
        visited.append((x, after, index))
        x = after

    def written(adapters):
        found = [
            sampling.log_prob(kind, transition({**params, **adapters}, before, index), after)
            for before, after, index in visited
        ]
        return (-advantages * sum(found) / 2).mean()

    derived = jax.jit(jax.grad(written))(adapters)
    scale = max(np.abs(array).max() for array in derived.values())
    for name, array in derived.items():
        # The window's latents differ by rounding, which -A log p multiplies by 1 / std^2.
        np.testing.assert_allclose(gradient[name] / scale, array / scale, atol=2e-3, err_msg=name)


def test_at_the_start_nothing_is_far_from_the_reference(parts):
    policy, reward, params, batch, keys = parts
    start = {name: jnp.zeros_like(array) if name.endswith("lora_B") else array for name, array in params.items()}
    rolled, objective = collected(flow_grpo(policy, reward, GRPO, 1.0), start, batch, keys)
    _, metrics = jax.jit(objective)(start, rolled, keys)
    np.testing.assert_allclose(metrics["kl"], 0, atol=1e-10)
    np.testing.assert_allclose(metrics["velocity_ratio"], 1, atol=1e-5)
    _, metrics = jax.jit(objective)(params, rolled, keys)
    assert float(metrics["kl"].min()) > 1e-6


@pytest.mark.parametrize("guard", [False, True])
def test_a_later_update_is_clipped(parts, guard):
    """After the policy moved, a ratio beyond the range in its advantage's favour has no gradient."""
    policy, reward, params, batch, keys = parts
    grpo = dataclasses.replace(GRPO, kind="sde", guard=guard, clip_range=1e-9)
    rolled, objective = collected(flow_grpo(policy, reward, grpo, 0.0), params, batch, keys)
    rolled = dataclasses.replace(rolled, fresh=jnp.zeros(8, bool))
    moved = {name: 1.1 * x for name, x in trained(params).items()}

    value, ratios = jax.jit(objective)({**params, **moved}, rolled, keys)
    assert float(ratios["clipped"].min()) > 0
    free = dataclasses.replace(grpo, clip_range=1e3)
    unclipped, _ = jax.jit(flow_grpo(policy, reward, free, 0.0)[1])({**params, **moved}, rolled, keys)
    assert (value >= unclipped - 1e-6).all()  # the worse of both is taken
    assert (value > unclipped + 1e-6).any()


def test_nft_learns_from_what_was_sampled(parts):
    """Its loss against `nft_loss` of velocities computed apart; a policy that did not move is its own old one."""
    policy, reward, params, batch, keys = parts
    config = NFTConfig(steps=3, group=4, levels=2)
    judged, objective = collected(nft(policy, reward, config, 0.05, SigmaConfig()), params, batch, keys)
    advantages = dina.alignment.group_advantages(judged.rewards["reward"], np.array([0] * 4 + [1] * 4))
    np.testing.assert_allclose(judged.weight, np.clip(advantages, -5, 5) / 10 + 0.5, rtol=1e-4)
    moved = {**params, **{name: 1.2 * x for name, x in trained(params).items()}}
    losses, metrics = jax.jit(objective)(moved, judged, keys)
    (new_velocity, plain_velocity), (old_velocity, _) = velocities(policy, moved), velocities(policy, params)
    wanted = []
    for number in range(2):
        level = judged.levels[:, number]
        wide = level[:, None, None, None]
        x = (1 - wide) * judged.x0 + wide * judged.noise[:, number]
        new, old, plain = (of(x, level, batch.prompt) for of in (new_velocity, old_velocity, plain_velocity))
        np.testing.assert_allclose(judged.old_velocity[:, number], old, atol=1e-4)
        wanted.append(dina.alignment.nft_loss(new, old, plain, judged.x0, x, level, judged.weight, 0.1, 0.05))
    np.testing.assert_allclose(losses.mean(), np.mean(wanted), rtol=1e-4)
    assert float(metrics["reference_distance"].min()) > 0


def test_dpo_takes_a_groups_best_against_its_worst(parts):
    policy, reward, params, batch, keys = parts
    config = DPOConfig(beta=50.0, steps=3, group=4)
    collection, objective = (
        best_against_worst(policy, reward, config),
        dpo(policy, config, SigmaConfig("constant", (0.4,))),
    )
    rolled = jax.jit(lambda params: collection.rows(params, batch, keys))(params)
    _, latents, raw, _ = rolled
    judged = collection.together(rolled)
    pairs = judged.pairs
    scores = np.asarray(raw["reward"]).reshape(2, 4)
    for row in range(2):
        np.testing.assert_array_equal(pairs.chosen[row], latents[4 * row + scores[row].argmax()])
        np.testing.assert_array_equal(pairs.rejected[row], latents[4 * row + scores[row].argmin()])
        np.testing.assert_array_equal(pairs.prompt.prompt_embeds[row], np.asarray(batch.prompt.prompt_embeds)[4 * row])
    losses, metrics = jax.jit(objective)(params, pairs, keys[:2])
    # Both images of a pair with one level and one noise: those of the pair's key.
    _, noise_keys = jax.vmap(lambda key: jax.random.split(key, 2), out_axes=1)(keys[:2])
    noise = np.repeat(jax.vmap(lambda key: jax.random.normal(key, policy.shape))(noise_keys), 2, axis=0)
    both = np.stack([pairs.chosen, pairs.rejected], axis=1).reshape(4, *policy.shape)
    level = np.full(4, 0.4, np.float32)
    prompt = jax.tree.map(lambda x: np.repeat(x, 2, axis=0), pairs.prompt)
    noisy = 0.6 * both + 0.4 * noise
    new, plain = (of(noisy, level, prompt) for of in velocities(policy, params))
    np.testing.assert_allclose(losses.mean(), dina.alignment.dpo_loss(new, plain, both, noise, 50.0), rtol=1e-4)
    assert set(np.asarray(metrics["accuracy"]).tolist()) <= {0.0, 1.0}
    # A reward that is not finite leaves no loss, and says which prompt it was of.
    broken = {**raw, "reward": raw["reward"].at[5].set(jnp.nan)}
    spoiled = collection.together((batch.prompt, latents, broken, reward.metrics(broken, batch)))
    losses, metrics = jax.jit(of_judged(objective))(params, spoiled, keys[:2])
    assert np.isnan(np.asarray(losses)).tolist() == [False, True]
    means = {name: np.asarray(x).mean(axis=0) for name, x in metrics.items()}
    assert broken_prompt(means, PROMPTS) == f"the reward of the prompt {PROMPTS[1]!r} is NaN or infinite"


def metrics_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "algorithm",
    ["refl", *(pytest.param(name, marks=pytest.mark.heavy) for name in ("flow_grpo", "nft", "dpo", "lpo"))],
)
def test_a_policy_is_tuned_and_used(config, tiny_pipeline, tmp_path, algorithm):
    """The frozen arrays stay; the adapters that are written give the policy that was watched, by two images each."""
    evaluation = dataclasses.replace(config.evaluation, each=2)
    # Whose loops must agree on their steps.
    config = dataclasses.replace(config, evaluation=evaluation, mesh=MeshConfig(data=2, fsdp=2))
    if algorithm != "refl":
        known = {
            "flow_grpo": dataclasses.replace(GRPO, group=2, updates=2),
            "nft": NFTConfig(3, group=2, updates=2),
            "dpo": DPOConfig(steps=3, group=4),
            "lpo": LPOConfig(steps=4, guidance=1.5, pairs=3, updates=2, threshold=(0.0, 0.01)),
        }
        chosen = {algorithm: known[algorithm]}
        weight = 0.0 if algorithm in ("dpo", "lpo") else 0.01
        config = dataclasses.replace(config, refl=None, **chosen, reference_weight=weight, mesh=MeshConfig(data=2))
    align.run(config, tmp_path / "run")
    rows = metrics_of(tmp_path / "run")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    watched = [row for row in rows if "held_out_reward" in row]
    assert [row["step"] for row in watched] == [2, 3]
    told = json.loads((tmp_path / "run" / "policy.json").read_text())
    assert told["after"]["held_out_reward"] == pytest.approx(watched[-1]["held_out_reward"], rel=1e-4)
    assert told["before"]["held_out_velocity_ratio"] == pytest.approx(1.0, abs=1e-5)
    assert told["after"]["held_out_distance"] > 0
    assert (tmp_path / "run" / "before_after.png").stat().st_size > 0
    policy = dina.Generator.from_pretrained(tiny_pipeline, tmp_path / "run" / "policy")
    # The same images by the written adapters, and their scores under noise that they were not made of.
    held_out = 2 * PROMPTS[-2:]
    drawn = [
        np.asarray(draw_noise(NoiseDraw(seed).keys([f"{n}\0{text}" for n, text in enumerate(held_out)]), (4, 4, 6, 16)))
        for seed in (1, 2, 3)
    ]
    latents = policy.sample(held_out, steps=3, guidance=1.5, noise=drawn[0], text_length=16)
    model = dina.RewardModel.from_pretrained(config.reward.checkpoint, tiny_pipeline)
    scores = np.mean(
        [
            model.score_latents(latents, model.encode_prompt(held_out), sigma=(0.2, 0.5, 0.7), noise=noise)
            for noise in drawn[1:]
        ],
        axis=0,
    )
    exact = 1e-3 * float(np.abs(scores).max())
    assert told["after"]["held_out_reward"] == pytest.approx(scores.mean(), abs=exact)
    # Two prompts: the error of their mean is half of the difference of their images' means.
    apart = (scores[0] + scores[2] - scores[1] - scores[3]) / 2
    assert told["after"]["held_out_reward_error"] == pytest.approx(abs(apart) / 2, abs=exact)
    base = dina.Generator.from_pretrained(tiny_pipeline)
    changed = {name for name, array in base.params.items() if not np.array_equal(array, policy.params[name])}
    assert changed
    assert all(
        name.rpartition(".")[0].endswith(("to_q", "to_k", "to_v", "to_out.0", "proj", "to_add_out")) for name in changed
    )


def test_every_image_of_a_held_out_prompt_is_judged_as_its_own(config, parts, tiny_pipeline, tmp_path):
    """By the prompt's number among all prompts, which rules and judges find it by; the images differ."""
    policy, _, params, *_ = parts
    adapters = trained(params)
    frozen = {name: array for name, array in params.items() if name not in adapters}
    config = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, each=3))
    encode = prompt_encoder(EncodersConfig("sd3", 16), tiny_pipeline, "float32")
    codec = image_codec(EncodersConfig("sd3", 16), tiny_pipeline)

    def number(params, latents, batch, keys):
        return batch.number.astype(jnp.float32)

    watch = HeldOutPrompts(
        config, policy, frozen, number, number, PROMPTS[-2:], 7, encode, encode, codec, codec,
        make_mesh(MeshConfig(data=1)), tmp_path,
    )  # fmt: skip
    found = watch.samples(adapters)
    np.testing.assert_array_equal(found.trained, [7, 8, 7, 8, 7, 8])
    assert len({latents.tobytes() for latents in found.latents}) == 6
    assert found.summary()["held_out_reward_error"] == pytest.approx(0.5)  # of the means 7 and 8


def command(config, algorithm, workdir, launcher=(sys.executable, "-m"), *more):
    values = {"base_model": config.base_model, "prompts": config.prompts, "reward.checkpoint": config.reward.checkpoint}
    lines = [f"--config.{key}={value}" for key, value in values.items()]
    file = f"tests/alignment/tiny_align.py:{algorithm}"
    return [*launcher, "dinalrm_jax.align", "--config", file, *lines, *more, "--workdir", str(workdir)]


def finish(*arguments, **options):
    done = subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr + done.stdout


def policy_of(workdir):
    return workdir / "policy" / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize(
    ("algorithm", "number", "status"),
    [("refl", signal.SIGTERM, 128 + signal.SIGTERM),
     pytest.param("flow_grpo", signal.SIGKILL, -signal.SIGKILL, marks=pytest.mark.heavy),
     pytest.param("lpo", signal.SIGKILL, -signal.SIGKILL, marks=pytest.mark.heavy)],
)  # fmt: skip
def test_a_run_that_was_stopped_ends_as_one_that_was_not(config, tmp_path, algorithm, number, status):
    """After its first step, told or killed, and started again: to the bit."""
    process = subprocess.Popen(
        command(config, algorithm, tmp_path / "stopped"), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "stopped" / "tuning" / "checkpoints" / "1").is_dir() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    _, told = process.communicate(timeout=120)
    assert process.returncode == status, told
    assert not policy_of(tmp_path / "stopped").exists()
    finish(config, algorithm, tmp_path / "stopped")
    finish(config, algorithm, tmp_path / "whole")
    ours, theirs = (load_file(policy_of(tmp_path / name)) for name in ("stopped", "whole"))
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)
    assert [row["step"] for row in metrics_of(tmp_path / "stopped") if "loss" in row] == [1, 2, 3]


@pytest.mark.heavy
@pytest.mark.parametrize("algorithm", ["refl", "flow_grpo", "lpo"])
def test_two_processes_of_four_devices_tune_as_one_device(config, tmp_path, algorithm):
    script = (str(ROOT / "launch" / "local_processes.sh"),)
    environment = {
        **os.environ, "PYTHON": sys.executable, "PROCESSES": "2", "DEVICES": "4", "PORT": str(free_port()),
        "LOGS": str(tmp_path / "logs"), "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }  # fmt: skip
    mesh = ("--config.mesh.data=2", "--config.mesh.fsdp=4")
    once = () if algorithm == "refl" else (f"--config.{algorithm}.updates=1",)  # eight rows for eight devices
    if algorithm == "lpo":
        # The last step of ddim has a deviation of 0.009, by whose square rounding is divided.
        once += ("--config.lpo.kind=sde", "--config.lpo.noise_level=0.7")
    finish(config, algorithm, tmp_path / "two", script, *mesh, *once, env=environment)
    one = {**environment, "JAX_NUM_CPU_DEVICES": "1"}
    finish(config, algorithm, tmp_path / "one", (sys.executable, "-m"), *once, env=one)
    two, one = ([row["loss"] for row in metrics_of(tmp_path / name) if "loss" in row] for name in ("two", "one"))
    np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-6)  # a loss of Flow-GRPO is near 0
    ours, theirs = (load_file(policy_of(tmp_path / name)) for name in ("two", "one"))
    scale = max(np.abs(array).max() for array in theirs.values())
    for name, array in theirs.items():  # Adam makes a step of what rounding left of a gradient
        np.testing.assert_allclose(ours[name], array, atol=1e-4 * scale, err_msg=name)


def test_a_run_ends_where_its_judge_falls_again_and_again():
    watch = types.SimpleNamespace(
        _config=PolicyEvaluationConfig(judges=(JudgeConfig("scenes"),), patience=2), headline="judge_scenes"
    )

    def enough(*said):
        return HeldOutPrompts.enough(watch, [{"judge_scenes": value} for value in said])

    assert enough(0.5, 0.4) is None
    assert enough(0.5, 0.4, 0.45) is None
    assert enough(0.6, 0.5, 0.4).startswith("judge_scenes fell at 2 evaluations one after the other, from 0.600 to 0.4")
    assert enough(0.5, 0.6, 0.5, 0.4) is not None


def test_rules_reward_what_a_picture_shows_of_its_own_caption():
    """Under jit and split over devices, of captions that the batch names by their numbers."""
    rng = np.random.default_rng(3)
    scenes = [(draw.Group(2, "red", "circle", "left"),), (draw.Group(2, "blue", "circle", "left"),)]
    captions = [draw.caption(scene) for scene in scenes]
    shown = [tiny.encode_image(draw.render(scene, 64, rng)) for scene in (scenes[0], scenes[1], scenes[0], scenes[0])]
    numbers = np.array([0, 0, 1, 0], np.int32)
    rules = SceneRules(captions)
    mesh = make_mesh(MeshConfig(data=4))

    def score(latents, numbers):
        empty = dina.PromptEmbeds(jnp.zeros((len(numbers), 1, 1)), jnp.zeros((len(numbers), 1)))
        batch = PromptBatch(empty, empty, empty, numbers)
        return rules({}, latents, batch, jax.random.split(jax.random.key(0), len(numbers)))

    rows = jax.sharding.PartitionSpec("data")
    split = jax.shard_map(score, mesh=mesh, in_specs=(rows, rows), out_specs=rows, check_vma=False)
    np.testing.assert_array_equal(jax.jit(split)(np.stack(shown), numbers), [1.0, 0.75, 0.75, 1.0])


def test_the_order_of_prompts_resumes():
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), devices=jax.devices()[:1])

    def encode(texts):
        rows = np.array([[float(PROMPTS.index(text)) if text else -1.0] for text in texts], np.float32)
        return dina.PromptEmbeds(rows[:, None], rows)

    def stream():
        return PromptStream(PROMPTS, encode, encode, 4, 2, 0, mesh)

    batches = iter(stream())
    seen = [next(batches) for _ in range(8)]
    rows = np.array([np.asarray(batch.prompt.pooled_prompt_embeds)[:, 0] for _, batch, _ in seen])
    assert (rows[:, 0::2] == rows[:, 1::2]).all()  # a group's images stand together
    assert sorted(rows[:4, 0::2].ravel()) == list(range(8))  # an epoch has every prompt once
    assert (rows[:4] != rows[4:]).any()
    again = stream()
    again.restore(seen[2][2])
    _, batch, _ = next(iter(again))
    np.testing.assert_array_equal(np.asarray(batch.prompt.pooled_prompt_embeds)[:, 0], rows[3])


def test_what_is_refused_before_the_first_step(config, reward_checkpoint, tmp_path):
    with pytest.raises(ConfigError, match="one algorithm, of refl, flow_grpo, dpo, nft, lpo; got"):
        dataclasses.replace(config, flow_grpo=GRPO)
    with pytest.raises(ConfigError, match="multiple of the group x the updates of a rollout, 5 x 1"):
        dataclasses.replace(config, refl=None, flow_grpo=dataclasses.replace(GRPO, group=5))
    with pytest.raises(ConfigError, match="must be other levels than those that train"):
        dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, sigma=(0.2, 0.4)))
    with pytest.raises(ConfigError, match="window of 3 steps must lie within"):
        dataclasses.replace(GRPO, window=3, first=2)
    with pytest.raises(ConfigError, match="noise_level 0.0 gives no log-probability"):
        dataclasses.replace(GRPO, noise_level=0.0)
    with pytest.raises(ConfigError, match="0 <= first <= last < steps"):
        ReFLConfig(steps=3)
    short = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, prompts=8))
    with pytest.raises(ConfigError, match="8 prompts, of which evaluation.prompts = 8 are held out"):
        read_prompts(short)
    (tmp_path / "empty.txt").write_text("a\n\nb\n")
    with pytest.raises(ConfigError, match="line 2: an empty prompt"):
        read_prompts(dataclasses.replace(config, prompts=str(tmp_path / "empty.txt")))
    other = json.loads((reward_checkpoint / "config.json").read_text()) | {"weights": "0" * 16}
    elsewhere = tmp_path / "reward"
    elsewhere.mkdir()
    for file in reward_checkpoint.iterdir():
        (elsewhere / file.name).write_bytes(file.read_bytes())
    (elsewhere / "config.json").write_text(json.dumps(other))
    with pytest.raises(ConfigError, match="was trained on another backbone"):
        align.run(dataclasses.replace(config, reward=RewardConfig(str(elsewhere))), tmp_path / "run")
    two = dataclasses.replace(config, refl=None, flow_grpo=GRPO, mesh=MeshConfig(data=4))
    with pytest.raises(ConfigError, match="a multiple of group x updates x mesh.data = 4 x 1 x 4"):
        align.run(two, tmp_path / "run")
    nowhere = str(tmp_path / "nowhere")
    for name, watched in (("judge", {"judges": (JudgeConfig("clip", nowhere),)}), ("preview", {"preview": nowhere})):
        judged = dataclasses.replace(config.evaluation, **watched)
        with pytest.raises(FileNotFoundError, match="nowhere"):
            align.run(dataclasses.replace(config, evaluation=judged), tmp_path / name)
        assert not (tmp_path / name / "metrics.jsonl").exists()
    with pytest.raises(ConfigError, match="a reward is a reward model .* or a judge"):
        RewardConfig("a", JudgeConfig("scenes"))
    with pytest.raises(ConfigError, match="must be other levels than those that train, 0.4, 0.7"):
        dataclasses.replace(config, mixed=(RewardConfig(config.reward.checkpoint, sigma=(0.7,)),))
    with pytest.raises(ConfigError, match="judges are told apart by their kinds, which must differ, got clip, clip"):
        PolicyEvaluationConfig(judges=(JudgeConfig("clip", "a"), JudgeConfig("clip", "b")))
    with pytest.raises(ConfigError, match='reference_scale "error" needs reward_noises of at least 2'):
        dataclasses.replace(config, reference_scale="error", reference_weight=1.0)
    with pytest.raises(ConfigError, match="pretraining names the images and pretraining_weight"):
        ReFLConfig(pretraining_weight=0.1)
    with pytest.raises(ConfigError, match="those of a file .* or captions of drawn scenes .* give one of them"):
        dataclasses.replace(config, scenes=SceneCaptionsConfig(20))
    captions = dataclasses.replace(config, prompts=None, scenes=SceneCaptionsConfig(20, 0.0))
    train, held_out = read_prompts(captions)
    assert (len(train), len(held_out)) == (20, 2)
    assert not set(train) & set(held_out)
    assert all(len(draw.parse(caption)) == 1 for caption in (*train, *held_out))


def codec_rewards(config, tiny_pipeline, judges):
    """Judges of a config as rewards, with their parameters, over PROMPTS."""
    chosen = dataclasses.replace(config, refl=None, flow_grpo=GRPO, reward=judges[0], mixed=judges[1:])
    codec = image_codec(EncodersConfig("sd3", 16), tiny_pipeline)
    opened = open_rewards(chosen, {}, {}, codec, PROMPTS, make_mesh(MeshConfig(data=1)))
    return opened, {name: array for each in opened for name, array in each.params.items()}


def test_a_judge_rewards_what_it_says_of_the_decoded_images(config, parts, tiny_pipeline, tmp_path):
    """As PickScore says it of the images themselves, its gradient by finite differences, and mixed with another."""
    for seed in (0, 1):
        write_clip(tmp_path / f"clip {seed}", "gelu", tiny_pipeline, seed)
    kinds = tuple(RewardConfig(judge=JudgeConfig("pickscore", str(tmp_path / f"clip {seed}"))) for seed in (0, 1))
    opened, params = codec_rewards(config, tiny_pipeline, kinds)
    policy, _, _, batch, keys = parts
    batch = dataclasses.replace(batch, number=jnp.asarray([3, 0, 0, 5, 1, 1, 2, 7]))
    latents = jax.random.normal(jax.random.key(0), (8, *policy.shape))
    rewards = Rewards({"reward": (opened[0].reward, 1.0), "reward_2": (opened[1].reward, 0.2)})
    raw = jax.jit(rewards)(params, latents, batch, keys)
    images = image_codec(EncodersConfig("sd3", 16), tiny_pipeline).decode(np.asarray(latents))
    texts = [PROMPTS[number] for number in np.asarray(batch.number)]
    for seed, name in enumerate(("reward", "reward_2")):
        said = Judge.from_pretrained("pickscore", tmp_path / f"clip {seed}")(texts, list(images))
        assert np.std(said) > 0.02 * np.abs(said).max()
        # Images are rounded to 8 bits for the judge, and not for the reward.
        np.testing.assert_allclose(raw[name], said, atol=5e-3 * np.abs(said).max())
    np.testing.assert_allclose(rewards.total(raw), raw["reward"] + 0.2 * raw["reward_2"], rtol=1e-5)
    apart = [dina.alignment.group_advantages(raw[name], np.arange(8) // 4) for name in ("reward", "reward_2")]
    np.testing.assert_allclose(rewards.advantages(raw, 4, "global"), apart[0] + 0.2 * apart[1], rtol=1e-4, atol=1e-5)

    def total(latents):
        return rewards.total(rewards(params, latents, batch, keys)).sum()

    gradient = jax.jit(jax.grad(total))(latents)
    steepest = gradient / jnp.linalg.norm(gradient)  # along which float32's differences are largest
    value = jax.jit(total)
    ahead, behind = (value(latents + step * steepest) for step in (3e-2, -3e-2))
    np.testing.assert_allclose((ahead - behind) / 6e-2, jnp.linalg.norm(gradient), rtol=0.02)


def test_a_reward_shares_the_policys_arrays(config, tiny_pipeline):
    """There is one copy of them among all parameters, and the reward finds the others under its own prefix."""
    transformer, arrays = load_backbone(tiny_pipeline)
    base = {name: jnp.asarray(array) for name, array in arrays.items()}
    codec = image_codec(EncodersConfig("sd3", 16), tiny_pipeline)
    (opened,) = open_rewards(config, arrays, base, codec, PROMPTS, make_mesh(MeshConfig(data=1)))
    model, names = opened.model
    assert model.params == {}  # what it has of its own lies on the mesh, once
    shared = {name for name in names if names[name].startswith("policy.")}
    assert shared == {name for name in names if name.startswith("backbone.") and ".lora_" not in name}
    assert all(opened.params[names[name]] is base[name.removeprefix("backbone.")] for name in shared)
    assert {known.partition(".")[0] for known in names.values()} == {"policy", "reward0"}


def test_rules_are_no_reward_of_photographs(config, tiny_pipeline):
    with pytest.raises(ConfigError, match="rules read drawn scenes"):
        codec_rewards(config, tiny_pipeline, (RewardConfig(judge=JudgeConfig("scenes")),))


@pytest.mark.heavy
def test_the_reference_counts_where_the_reward_is_in_doubt(parts):
    """Several noises: the mean is the reward, its standard error the weight of the reference, image by image."""
    policy, reward, params, batch, keys = parts
    member = reward.members["reward"]
    several = Rewards({"reward": member}, noises=3, by_error=True)
    latents = jax.random.normal(jax.random.key(0), (8, *policy.shape))
    raw = jax.jit(several)(params, latents, batch, keys)
    score = jax.jit(lambda keys: member[0](params, latents, batch, keys))
    each = np.stack([score(jax.vmap(jax.random.fold_in, (0, None))(keys, number)) for number in range(3)])
    np.testing.assert_allclose(raw["reward"], each.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(raw["reward_error"], each.std(axis=0, ddof=1) / np.sqrt(3), rtol=1e-3)
    assert float(raw["reward_error"].min()) > 0
    one = dataclasses.replace(REFL, first=2, last=2)
    losses, metrics = jax.jit(refl(policy, several, one, 0.3))(params, batch, keys)
    wanted = -0.1 * metrics["reward"] + 0.3 * metrics["reward_error"] * metrics["reference_distance"]
    np.testing.assert_allclose(losses, wanted, rtol=1e-4)
    for algorithm in (
        lambda weight: flow_grpo(policy, several, GRPO, weight),
        lambda weight: nft(policy, several, NFTConfig(steps=3, group=4), weight, SigmaConfig()),
    ):
        (collection, objective), (_, plain) = (algorithm(weight) for weight in (0.3, 0.0))
        rolled, _ = collected((collection, objective), params, batch, keys)
        (held, metrics), (free, _) = (jax.jit(each)(params, rolled, keys) for each in (objective, plain))
        away = metrics["kl"] if "kl" in metrics else metrics["reference_distance"]
        np.testing.assert_allclose(held - free, 0.3 * metrics["reward_error"] * away, rtol=1e-2, atol=1e-5)


def test_a_policy_goes_on_as_a_generator(parts):
    """The loss of the chosen images at their own levels, and its weight."""
    policy, reward, params, batch, keys = parts
    pairs = PreferenceBatch(*jax.random.normal(jax.random.key(5), (2, 8, *policy.shape)), batch.reward_prompt)
    alone = refl(policy, reward, dataclasses.replace(REFL, first=2, last=2), 0.0)
    both = with_pretraining(alone, policy, 0.5, SigmaConfig("constant", (0.3,)))
    losses, metrics = jax.jit(both)(params, BesideImages(batch, pairs), keys)
    plain, _ = jax.jit(alone)(params, batch, keys)
    error = np.asarray(metrics["pretraining_loss"])
    np.testing.assert_allclose(losses, (plain + 0.5 * error) / 1.5, rtol=1e-4)
    again = jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
    noise = np.asarray(draw_noise(jax.vmap(jax.random.split, out_axes=1)(again)[1], pairs.chosen.shape))
    noisy = 0.7 * np.asarray(pairs.chosen) + 0.3 * noise
    velocity = velocities(policy, params)[0](noisy, jnp.full(8, 0.3), pairs.prompt)
    np.testing.assert_allclose(error, np.square(velocity - (noise - pairs.chosen)).mean(axis=(1, 2, 3)), rtol=1e-4)


def test_a_broken_reward_names_its_prompt(parts):
    policy, reward, params, batch, keys = parts
    batch = dataclasses.replace(batch, number=jnp.asarray([2, 2, 2, 2, 6, 6, 6, 6]))
    for broken, said in (((4,), "the prompt 'two red cup'"), ((4, 7), "the prompt 'two red cup'"), ((), None),
                         ((0, 1, 5), "several prompts"), ((0, 4), "several prompts")):  # fmt: skip
        raw = {"reward": jnp.asarray([np.nan if row in broken else 1.0 for row in range(8)])}
        means = {name: np.asarray(x).mean(axis=0) for name, x in reward.metrics(raw, batch).items()}
        told = broken_prompt(means, ["", "", "one blue cup", "", "", "", "two red cup", ""])
        assert told is None if said is None else said in told


def test_a_run_ends_where_its_reward_is_nan(config, reward_checkpoint, tmp_path, monkeypatch):
    """Of one prompt alone: its name is in the error, and the adapters of the step before are kept."""

    def broken(self, params, latents, batch, keys):
        return jnp.where(batch.number == 2, jnp.nan, latents.mean(axis=(1, 2, 3)))

    monkeypatch.setattr(LatentReward, "__call__", broken)
    with pytest.raises(NonFiniteLoss, match=r"the reward of the prompt 'one blue cup' is NaN or infinite \(seed 0\)"):
        align.run(config, tmp_path / "run")


def test_which_updates_of_a_rollout_are_fresh(parts):
    """Of three updates the first alone is by the policy that rolled out: rows 0 and 3 of six."""
    policy, reward, params, batch, keys = parts
    collection, _ = flow_grpo(policy, reward, dataclasses.replace(GRPO, group=3, updates=3), 0.0)
    rolled = jax.eval_shape(lambda: collection.rows(params, batch, keys))
    zeros = jax.tree.map(lambda x: jnp.zeros((6, *x.shape[1:]), x.dtype), rolled)
    assert np.asarray(collection.together(zeros).fresh).tolist() == [True, False, False, True, False, False]


def evaluation(step, reward, judge):
    return {"step": step, "held_out_trained_reward": reward, "judge_scenes": judge, "judge_scenes_error": 0.02}


def test_the_verdict_names_hacking_where_reward_and_judge_part():
    first = evaluation(0, 1.0, 0.5)
    good = [evaluation(10, 1.1, 0.5), evaluation(20, 1.2, 0.6)]
    assert verdict(first, good, "judge_scenes") == "judge_scenes went up: 0.500 to 0.600"
    assert verdict(first, good[:1], "judge_scenes") == "judge_scenes did not rise measurably: 0.500 to 0.500"
    sure = [{**evaluation(step, step, 1.0 - step), "judge_scenes_error": 0.0} for step in (0, 1)]
    assert verdict(sure[0], sure[1:], "judge_scenes").startswith("hacking: at step 1")
    hacked = [evaluation(10, 1.5, 0.49), evaluation(20, 2.0, 0.3), evaluation(30, 3.0, 0.0)]
    assert verdict(first, hacked, "judge_scenes").startswith("hacking: at step 20")
    both_fell = [evaluation(10, 0.9, 0.3)]
    assert "hacking" not in verdict(first, both_fell, "judge_scenes")
    assert "no judge watched" in verdict(first, hacked, None)
