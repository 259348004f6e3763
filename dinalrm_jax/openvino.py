"""The reward on a CPU by OpenVINO, whose matrix products are oneDNN's: opt-in, the same numbers.

`pip install -e '.[openvino]'`. OpenVINO's JAX front end is a preview: it knows neither calls nor some primitives, so
the traced reward is flattened for it. What it compiles has one shape and level, and no gradient.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr
from jax.extend.core import Literal as Constant

from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.batch import PromptEmbeds
from dinalrm_jax.noise import draw_noise, seed_key
from dinalrm_jax.reward_model import RewardModel

INSTALL = "scoring by OpenVINO needs its package: pip install -e '.[openvino]'"
CALLS = ("jit", "pjit", "closed_call", "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call")
NOTHING = ("copy", "copy_p", "stop_gradient", "name")  # primitives that give what they take


class OpenVINOReward:
    """A reward model compiled for this machine's CPU, for rows of one shape.

    Args:
        model: in float32, its attention "auto" or "xla".
        rows, height, width: of the latents that it will score.
        tokens: of their prompts.
        sigma: a noise level, or those of an ensemble.
        precision: of the products: "bf16" pays on CPUs with AMX and may cost elsewhere (docs/speed.md).

    Raises:
        ConfigError: OpenVINO is not installed, or a model in another dtype.
    """

    def __init__(
        self,
        model: RewardModel,
        rows: int,
        height: int,
        width: int,
        tokens: int,
        sigma: float | Sequence[float] = 0.4,
        precision: Literal["f32", "bf16"] = "f32",
    ):
        try:
            import openvino
        except ImportError:
            raise ConfigError(INSTALL) from None
        if model.execution.dtype != "float32":
            raise ConfigError(f"OpenVINO compiles a model of float32, this one is {model.execution.dtype}; load it so")
        # Attention in groups is a loop, which the front end does not know.
        model = dataclasses.replace(model, execution=dataclasses.replace(model.execution, attention="xla"))
        spec, score = model.config.transformer.latents, model.reward_fn(sigma)
        shapes = [
            (rows, height, width, spec.channels),
            (rows, tokens, spec.text_width),
            (rows, spec.pooled_width),
            (rows, height, width, spec.channels),
        ]

        def reward(latents, embeds, pooled, noise):
            return score(model.params, latents, PromptEmbeds(embeds, pooled), None, noise=noise)

        inputs = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
        converted = openvino.convert_model(flattened(jax.make_jaxpr(reward)(*inputs), inputs))
        # Its fusion of small operations ("snippets") fails on the order of this graph (2026.4).
        settings = {"INFERENCE_PRECISION_HINT": precision, "SNIPPETS_MODE": "DISABLE"}
        self._request = openvino.compile_model(converted, "CPU", settings).create_infer_request()
        self._shapes = shapes

    def __call__(
        self, latents: np.ndarray, prompt: PromptEmbeds, noise: np.ndarray | None = None, seed: int | Sequence[int] = 0
    ) -> np.ndarray:
        """(B,) float32 scores; arguments as for `RewardModel.score_latents`.

        Raises:
            ValueError: another shape than it was compiled for.
        """
        eps = draw_noise(seed_key(seed), np.shape(latents)) if noise is None else noise
        inputs = [latents, prompt.prompt_embeds, prompt.pooled_prompt_embeds, eps]
        arrays = [np.asarray(array, np.float32) for array in inputs]
        if [array.shape for array in arrays] != self._shapes:
            raise ValueError(f"this was compiled for {self._shapes}, got {[array.shape for array in arrays]}")
        (scores,) = self._request.infer(arrays).values()
        return np.array(scores)


def flattened(closed: ClosedJaxpr, inputs: Sequence[jax.ShapeDtypeStruct]) -> ClosedJaxpr:
    """The same program without calls, of primitives that OpenVINO's front end knows; constants are computed."""
    return jax.make_jaxpr(lambda *arguments: _evaluated(closed, arguments))(*inputs)


def _evaluated(closed: ClosedJaxpr, arguments: Sequence[Any]) -> list[Any]:
    jaxpr, values = closed.jaxpr, {}

    def read(variable):
        return variable.val if isinstance(variable, Constant) else values[variable]

    values.update(zip(jaxpr.constvars, closed.consts))
    values.update(zip(jaxpr.invars, arguments))
    for equation in jaxpr.eqns:
        found = _results(equation, [read(variable) for variable in equation.invars])
        values.update(zip(equation.outvars, found))
    return [read(variable) for variable in jaxpr.outvars]


def _results(equation: Any, inputs: list[Any]) -> list[Any]:
    name, params = equation.primitive.name, equation.params
    if name in CALLS:
        called = next(params[key] for key in ("jaxpr", "call_jaxpr") if key in params)
        return _evaluated(called if isinstance(called, ClosedJaxpr) else ClosedJaxpr(called, ()), inputs)
    if name in NOTHING:
        return inputs[:1]
    if name == "split":
        ends = np.cumsum(params["sizes"])
        return [lax.slice_in_dim(inputs[0], e - n, e, axis=params["axis"]) for e, n in zip(ends, params["sizes"])]
    if name == "unstack":
        axis = params["axis"]
        parts = (lax.slice_in_dim(inputs[0], i, i + 1, axis=axis) for i in range(inputs[0].shape[axis]))
        return [lax.squeeze(part, (axis,)) for part in parts]
    if not any(isinstance(value, jax.core.Tracer) for value in inputs):
        with jax.ensure_compile_time_eval():
            found = equation.primitive.bind(*inputs, **params)
    else:
        found = equation.primitive.bind(*inputs, **params)
    return found if equation.primitive.multiple_results else [found]
