"""Weights from files to devices."""

import os

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import dinalrm_jax as dina
from dinalrm_jax.devices.placement import place
from dinalrm_jax.model.tables import WeightsError
from dinalrm_jax.weights.files import SafetensorsDirectory, save_safetensors
from dinalrm_jax.weights.pretrained import open_reward_model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_are_those_of_the_host(dtype):
    """Of any layout and dtype: a transposed view, a scalar, half precision, and what bfloat16 rounds to even."""
    rng = np.random.default_rng(0)
    arrays = {
        "transposed": rng.standard_normal((5, 7)).astype(np.float32).T,
        "scalar": np.float32(1.5)[()] * np.ones(()),
        "half": rng.standard_normal(9).astype(np.float16),
        "brain": rng.standard_normal((2, 3)).astype(ml_dtypes.bfloat16),
        "ties": np.array([1 + 2**-8, 1 + 3 * 2**-8, np.inf, -0.0], np.float32),
        "empty": np.zeros((0, 3), np.float32),
    }
    placed = place(arrays, dtype)
    assert list(placed) == list(arrays)
    for name, array in arrays.items():
        assert placed[name].dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(placed[name], jnp.asarray(array).astype(dtype), strict=True)


def test_the_default_device_is_the_callers():
    device = jax.devices()[3]
    with jax.default_device(device):
        placed = place({"a": np.ones(3, np.float32)}, np.float32)
    assert placed["a"].devices() == {device}


def test_each_device_gets_its_part():
    mesh = jax.make_mesh((4,), ("x",), devices=jax.devices()[:4])
    array = np.arange(24, dtype=np.float32).reshape(8, 3)
    placed = place({"rows": array, "whole": array}, np.float32,
                   {"rows": NamedSharding(mesh, P("x")), "whole": NamedSharding(mesh, P())})  # fmt: skip
    for shard in placed["rows"].addressable_shards:
        np.testing.assert_array_equal(shard.data, array[shard.index])
        assert shard.data.shape == (2, 3)
    assert [shard.data.shape for shard in placed["whole"].addressable_shards] == 4 * [(8, 3)]
    np.testing.assert_array_equal(placed["whole"], array)


def test_a_loaded_model_does_not_change_with_its_file(golden_model, tmp_path):
    """Files are mapped, so an array that were still the file's would."""
    golden_model.save(tmp_path / "native")
    model = dina.RewardModel.from_pretrained(tmp_path / "native", dtype="float32")
    for stem in ("backbone", "trained"):
        path = tmp_path / "native" / f"{stem}.safetensors"
        size = path.stat().st_size
        with path.open("r+b") as file:  # in place, as `cp` over it does
            file.write(os.urandom(size))
    chex.assert_trees_all_equal(model.params, golden_model.params)


def test_an_open_model_is_read_when_it_is_used(golden_model, tmp_path):
    """Names and shapes are checked at once; the numbers come later, which the server uses."""
    golden_model.save(tmp_path / "native")
    opened = open_reward_model(tmp_path / "native", None, golden_model.execution)
    assert opened.config == golden_model.config
    path = tmp_path / "native" / "trained.safetensors"
    tensors = {name: np.array(array) for name, array in SafetensorsDirectory(path.parent, "trained").items()}
    data = path.read_bytes()
    zero = data.replace(tensors["head.head.weight"].tobytes(), bytes(tensors["head.head.weight"].nbytes))
    assert zero != data
    with path.open("r+b") as file:
        file.write(zero)
    assert not np.any(opened.params["head.head.weight"])
    del tensors["head.head.weight"]
    save_safetensors(path, tensors)
    with pytest.raises(WeightsError, match="missing: head.head.weight"):
        open_reward_model(tmp_path / "native", None, golden_model.execution)


def test_tensors_of_unknown_dtypes_are_named_when_they_are_asked_for(tmp_path):
    header = b'{"a":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]},'
    header += b'"b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}'
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"ab\x03\x04")
    tensors = SafetensorsDirectory(tmp_path, "model")
    assert tensors["b"].tolist() == [3, 4]
    with pytest.raises(WeightsError, match="a is of dtype F8_E4M3; this reads F64, F32"):
        tensors["a"]
