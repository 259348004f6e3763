"""One optimizer step as a pure, jitted function of (state, frozen parameters, batch)."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dinalrm_jax.config import OptimizerConfig
from dinalrm_jax.data.batch import PreferenceBatch
from dinalrm_jax.layers import ROW_AXES
from dinalrm_jax.parameters import Params
from dinalrm_jax.training.objectives import Objective
from dinalrm_jax.training.sharding import BY_ROW, WHOLE


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes in training, and all that a checkpoint holds of the arrays.

    Attributes:
        step: () int32, optimizer steps done.
        params: trainable parameters, float32.
        opt_state: of the optimizer.
        ema: exponential moving average of `params`; None where none is taken.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    ema: Params | None

    @classmethod
    def create(cls, params: Params, optimizer: optax.GradientTransformation, averaged: bool = True) -> "TrainState":
        """The state before the first step; its arrays are its own, since the step donates them."""
        params, ema = (jax.tree.map(jnp.copy, params) for _ in range(2))
        return cls(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema if averaged else None)

    @property
    def result(self) -> Params:
        """What is evaluated and saved: the average, or where none is taken, the parameters."""
        return self.params if self.ema is None else self.ema


def make_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    config: OptimizerConfig,
    mesh: Mesh,
    seed: int,
    state_shardings: TrainState,
    frozen_shardings: Mapping[str, NamedSharding],
) -> Callable[[TrainState, Params, PreferenceBatch], tuple[TrainState, dict[str, jax.Array]]]:
    """Builds the jitted step; it donates the state. Call and lower it under `jax.set_mesh(mesh)`.

    The batch is split by rows, state and frozen parameters lie as given. With `accumulation_steps` n,
    the batch passes as n parts whose gradients are averaged: the update of one part in less memory,
    up to the noise, which every part draws for itself.

    The metric `finite` is 1 where the new parameters and their average hold no NaN or infinity.

    The randomness of step s depends on (seed, s) only.
    """

    def loss_and_metrics(params: Params, frozen: Params, batch: PreferenceBatch, key: jax.Array):
        losses, metrics = objective({**frozen, **params}, batch, key)
        return jnp.mean(losses), {
            "loss": jnp.mean(losses),
            **{name: jnp.mean(m, axis=0) for name, m in metrics.items()},
        }

    def gradients(params: Params, frozen: Params, batch: PreferenceBatch, key: jax.Array):
        gradient_fn = jax.grad(loss_and_metrics, has_aux=True)
        parts = config.accumulation_steps
        if parts == 1:
            return gradient_fn(params, frozen, batch, key)
        # Every part takes rows from all devices: rows 0, parts, 2 parts ... are part 0.
        split = jax.tree.map(lambda x: x.reshape(len(x) // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch)
        split = jax.lax.with_sharding_constraint(split, NamedSharding(mesh, PartitionSpec(None, ROW_AXES)))

        def add_part(total, part):
            index, rows = part
            result = gradient_fn(params, frozen, rows, jax.random.fold_in(key, index))
            return jax.tree.map(lambda a, b: a + b / parts, total, result), None

        first_rows = jax.tree.map(lambda x: x[0], split)
        shapes = jax.eval_shape(gradient_fn, params, frozen, first_rows, key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.scan(add_part, zeros, (jnp.arange(parts), split))[0]

    def step(state: TrainState, frozen: Params, batch: PreferenceBatch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        grads, metrics = gradients(state.params, frozen, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = None if state.ema is None else optax.incremental_update(params, state.ema, 1 - config.ema_decay)
        metrics["grad_norm"] = optax.global_norm(grads)
        metrics["finite"] = jnp.isfinite(optax.global_norm((params, ema))).astype(jnp.float32)
        return TrainState(state.step + 1, params, opt_state, ema), metrics

    replicated, by_row = NamedSharding(mesh, WHOLE), NamedSharding(mesh, BY_ROW)
    return jax.jit(
        step,
        in_shardings=(state_shardings, dict(frozen_shardings), by_row),
        out_shardings=(state_shardings, replicated),
        donate_argnums=0,
    )


def model_flops(objective: Objective, params: Params, frozen: Params, batch: PreferenceBatch) -> float:
    """FLOPs of the loss and its gradient for one batch, by XLA's count of the program before optimisation.

    Of an objective without rematerialisation: what is computed twice to save memory is no work of
    the model's. Without scan: XLA counts a loop's body once.
    """

    def loss(params, frozen, batch, key):
        return jnp.mean(objective({**frozen, **params}, batch, key)[0])

    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, frozen, batch))
    key = jax.eval_shape(lambda: jax.random.key(0))
    analysis = jax.jit(jax.grad(loss)).lower(*arguments, key).cost_analysis()
    return float((analysis or {}).get("flops", 0.0))
