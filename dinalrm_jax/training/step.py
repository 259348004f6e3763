"""A training stage's optimizer step: assembled once, from an objective and parameters, for whatever drives it."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from dinalrm_jax.config import StageConfig
from dinalrm_jax.devices.mesh import ROW_AXES
from dinalrm_jax.devices.sharding import BY_ROW, WHOLE, like_parameters
from dinalrm_jax.model.parameters import Params
from dinalrm_jax.training.objectives import Objective
from dinalrm_jax.training.optimizer import make_optimizer

B = TypeVar("B")  # a batch: a pytree whose arrays all have a row each for every row


@dataclasses.dataclass(frozen=True)
class Collection:
    """What a step does before it learns, without a gradient: it makes of its batch what the objective then takes.

    A step that samples images and has them judged, say, collects them once and learns from them in several updates.

    Attributes:
        rows: (params, batch, keys (B,)) -> a tree with a row for every row, in micro-batches as the gradients are.
        together: that of all rows at once -> the objective's batch, with as many rows or fewer; along `data` every
            place does it with its own rows, in their order, and may ask the others (`jax.lax.all_gather`).
        updates: optimizer updates of one step; update u takes rows u, u + updates, u + 2 updates ..
        averaged: whether the averaged parameters collect; else those that train.
    """

    rows: Callable[[Params, Any, jax.Array], Any]
    together: Callable[[Any], Any]
    updates: int = 1
    averaged: bool = False


PART_AXES = "fsdp"  # rows of one place along `data` lie over these
LEARNING = 1  # folded into a row's key for what the objective draws after a collection


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes in training, and all that a checkpoint holds of the arrays.

    Attributes:
        step: () int32, steps done.
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


@dataclasses.dataclass(frozen=True)
class AssembledStep(Generic[B]):
    """An optimizer step with all that it works on; made by `assemble`.

    Attributes:
        step: jitted (state, frozen, batch) -> (state, metrics); it donates the state. Called under the mesh.
        state: before the first step, on the mesh; abstract where the parameters are.
        frozen: parameters that do not train.
        objective: what the step minimises.
        mesh: what it runs on.
        updates: of the optimizer in a step.
    """

    step: jax.stages.Wrapped
    state: TrainState
    frozen: Params
    objective: Objective
    mesh: Mesh
    updates: int = 1

    def lower(self, batch: B) -> jax.stages.Lowered:
        """The step for batches like this one, which may be abstract."""
        state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.state)
        with jax.set_mesh(self.mesh):
            return self.step.lower(state, self.frozen, batch)


def assemble(
    objective: Objective,
    trainable: Params,
    frozen: Params,
    stage: StageConfig,
    mesh: Mesh,
    *,
    seed: int = 0,
    collection: Collection | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> AssembledStep:
    """A stage's step over parameters that lie on the mesh, or over abstract ones that say where they would.

    Args:
        objective: of all parameters, a batch and a key a row; see `training.objectives`.
        trainable: float32; the state has copies of its own, which lie as these do.
        frozen: in whatever dtype the objective takes them.
        stage: optimizer, schedule, average, micro-batches; in steps.
        mesh: see `devices.mesh`.
        seed: of the rows' randomness.
        collection: makes the objective's batch of the step's; None: they are the same, and a step is one update.
        optimizer: another than the stage's AdamW.
    """
    updates = 1 if collection is None else collection.updates
    optimizer = optimizer or make_optimizer(stage.optimizer, stage.steps * updates)
    create = functools.partial(TrainState.create, optimizer=optimizer, averaged=stage.optimizer.ema_decay > 0)
    shardings = {name: array.sharding for name, array in trainable.items()}
    state = jax.eval_shape(create, trainable)
    state_shardings = like_parameters(state, shardings, mesh)
    if all(isinstance(array, jax.Array) for array in trainable.values()):
        state = jax.jit(create, out_shardings=state_shardings)(trainable)
    else:
        state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, state_shardings)
    frozen_shardings = {name: array.sharding for name, array in frozen.items()}
    step = _make_step(objective, collection, optimizer, stage, mesh, seed, state_shardings, frozen_shardings)
    return AssembledStep(step, state, frozen, objective, mesh, updates)


def _make_step(
    objective: Objective,
    collection: Collection | None,
    optimizer: optax.GradientTransformation,
    stage: StageConfig,
    mesh: Mesh,
    seed: int,
    state_shardings: TrainState,
    frozen_shardings: Mapping[str, Sharding],
) -> jax.stages.Wrapped:
    """The jitted step.

    The batch is split by rows, state and frozen parameters lie as given. With `micro_batches` n, the batch
    passes as n parts, one after another, whose gradients are averaged: the same update in less memory.

    Gradients are float32 as soon as they exist. Along `data` every device adds up its own, over all parts, and they
    are summed once an update; along `fsdp` each part's go to the devices that hold the parameters.

    The metric `finite` is 1 where the new parameters and their average hold no NaN or infinity. Metrics are means
    over a step's updates.

    A row's key depends on (seed, step, its place in the batch) only: neither mesh nor micro-batches change it.
    """

    def loss_and_metrics(params: Params, frozen: Params, rows: tuple[Any, jax.Array]):
        losses, metrics = objective({**frozen, **params}, *rows)
        return jnp.mean(losses), {
            "loss": jnp.mean(losses),
            **{name: jnp.mean(m, axis=0) for name, m in metrics.items()},
        }

    def gradients(params: Params, frozen: Params, rows: tuple[Any, jax.Array]):
        gradient_fn = jax.grad(loss_and_metrics, has_aux=True)
        if stage.micro_batches == 1:
            return gradient_fn(params, frozen, rows)
        split = _in_parts(rows, stage.micro_batches, PART_AXES)

        def add_part(total, part):
            result = gradient_fn(params, frozen, part)
            return jax.tree.map(lambda a, b: a + b / stage.micro_batches, total, result), None

        first_rows = jax.tree.map(lambda x: x[0], split)
        shapes = jax.eval_shape(gradient_fn, params, frozen, first_rows)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.scan(add_part, zeros, split)[0]

    def collect(params: Params, frozen: Params, rows: tuple[B, jax.Array]):
        everything = {**frozen, **params}
        if stage.micro_batches == 1:
            return collection.together(collection.rows(everything, *rows))
        parts = jax.lax.map(
            lambda part: collection.rows(everything, *part), _in_parts(rows, stage.micro_batches, PART_AXES)
        )
        return collection.together(jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts))

    if mesh.shape["data"] > 1:
        # Each place along `data` on its own: XLA would sum every gradient where it arises.
        alone = functools.partial(
            jax.shard_map,
            mesh=mesh,
            in_specs=(WHOLE, WHOLE, PartitionSpec("data")),
            axis_names={"data"},
            check_vma=False,  # JAX's own check of replication would do the same
        )
        own = gradients
        gradients = alone(lambda *arguments: jax.lax.pmean(own(*arguments), "data"), out_specs=WHOLE)
        collect = alone(collect, out_specs=PartitionSpec("data"))

    def update(state: TrainState, frozen: Params, batch: Any, keys: jax.Array):
        grads, metrics = gradients(state.params, frozen, (batch, keys))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = stage.optimizer.ema_decay
        ema = None if state.ema is None else optax.incremental_update(params, state.ema, 1 - decay)
        metrics["grad_norm"] = optax.global_norm(grads)
        metrics["finite"] = jnp.isfinite(optax.global_norm((params, ema))).astype(jnp.float32)
        return TrainState(state.step, params, opt_state, ema), metrics

    def step(state: TrainState, frozen: Params, batch: B):
        keys = row_keys(seed, state.step, rows_of(batch))
        if collection is None:
            state, metrics = update(state, frozen, batch, keys)
            return dataclasses.replace(state, step=state.step + 1), metrics
        collected = collect(state.result if collection.averaged else state.params, frozen, (batch, keys))
        learning = jax.vmap(jax.random.fold_in, (0, None))(keys[: rows_of(collected)], LEARNING)
        parts = _in_parts((collected, learning), collection.updates, ROW_AXES)
        state, metrics = jax.lax.scan(lambda state, part: update(state, frozen, *part), state, parts)
        metrics = {name: jnp.min(m) if name == "finite" else jnp.mean(m, axis=0) for name, m in metrics.items()}
        return dataclasses.replace(state, step=state.step + 1), metrics

    replicated, by_row = NamedSharding(mesh, WHOLE), NamedSharding(mesh, BY_ROW)
    return jax.jit(
        step,
        in_shardings=(state_shardings, dict(frozen_shardings), by_row),
        out_shardings=(state_shardings, replicated),
        donate_argnums=0,
    )


def _in_parts(rows: Any, parts: int, axes: str | tuple[str, ...]) -> Any:
    """(B, ...) -> (parts, B / parts, ...), of which rows 0, parts, 2 parts .. are part 0: rows of all devices."""
    split = jax.tree.map(lambda x: x.reshape(len(x) // parts, parts, *x.shape[1:]).swapaxes(0, 1), rows)
    return jax.lax.with_sharding_constraint(split, PartitionSpec(None, axes))


def rows_of(batch: Any) -> int:
    """How many rows a batch has: the length of all of its arrays."""
    return len(jax.tree.leaves(batch)[0])


def row_keys(seed: int, step: int | jax.Array, rows: int) -> jax.Array:
    """(rows,) keys of a batch's rows: of (seed, step, row)."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(rows))


def model_flops(objective: Objective[B], params: Params, frozen: Params, batch: B) -> float:
    """FLOPs of the loss and its gradient for one batch, by XLA's count of the program before optimisation.

    Of an objective without rematerialisation: what is computed twice to save memory is no work of
    the model's. Without scan: XLA counts a loop's body once.
    """

    def loss(params, frozen, batch, keys):
        return jnp.mean(objective({**frozen, **params}, batch, keys)[0])

    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, frozen, batch))
    keys = jax.eval_shape(lambda: row_keys(0, 0, rows_of(batch)))
    analysis = jax.jit(jax.grad(loss)).lower(*arguments, keys).cost_analysis()
    return float((analysis or {}).get("flops", 0.0))
