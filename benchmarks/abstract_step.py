"""The full-size train step without its arrays: what can be compiled and read where it cannot run."""

import jax
import numpy as np
from jax.sharding import Mesh

import dinalrm_jax as dina
from dinalrm_jax.config import TrainConfig
from dinalrm_jax.reward_model import is_trainable, reward_functional, stored_shapes
from dinalrm_jax.training.objectives import reward_objective
from dinalrm_jax.training.optimizer import make_optimizer
from dinalrm_jax.training.sharding import like_parameters, parameter_shardings, row_sharded
from dinalrm_jax.training.step import TrainState, make_step


def compile_step(
    config: TrainConfig, mesh: Mesh, *, resolution: int, pairs: int, tokens: int = 205
) -> jax.stages.Compiled:
    """The reward stage's step, compiled for `pairs` pairs on each device that takes rows."""
    execution = config.execution
    module = reward_functional(config.model, execution)
    shapes = stored_shapes(config.model, execution)
    shardings = parameter_shardings(shapes, mesh)
    frozen = {
        name: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=shardings[name])
        for name, shape in shapes.items()
        if not is_trainable(name)
    }
    trainable = {name: shape for name, shape in shapes.items() if is_trainable(name)}
    optimizer = make_optimizer(config.reward.optimizer, config.reward.steps)
    averaged = config.reward.optimizer.ema_decay > 0
    state = jax.eval_shape(lambda params: TrainState.create(params, optimizer, averaged), trainable)
    state_shardings = like_parameters(state, shardings, mesh)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, state_shardings)
    objective = reward_objective(module, config.loss, config.reward.sigma, config.ensemble_term)
    frozen_shardings = {name: shardings[name] for name in frozen}
    step = make_step(objective, optimizer, config.reward, mesh, 0, state_shardings, frozen_shardings)
    rows = pairs * mesh.shape["data"] * mesh.shape["fsdp"]
    side, transformer = resolution // 8, config.model.transformer
    latents = row_sharded((rows, side, side, transformer.in_channels), np.float16, mesh)
    prompt = dina.PromptEmbeds(
        row_sharded((rows, tokens, transformer.joint_attention_dim), np.float16, mesh),
        row_sharded((rows, transformer.pooled_projection_dim), np.float16, mesh),
    )
    with jax.set_mesh(mesh):
        return step.lower(state, frozen, dina.PreferenceBatch(latents, latents, prompt)).compile()
