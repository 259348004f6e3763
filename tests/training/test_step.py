import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import dinalrm_jax as dina
from dinalrm_jax.config import OptimizerConfig, StageConfig
from dinalrm_jax.devices.mesh import MeshConfig, make_mesh
from dinalrm_jax.devices.placement import place
from dinalrm_jax.devices.sharding import put_rows
from dinalrm_jax.model.backbone.family import transformer_functional
from dinalrm_jax.model.execution import ExecutionConfig
from dinalrm_jax.model.parameters import split
from dinalrm_jax.model.reward import is_trainable, reward_functional
from dinalrm_jax.noise import SigmaConfig
from dinalrm_jax.preference import LossConfig
from dinalrm_jax.training.objectives import flow_matching_objective, reward_objective
from dinalrm_jax.training.optimizer import learning_rate_schedule, make_optimizer
from dinalrm_jax.training.step import Collection, assemble, model_flops, row_keys
from tests.conftest import TINY, TINY_SD3, random_inputs, randomized

CONFIG = OptimizerConfig(learning_rate=1e-2, b1=0.8, b2=0.95, warmup_steps=0, ema_decay=0.9, max_grad_norm=0.5)
BATCH = 8


@pytest.fixture(scope="module")
def batch():
    chosen, rejected, prompt = random_inputs(TINY_SD3, batch=BATCH, height=4, width=4)
    return jax.tree.map(np.asarray, dina.PreferenceBatch(chosen, rejected, prompt))


def deterministic_objective(module):
    """No randomness: sigma 0, so that torch can be compared exactly."""
    return reward_objective(module, LossConfig(), SigmaConfig("constant", (0.0,)))


def run_steps(tiny_model, batch, config, *, mesh=MeshConfig(data=1), parts=1, steps=3, objective=None, optimizer=None):
    module, mesh = reward_functional(TINY, tiny_model.execution), make_mesh(mesh)
    trainable, frozen = split(place(tiny_model.params, np.float32, module.shardings(mesh)), is_trainable)
    stage = StageConfig(BATCH, steps, micro_batches=parts, optimizer=config)
    objective = objective or deterministic_objective(module)
    assembled = assemble(objective, trainable, frozen, stage, mesh, optimizer=optimizer)
    state, history = assembled.state, []
    with jax.set_mesh(mesh):
        for _ in range(steps):
            state, metrics = assembled.step(state, frozen, put_rows(batch, BATCH, mesh))
            history.append({name: float(value) for name, value in metrics.items() if value.ndim == 0})
    return jax.device_get(state), history, assembled.step


@pytest.fixture(scope="module")
def plain(tiny_model, batch):
    return run_steps(tiny_model, batch, CONFIG)


def random_objective(module):
    return reward_objective(module, LossConfig(), SigmaConfig("uniform"))


@pytest.fixture(scope="module")
def plain_sgd(tiny_model, batch):
    """Without Adam, whose division by the gradient's size turns rounding into steps."""
    return run_sgd(tiny_model, batch)


def run_sgd(tiny_model, batch, **options):
    objective = random_objective(reward_functional(TINY, tiny_model.execution))
    return run_steps(tiny_model, batch, CONFIG, objective=objective, optimizer=optax.sgd(0.1), **options)


def assert_same_update(params, expected):
    """Equal up to what Adam makes of rounding: it divides by the gradient's size, and a step is 1e-2 long.

    A key's bias moves all logits of a query alike, which softmax ignores, and the last two biases move both
    scores alike: their gradients are rounding alone.
    """
    assert params.keys() == expected.keys()
    for name, array in params.items():
        if name not in ("head.head.bias", "head.ff.2.bias") and not (".to_k" in name and name.endswith("bias")):
            np.testing.assert_allclose(array, expected[name], atol=2e-4, err_msg=name)


@pytest.mark.parametrize(
    ("mesh", "parts"),
    [
        (MeshConfig(data=4), 1),
        (MeshConfig(data=1), 4),
        (MeshConfig(data=1, fsdp=2, tensor=2), 1),
        (MeshConfig(data=2, fsdp=2), 2),
        (MeshConfig(data=2, tensor=2), 1),
    ],
)
def test_mesh_and_micro_batches_do_not_change_the_update(tiny_model, batch, plain_sgd, mesh, parts):
    """Nor the noise that a row draws."""
    state, history, _ = run_sgd(tiny_model, batch, mesh=mesh, parts=parts)
    for row, expected in zip(history, plain_sgd[1]):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-5)
    for name, array in state.params.items():
        np.testing.assert_allclose(array, plain_sgd[0].params[name], atol=1e-5, err_msg=name)


