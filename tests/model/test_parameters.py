"""Freshly drawn parameters."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dinalrm_jax.model.backbone.family import transformer_functional
from dinalrm_jax.model.execution import ExecutionConfig
from dinalrm_jax.model.parameters import draw, functional
from dinalrm_jax.model.reward import RewardModule, is_trainable, reward_functional
from tests.conftest import TINY, TINY_SD3


def test_what_trains_is_drawn_as_with_the_rest():
    """Bit by bit what building the whole module with flax's own counter gives."""
    module = RewardModule(TINY, ExecutionConfig(), rngs=nnx.Rngs(7))
    whole = {".".join(map(str, path)): value[...] for path, value in nnx.to_flat_state(nnx.state(module))}
    functional_module = reward_functional(TINY, ExecutionConfig())
    first = draw(functional_module, 7, is_trainable)
    assert set(first) == {name for name in whole if is_trainable(name)}
    for name, array in {**draw(functional_module, 7), **first}.items():
        np.testing.assert_array_equal(array, whole[name], err_msg=name)


def test_blocks_of_a_transformer_are_drawn_as_with_the_rest():
    module = transformer_functional(TINY_SD3, ExecutionConfig())
    whole = draw(module, 3)
    part = draw(module, 3, lambda name: name.startswith("transformer_blocks.1."))
    assert 0 < len(part) < len(whole)
    for name, array in part.items():
        np.testing.assert_array_equal(array, whole[name], err_msg=name)


class TwoDraws(nnx.Module):
    """Of which each says that it was drawn."""

    def __init__(self, drawn: list[str], *, rngs: nnx.Rngs):
        def say(name: str):
            def add(numbers):
                drawn.append(name)
                return numbers

            return nnx.Param(jax.pure_callback(add, jax.ShapeDtypeStruct((3,), jnp.float32), self._numbers(rngs)))

        self.first, self.second = say("first"), say("second")

    @staticmethod
    def _numbers(rngs: nnx.Rngs) -> jax.Array:
        return jax.random.normal(rngs.params(), (3,))


def test_nothing_is_drawn_of_what_is_not_wanted():
    drawn: list[str] = []
    module = functional(lambda rngs: TwoDraws(drawn, rngs=rngs))
    (values,) = draw(module, 0, lambda name: name == "second").values()
    assert drawn == ["second"]
    np.testing.assert_array_equal(values, jax.random.normal(jax.random.fold_in(jax.random.key(0), 1), (3,)))
