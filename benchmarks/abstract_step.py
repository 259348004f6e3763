"""The full-size train step without its arrays: what can be compiled and read where it cannot run."""

import jax
import numpy as np
from jax.sharding import Mesh

import dinalrm_jax as dina
from dinalrm_jax.config import TrainConfig
from dinalrm_jax.devices.mesh import row_devices
from dinalrm_jax.devices.sharding import row_sharded
from dinalrm_jax.model.parameters import split
from dinalrm_jax.model.reward import is_trainable, reward_functional, stored_shapes
from dinalrm_jax.training.objectives import reward_objective
from dinalrm_jax.training.step import assemble


def compile_step(
    config: TrainConfig, mesh: Mesh, *, resolution: int, pairs: int, tokens: int = 205
) -> jax.stages.Compiled:
    """The reward stage's step, compiled for `pairs` pairs on each device that takes rows."""
    module = reward_functional(config.model, config.execution)
    shardings = module.shardings(mesh)
    shapes = {
        name: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=shardings[name])
        for name, shape in stored_shapes(config.model, config.execution).items()
    }
    objective = reward_objective(module, config.loss, config.reward.sigma, config.ensemble_term)
    assembled = assemble(objective, *split(shapes, is_trainable), config.reward, mesh)
    rows, spec = pairs * row_devices(mesh), config.model.transformer.latents
    side = resolution // spec.downsampling
    latents = row_sharded((rows, side, side, spec.channels), np.float16, mesh)
    prompt = dina.PromptEmbeds(
        row_sharded((rows, tokens, spec.text_width), np.float16, mesh),
        row_sharded((rows, spec.pooled_width), np.float16, mesh),
    )
    return assembled.lower(dina.PreferenceBatch(latents, latents, prompt)).compile()
