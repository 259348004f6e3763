"""A module as a pure function of named parameters.

Parameters live in one flat dict, dotted path -> array ("backbone.transformer_blocks.0.attn.to_q.weight").
Names are what everything else works on: what trains, how an array is sharded, where it stands in
a checkpoint.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import jaxpr_as_fun
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import Mesh, NamedSharding

from dinalrm_jax.devices.sharding import Rules, parameter_shardings
from dinalrm_jax.model.quantization import whole

Params = dict[str, jax.Array]
A = TypeVar("A")
M = TypeVar("M", bound=nnx.Module)


@dataclasses.dataclass(frozen=True, eq=False)
class Functional(Generic[M]):
    """A module's structure without its arrays, and where they lie on a mesh; made by `functional`."""

    build: Callable[[nnx.Rngs], M]
    graphdef: nnx.GraphDef
    variables: tuple[tuple[tuple, nnx.Variable], ...]
    rules: Rules = ()

    def shardings(self, mesh: Mesh) -> dict[str, NamedSharding]:
        """Where each parameter lies on a mesh; raises ConfigError as `devices.sharding.parameter_shardings`."""
        return parameter_shardings(self.shapes, mesh, self.rules)

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Name -> shape and (float32) dtype of every parameter."""
        return {_name(path): jax.ShapeDtypeStruct(var.shape, var.dtype) for path, var in self.variables}

    def init(self, seed: int, wanted: Callable[[str], bool] = lambda name: True) -> Params:
        """Freshly drawn float32 parameters, those whose names are `wanted`; nothing is drawn of the others.

        Drawn one by one: compiling hundreds of draws as one program takes five times longer.
        """
        names = [name for name in self.shapes if wanted(name)]

        def build() -> list[jax.Array]:
            params = _named(self.build(_CountedKeys(seed)))
            return [params[name] for name in names]

        drawn = jax.make_jaxpr(build)()
        needed, _ = dce_jaxpr(drawn.jaxpr, len(names) * [True])
        found = jaxpr_as_fun(drawn.replace(jaxpr=needed))()
        return dict(zip(names, map(jnp.asarray, found)))  # a constant is no array yet

    def bind(self, params: Params) -> M:
        """The module over these parameters; call its methods under jit, grad and the rest.

        Raises:
            ValueError: the names are not this module's.
        """
        names = {_name(path) for path, _ in self.variables}
        if names != params.keys():
            missing, unknown = sorted(names - params.keys()), sorted(params.keys() - names)
            raise ValueError(f"parameters are of another model: missing {missing[:5]}, unknown {unknown[:5]}")
        return nnx.merge(
            self.graphdef,
            nnx.State.from_flat_path({path: var.replace(whole(params[_name(path)])) for path, var in self.variables}),
        )


def draw(module: Functional, seed: int, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, np.ndarray]:
    """`Functional.init` on the host: the same on every process, and no device has to hold the parameters whole."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        device = jax.local_devices()[0]
    with jax.default_device(device):
        return {name: np.asarray(array) for name, array in module.init(seed, wanted).items()}


def split(params: Mapping[str, A], trains: Callable[[str], bool]) -> tuple[dict[str, A], dict[str, A]]:
    """The parameters whose names `trains` says yes to, and the others."""
    trainable = {name: array for name, array in params.items() if trains(name)}
    return trainable, {name: array for name, array in params.items() if name not in trainable}


def functional(build: Callable[[nnx.Rngs], M], rules: Rules = ()) -> Functional[M]:
    """Traces `build` for its structure; allocates nothing, at any model size. `rules`: see `devices.sharding`."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: build(_OneKey())))
    return Functional(build, graphdef, tuple(nnx.to_flat_state(state)), rules)


class _OneKey(nnx.Rngs):
    """Stands in for `nnx.Rngs` where only shapes matter: its counters, traced, take seconds at full size."""

    def __init__(self):
        self._key = jax.random.key(0)

    def params(self) -> jax.Array:
        return self._key


class _CountedKeys(nnx.Rngs):
    """The keys of `nnx.Rngs(seed)`, counted outside of what is traced, for the same reason."""

    def __init__(self, seed: int):
        self._key, self._count = jax.random.key(seed), 0

    def params(self) -> jax.Array:
        key = jax.random.fold_in(self._key, self._count)
        self._count += 1
        return key


def _named(module: nnx.Module) -> Params:
    return {_name(path): variable[...] for path, variable in nnx.to_flat_state(nnx.state(module))}


def _name(path: tuple) -> str:
    return ".".join(map(str, path))
