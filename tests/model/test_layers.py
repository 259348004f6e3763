import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinalrm_jax.model.layers import add_vector, contract


@pytest.fixture(scope="module")
def arrays():
    """(x (2, 300, 8), weight (6, 8), gradient (2, 300, 6)), all of them bfloat16 numbers."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((2, 300, 8), (6, 8), (2, 300, 6))
    return [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes)]


def test_gradients_of_float32_weights_are_not_rounded_to_the_compute_dtype(arrays):
    """Of a product in bfloat16; forward and towards x nothing changes."""
    x, weight, gradient = arrays
    spec = "bni,oi->bno"
    y, pullback = jax.vjp(lambda x, weight: contract(spec, x, weight), x, weight.astype(jnp.float32))
    plain, plain_pullback = jax.vjp(lambda x, weight: jnp.einsum(spec, x, weight), x, weight)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, plain)
    by_x, by_weight = pullback(gradient)
    np.testing.assert_array_equal(by_x, plain_pullback(gradient)[0])
    exact = np.einsum("bno,bni->oi", *(np.asarray(array, np.float64) for array in (gradient, x)))
    assert by_weight.dtype == jnp.float32
    np.testing.assert_allclose(by_weight, exact, rtol=1e-5, atol=1e-4)
    assert np.abs(np.asarray(plain_pullback(gradient)[1], np.float64) - exact).max() > 1e-2, "bfloat16 would round"


def test_gradients_of_float32_vectors_are_summed_in_float32(arrays):
    _, _, gradient = arrays
    vector = jnp.ones(6)
    y, pullback = jax.vjp(lambda vector: add_vector(gradient, vector), vector)
    assert y.dtype == jnp.bfloat16
    exact = np.asarray(gradient, np.float64).sum(axis=(0, 1))
    np.testing.assert_allclose(pullback(gradient)[0], exact, rtol=1e-5, atol=1e-4)