def test_update_is_torchs(tiny_model, batch, plain):
    """Clipping, AdamW and EMA against torch, fed with the gradients of our objective."""
    module = reward_functional(TINY, tiny_model.execution)
    objective = deterministic_objective(module)
    gradients = jax.jit(jax.grad(lambda p, f: objective({**f, **p}, batch, row_keys(0, 0, BATCH))[0].mean()))
    frozen = {name: array for name, array in tiny_model.params.items() if not is_trainable(name)}
    names = [name for name in tiny_model.params if is_trainable(name)]
    parameters = {name: torch.nn.Parameter(torch.from_numpy(np.array(tiny_model.params[name]))) for name in names}
    ema = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, betas=(0.8, 0.95), weight_decay=0.01)
    for _ in range(3):
        current = {name: jnp.asarray(parameter.detach().numpy()) for name, parameter in parameters.items()}
        for name, gradient in gradients(current, frozen).items():
            parameters[name].grad = torch.from_numpy(np.array(gradient))
        torch.nn.utils.clip_grad_norm_(parameters.values(), 0.5)
        optimizer.step()
        for name, parameter in parameters.items():
            ema[name] = 0.9 * ema[name] + 0.1 * parameter.detach()
    state = plain[0]
    assert_same_update(state.params, {name: parameter.detach().numpy() for name, parameter in parameters.items()})
    assert_same_update(state.ema, {name: average.numpy() for name, average in ema.items()})


def test_one_compilation_and_a_counted_step(plain):
    state, _, step = plain
    assert step._cache_size() == 1
    assert int(state.step) == 3


def test_an_update_that_is_not_finite_is_told_though_the_loss_is(tiny_model, batch):
    """The parameters overflow in the first step, whose loss was taken before."""
    config = dataclasses.replace(CONFIG, max_grad_norm=1e9)
    _, history, _ = run_steps(tiny_model, batch, config, steps=1, optimizer=optax.sgd(3e38))
    assert np.isfinite(history[0]["loss"])
    assert history[0]["finite"] == 0
    _, history, _ = run_steps(tiny_model, batch, CONFIG, steps=1)
    assert history[0]["finite"] == 1


def test_training_lowers_the_loss(tiny_model, batch):
    _, history, _ = run_steps(tiny_model, batch, CONFIG, steps=40)
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]


def test_randomness_depends_on_seed_and_step(tiny_model, batch):
    module = reward_functional(TINY, tiny_model.execution)
    still = dataclasses.replace(CONFIG, learning_rate=0.0)
    objective = random_objective(module)
    _, first, _ = run_steps(tiny_model, batch, still, objective=objective)
    _, again, _ = run_steps(tiny_model, batch, still, objective=objective)
    assert first == again
    assert len({row["loss"] for row in first}) == 3, "every step must draw its own noise"


def test_pairs_share_level_and_noise(tiny_model, batch):
    """With equal images in a pair the scores are equal, whatever the noise drawn."""
    module = reward_functional(TINY, tiny_model.execution)
    objective = random_objective(module)
    same = dataclasses.replace(batch, rejected=batch.chosen)
    losses, metrics = jax.jit(objective)(tiny_model.params, same, row_keys(4, 0, BATCH))
    np.testing.assert_allclose(metrics["margin"], 0, atol=1e-5)
    np.testing.assert_allclose(losses, 1 - np.sqrt(0.5), atol=1e-5)


def test_metrics_by_noise_level(tiny_model, batch):
    """In every bin: the share of rows, and what these rows contribute to accuracy and margin."""
    module = reward_functional(TINY, tiny_model.execution)
    objective = reward_objective(module, LossConfig(), SigmaConfig("constant", (0.35,)))
    _, metrics = jax.jit(objective)(tiny_model.params, batch, row_keys(4, 0, BATCH))
    np.testing.assert_array_equal(metrics["share_by_sigma"], np.tile(np.eye(10)[3], (BATCH, 1)))
    np.testing.assert_allclose(metrics["margin_by_sigma"][:, 3], metrics["margin"])
    np.testing.assert_allclose(metrics["accuracy_by_sigma"].sum(axis=1), metrics["accuracy"])


def test_flops_are_those_of_the_products():
    """Of one dense layer: 2 m n k forward, and as much for its weights' gradient."""

    def objective(params, batch, keys):
        return jnp.square(batch.chosen @ params["w"]).sum(axis=-1), {}

    shape = jax.ShapeDtypeStruct((64, 128), jnp.float32)
    pair = dina.PreferenceBatch(shape, shape, dina.PromptEmbeds(shape, shape))
    flops = model_flops(objective, {"w": jax.ShapeDtypeStruct((128, 256), jnp.float32)}, {}, pair)
    assert flops == pytest.approx(2 * 2 * 64 * 128 * 256, rel=0.05)


