"""The examples, on a run of the quickstart's kind that was never trained: what they promise holds for any weights."""

import importlib.util
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dinalrm_jax as dina
from dinalrm_jax.model.backbone.family import transformer_functional
from dinalrm_jax.model.execution import ExecutionConfig
from dinalrm_jax.model.tables import WeightsError
from dinalrm_jax.scenes.config import ScenesConfig
from dinalrm_jax.scenes.records import write_scene_records
from dinalrm_jax.weights.pretrained import load_backbone, save_backbone, truncate
from tests.conftest import ROOT, randomized


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(scene_model, tmp_path_factory):
    """model/ on the first block of generator/backbone/, and data/."""
    directory = tmp_path_factory.mktemp("run")
    transformer = scene_model.config.transformer
    backbone = randomized(transformer_functional(transformer, ExecutionConfig()).init(0))
    params = {**scene_model.params, **truncate(backbone, scene_model.config)}
    (directory / "generator").mkdir()
    save_backbone(transformer, backbone, directory / "generator" / "backbone")
    dina.RewardModel(scene_model.config, params).save(directory / "model")
    write_scene_records(
        directory / "data", ScenesConfig(train_pairs=2, eval_pairs=4, image_size=64), scene_model.config.encoders
    )
    return directory


def test_ascending_latents_raises_the_reward(run, capsys):
    ascend = example("ascend_latents")
    ascend.main(run, run / "ascent.png", steps=10, count=2)
    lines = capsys.readouterr().out.splitlines()
    (gain,) = [line.split(":")[1].split("->") for line in lines if "sigma 0.4" in line]
    assert float(gain[1]) > float(gain[0]) + 0.1
    assert (run / "ascent.png").exists()

    # Step by step, outside of scan, the same.
    model = dina.RewardModel.from_pretrained(run / "model", dtype="float32")
    latents, prompt, _ = ascend.rejected_images(ascend.Records(run / "data"), 2)
    found, rewards = ascend.ascent(model.reward_fn(0.4), 0.05, 2)(
        model.params, jnp.asarray(latents), prompt, jax.random.key(3)
    )
    reward = jax.jit(jax.value_and_grad(lambda x, key: model.reward_fn(0.4)(model.params, x, prompt, key).sum()))
    for number, key in enumerate(jax.random.split(jax.random.key(3), 2)):
        total, gradient = reward(latents, key)
        assert float(rewards[number].sum()) == pytest.approx(float(total), abs=1e-4)
        latents = latents + 0.05 * gradient / np.sqrt(np.mean(np.square(gradient), axis=(1, 2, 3), keepdims=True))
    np.testing.assert_allclose(found, latents, atol=1e-4)


def test_a_shared_backbone_is_one_copy(run):
    _, backbone = load_backbone(run / "generator" / "backbone")
    shared = dina.RewardModel.from_pretrained(run / "model", dtype="float32", backbone=backbone)
    own = dina.RewardModel.from_pretrained(run / "model", dtype="float32")
    assert shared.params.keys() == own.params.keys()
    for name, array in shared.params.items():
        np.testing.assert_array_equal(array, own.params[name])
        if name.startswith("backbone.") and ".lora_" not in name:
            theirs = backbone[name.removeprefix("backbone.")]
            assert array.unsafe_buffer_pointer() == theirs.unsafe_buffer_pointer()


def test_backbones_that_do_not_fit_are_refused(run):
    _, backbone = load_backbone(run / "generator" / "backbone")
    half = jax.tree.map(lambda array: jnp.asarray(array, jnp.bfloat16), backbone)
    with pytest.raises(WeightsError, match="context_embedder.weight is bfloat16 .*, expected float32"):
        dina.RewardModel.from_pretrained(run / "model", dtype="float32", backbone=half)
    del backbone["context_embedder.bias"]
    with pytest.raises(WeightsError, match="context_embedder.bias is missing"):
        dina.RewardModel.from_pretrained(run / "model", dtype="float32", backbone=jax.device_put(backbone))


def test_exported_to_a_file_and_back(scene_model, tmp_path):
    """One file holds the program; it runs with parameters it is given, for any number of rows, gradients included."""
    reward = jax.jit(scene_model.reward_fn(sigma=(0.2, 0.7)))
    rows = jax.export.symbolic_shape("rows")[0]
    latents, prompt = (
        np.random.default_rng(0).standard_normal((3, 8, 8, 16), np.float32),
        scene_model.encode_prompt(["a", "b", "c"]),
    )
    shaped = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), (latents, prompt))
    exported = jax.export.export(reward)(scene_model.params, *shaped, jax.random.key(0))
    (tmp_path / "reward.jax").write_bytes(exported.serialize(vjp_order=1))

    loaded = jax.export.deserialize((tmp_path / "reward.jax").read_bytes())
    for count in (1, 3):
        found = loaded.call(scene_model.params, latents[:count], prompt[:count], jax.random.key(5))
        expected = scene_model.score_latents(latents[:count], prompt[:count], (0.2, 0.7), seed=5)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    gradients = [
        jax.grad(lambda x, f=f: f(scene_model.params, x, prompt, jax.random.key(5)).sum())(jnp.asarray(latents))
        for f in (loaded.call, reward)
    ]
    np.testing.assert_allclose(*gradients, atol=1e-5)


def test_a_missing_run_is_one_line(tmp_path):
    command = [sys.executable, "-m", "examples.ascend_latents", "--run", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path} holds no trained model; make one first: python -m")
    assert done.stderr.count("\n") == 1
