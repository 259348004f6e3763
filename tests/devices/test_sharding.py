"""Where parameters lie, and which meshes and batches are refused."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from dinalrm_jax.devices.mesh import MeshConfig, check_batch_size, make_mesh
from dinalrm_jax.devices.placement import place
from dinalrm_jax.devices.sharding import gather, like_parameters, local_rows, parameter_shardings, put_rows
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.backbone.family import transformer_functional
from dinalrm_jax.model.backbone.sd3.config import SD3Config
from dinalrm_jax.model.config import HeadConfig, RewardModelConfig
from dinalrm_jax.model.execution import ExecutionConfig
from dinalrm_jax.model.reward import is_trainable, reward_functional, sharding_rules
from dinalrm_jax.training.checkpoint import Checkpoints
from dinalrm_jax.training.step import TrainState
from tests.conftest import TINY

RULES = sharding_rules(RewardModelConfig())


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))


@pytest.fixture(scope="module")
def full_size():
    """Shapes of the published model."""
    return reward_functional(RewardModelConfig(), ExecutionConfig()).shapes


def test_every_parameter_of_every_form_has_a_place(mesh):
    few = SD3Config(num_layers=3, dual_attention_layers=(0, 1))
    taps = {"transformer": few, "num_blocks": 2, "visual_taps": (0, 2), "text_taps": (1, 2)}
    forms = [
        reward_functional(RewardModelConfig(**taps), ExecutionConfig()),
        reward_functional(
            RewardModelConfig(**taps, lora=None, head=HeadConfig(width=768), logistic=True), ExecutionConfig()
        ),
        transformer_functional(few, ExecutionConfig()),
    ]
    for form in forms:
        assert form.shardings(mesh).keys() == form.shapes.keys()


def test_where_the_matrices_lie(mesh, full_size):
    specs = {name: sharding.spec for name, sharding in parameter_shardings(full_size, mesh, RULES).items()}
    block = "backbone.transformer_blocks.3."
    assert specs[block + "attn.to_q.weight"] == P("tensor", "fsdp")
    assert specs[block + "attn.add_k_proj.bias"] == P("tensor")
    assert specs[block + "attn2.to_out.0.weight"] == P("fsdp", "tensor")
    assert specs[block + "attn.to_q.lora_A"] == P(None, "fsdp")
    assert specs[block + "attn.to_q.lora_B"] == P("tensor", None)
    assert specs[block + "ff.net.0.proj.weight"] == P("tensor", "fsdp")
    assert specs[block + "ff_context.net.2.weight"] == P("fsdp", "tensor")
    assert specs[block + "norm1.linear.weight"] == P("fsdp", None)
    assert specs["head.attn1.to_k_text.weight"] == P("tensor", "fsdp")


def test_almost_everything_is_split(full_size):
    """What lies whole on every device is little of the model and of what trains, so fsdp divides its memory."""
    shardings = parameter_shardings(full_size, make_mesh(MeshConfig(data=1, fsdp=4)), RULES)
    whole = {name for name, sharding in shardings.items() if "fsdp" not in sharding.spec}
    sizes = {name: shape.size for name, shape in full_size.items()}
    trained = {name for name in sizes if is_trainable(name)}
    assert sum(sizes[name] for name in whole) < 0.02 * sum(sizes.values())
    assert sum(sizes[name] for name in whole & trained) < 0.15 * sum(sizes[name] for name in trained)


def test_axes_that_do_not_divide_are_named(mesh):
    shapes = {
        "backbone.a.attn.to_q.weight": jax.ShapeDtypeStruct((3, 4), np.float32),
        "backbone.a.ff.net.2.weight": jax.ShapeDtypeStruct((4, 5), np.float32),
        "backbone.a.unheard_of": jax.ShapeDtypeStruct((4,), np.float32),
    }
    with pytest.raises(ConfigError) as error:
        parameter_shardings(shapes, mesh, RULES)
    assert "backbone.a.attn.to_q.weight (3, 4): axis 0 is not divisible by mesh.tensor = 2" in str(error.value)
    assert "backbone.a.ff.net.2.weight (4, 5): axis 1 is not divisible by mesh.tensor = 2" in str(error.value)
    assert "backbone.a.unheard_of (4,): no rule matches" in str(error.value)


def test_placed_and_gathered(mesh):
    shapes = reward_functional(TINY, ExecutionConfig()).shapes
    rng = np.random.default_rng(0)
    params = {name: rng.standard_normal(shape.shape).astype(np.float32) for name, shape in shapes.items()}
    placed = place(params, np.float32, parameter_shardings(shapes, mesh, RULES))
    query = placed["backbone.transformer_blocks.0.attn.to_q.weight"]
    assert {shard.data.shape for shard in query.addressable_shards} == {(8, 8)}
    for name, array in gather(placed).items():
        np.testing.assert_array_equal(array, params[name])


def test_rows(mesh):
    assert local_rows(8, mesh) == list(range(8))
    batch = put_rows({"x": np.arange(8)}, 8, mesh)["x"]
    assert sorted((shard.index[0].start, shard.data.shape) for shard in batch.addressable_shards) == [
        (0, (4,)), (0, (4,)), (4, (4,)), (4, (4,)),
    ]  # fmt: skip


def test_meshes_and_batches_that_do_not_fit():
    assert dict(make_mesh(MeshConfig()).shape) == {"data": 4, "fsdp": 1, "tensor": 1}
    assert dict(make_mesh(MeshConfig(data=2, fsdp=-1)).shape) == {"data": 2, "fsdp": 2, "tensor": 1}
    for wrong in (MeshConfig(data=5), MeshConfig(fsdp=3), MeshConfig(data=2, fsdp=4)):
        with pytest.raises(ConfigError, match="does not fit 4 devices"):
            make_mesh(wrong)
    with pytest.raises(ConfigError, match="at most one of them -1"):
        MeshConfig(data=-1, fsdp=-1)
    with pytest.raises(ConfigError, match=r"reward.batch_size 12 must be a multiple of .* = 2 x 2 x 2"):
        check_batch_size("reward.batch_size", 12, 2, make_mesh(MeshConfig(data=2, fsdp=2)))


def test_a_checkpoint_goes_on_on_another_mesh(mesh, tmp_path):
    """Written where rows are split four ways, restored where parameters are split two by two."""
    shapes = {"head.attn1.to_q.weight": (8, 12), "head.head.bias": (1,)}
    rng = np.random.default_rng(0)
    params = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    optimizer = optax.adam(1e-3)

    def state_on(mesh, params):
        shardings = parameter_shardings(params, mesh, RULES)
        state = TrainState.create(place(params, np.float32, shardings), optimizer)
        return jax.device_put(state, like_parameters(state, shardings, mesh))

    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(state_on(make_mesh(MeshConfig(data=4)), params), {"step": 0})
    checkpoints.close()
    like = state_on(mesh, {name: np.zeros_like(array) for name, array in params.items()})
    restored, loader = Checkpoints(tmp_path / "checkpoints").restore_latest(like)
    assert loader == {"step": 0}
    for name, array in restored.params.items():
        np.testing.assert_array_equal(array, params[name])
    query = restored.ema["head.attn1.to_q.weight"]
    assert {shard.data.shape for shard in query.addressable_shards} == {(4, 6)}
    moment = restored.opt_state[0].mu["head.attn1.to_q.weight"]
    assert {shard.data.shape for shard in moment.addressable_shards} == {(4, 6)}