def test_flow_matching_loss_of_a_known_velocity(batch):
    """A fresh transformer predicts zero: the loss is the mean of |eps - x0|^2."""
    module = transformer_functional(TINY_SD3, ExecutionConfig(), zero_init=True)
    params = module.init(0)
    keys = row_keys(2, 0, BATCH)
    objective = jax.jit(flow_matching_objective(module, SigmaConfig()))
    losses, _ = objective(params, batch, keys)
    eps = np.stack([jax.random.normal(jax.random.split(key)[1], batch.chosen.shape[1:]) for key in keys])
    np.testing.assert_allclose(losses, np.mean(np.square(eps - batch.chosen), axis=(1, 2, 3)), rtol=1e-5)
    trained = randomized(params)
    assert np.abs(objective(trained, batch, keys)[0] - losses).max() > 1e-2


def test_schedules():
    warm = learning_rate_schedule(OptimizerConfig(learning_rate=2.0, warmup_steps=10), 100)
    assert [float(warm(step)) for step in (0, 5, 10, 99)] == pytest.approx([0.0, 1.0, 2.0, 2.0])
    cosine = learning_rate_schedule(OptimizerConfig(learning_rate=2.0, warmup_steps=10, schedule="cosine"), 110)
    assert [float(cosine(step)) for step in (10, 60, 110)] == pytest.approx([2.0, 1.0, 0.0], abs=1e-6)
    assert isinstance(make_optimizer(OptimizerConfig(), 10), optax.GradientTransformation)


@pytest.mark.parametrize("mesh", [MeshConfig(data=1), MeshConfig(data=2), MeshConfig(data=2, fsdp=2)])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_collection_feeds_several_updates(mesh, parts):
    """Two updates of one collection against the same two written out, whatever the mesh and the micro-batches.

    The objective pulls `w` to a row's collected number; collected is the row times `w` as it was, less the mean of
    all rows, which every place along `data` has to ask the others for.
    """
    mesh = make_mesh(mesh)
    x = np.arange(1.0, 9.0, dtype=np.float32)

    def together(values):
        everywhere = values
        if "data" in jax.sharding.get_abstract_mesh().manual_axes:
            everywhere = jax.lax.all_gather(values, "data", tiled=True)
        return values - everywhere.mean()

    def objective(params, collected, keys):
        return 0.5 * jnp.square(params["w"] - collected), {"collected": collected}

    collection = Collection(lambda params, batch, keys: params["w"] * batch, together, updates=2)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    trainable = jax.device_put({"w": jnp.asarray(2.0)}, everywhere)
    stage = StageConfig(BATCH, 1, micro_batches=parts, optimizer=OptimizerConfig(ema_decay=0.0))
    assembled = assemble(objective, trainable, {}, stage, mesh, collection=collection, optimizer=optax.sgd(0.5))
    with jax.set_mesh(mesh):
        state, metrics = assembled.step(assembled.state, {}, put_rows(x, BATCH, mesh))
    collected = 2.0 * x - np.mean(2.0 * x)
    w = 2.0
    for update in range(2):
        w -= 0.5 * (w - collected[update::2]).mean()
    np.testing.assert_allclose(state.params["w"], w, rtol=1e-6)
    np.testing.assert_allclose(metrics["collected"], collected.mean(), atol=1e-6)
    assert int(state.step) == 1
    assert assembled.updates == 2


@pytest.mark.parametrize("averaged", [False, True])
def test_who_collects(averaged):
    """The second step's collection is by the parameters that train, or by their average."""
    mesh = make_mesh(MeshConfig(data=1))
    collection = Collection(lambda params, batch, keys: params["w"] + 0 * batch, lambda rows: rows, averaged=averaged)

    def objective(params, collected, keys):
        return params["w"] * jnp.ones_like(collected), {"collected": collected}

    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    trainable = jax.device_put({"w": jnp.asarray(2.0)}, everywhere)
    stage = StageConfig(BATCH, 2, optimizer=OptimizerConfig(ema_decay=0.75))
    assembled = assemble(objective, trainable, {}, stage, mesh, collection=collection, optimizer=optax.sgd(1.0))
    state = assembled.state
    with jax.set_mesh(mesh):
        for _ in range(2):
            state, metrics = assembled.step(state, {}, put_rows(np.ones(BATCH, np.float32), BATCH, mesh))
    np.testing.assert_allclose(metrics["collected"], 1.75 if averaged else 1.0)
