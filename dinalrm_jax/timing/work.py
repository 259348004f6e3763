"""The work that `dinalrm_jax.benchmark` times: one call of each mode, at any size, with random weights."""

import dataclasses
import time
from collections.abc import Callable

import jax
import numpy as np

from dinalrm_jax.config import (
    ExecutionConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    RewardModelConfig,
    SigmaConfig,
)
from dinalrm_jax.data.batch import PreferenceBatch, PromptEmbeds
from dinalrm_jax.reward_model import RewardModel, is_trainable, reward_functional, store
from dinalrm_jax.training.objectives import reward_objective
from dinalrm_jax.training.optimizer import make_optimizer
from dinalrm_jax.training.sharding import like_parameters, make_mesh, parameter_shardings, put_rows
from dinalrm_jax.training.step import TrainState, make_step

MODES = ("score", "ensemble", "gradient", "train")
LEVELS = {"ensemble": (0.2, 0.5, 0.7)}
SIGMA = 0.4


@dataclasses.dataclass(frozen=True)
class Work:
    """A compiled call and what is known of it before it runs.

    Attributes:
        call: does the work once and waits for it.
        trace_seconds, compile_seconds: what making it took.
        flops: XLA's count before optimisation; of a scan's body it counts one pass.
        temporary_bytes: what the program needs beside arguments and results, by XLA's plan.
    """

    call: Callable[[], object]
    trace_seconds: float
    compile_seconds: float
    flops: float
    temporary_bytes: int


def model_flops(config: RewardModelConfig, mode: str, rows: int, side: int, tokens: int) -> float:
    """The cost model's FLOPs of the blocks (method.md 8): a multiply-add is two, a backward pass as much as a forward.

    Args:
        rows: images, or pairs for "train".
        side: of the latents; tokens: of the prompt.
    """
    geometry = config.transformer
    width, image = geometry.inner_dim, (side // geometry.patch_size) ** 2
    both, total = image + tokens, 0
    for block in range(config.num_blocks):
        dual = block in geometry.dual_attention_layers
        total += 2 * width**2 * ((16 if dual else 12) * image + 12 * tokens)
        total += 4 * width * (both**2 + (image**2 if dual else 0))
    times = {"score": 1, "ensemble": len(LEVELS["ensemble"]), "gradient": 2, "train": 4}[mode]
    return float(rows * times * total)


def make_work(
    mode: str, config: RewardModelConfig, execution: ExecutionConfig, rows: int, side: int, tokens: int, merged: bool
) -> Work:
    """Builds and compiles one mode.

    score, ensemble: scores of `rows` images; gradient: that of their summed score in the latents; train: one
    optimizer step on `rows` pairs, both images in one batch, LoRA and head.

    Args:
        merged: add the adapters into the weights first; not for "train".
    """
    rng = np.random.default_rng(1)
    geometry = config.transformer
    latents = rng.standard_normal((rows, side, side, geometry.in_channels), np.float32)
    prompt = PromptEmbeds(
        rng.standard_normal((rows, tokens, geometry.joint_attention_dim), np.float32),
        rng.standard_normal((rows, geometry.pooled_projection_dim), np.float32),
    )
    params = reward_functional(config, execution).init(0)
    if mode == "train":
        return _train(config, execution, params, latents, prompt)
    model = RewardModel(config, store(params, execution), execution)
    del params
    if merged:
        model = model.merge_lora()
    reward = model.reward_fn(LEVELS.get(mode, SIGMA))
    if mode == "gradient":
        function = jax.jit(jax.grad(lambda x, params, prompt, key: reward(params, x, prompt, key).sum()))
        arguments = (latents, model.params, prompt, jax.random.key(0))
    else:
        function, arguments = jax.jit(reward), (model.params, latents, prompt, jax.random.key(0))
    arguments = jax.device_put(arguments)
    compiled, *known = _compile(function, arguments)
    return Work(lambda: jax.block_until_ready(compiled(*arguments)), *known)


def _train(config, execution, params, latents, prompt) -> Work:
    optimizer_config = OptimizerConfig(warmup_steps=0)
    optimizer = make_optimizer(optimizer_config, steps=1000)
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1))
    trained = {name: array for name, array in params.items() if is_trainable(name)}
    frozen = {name: array for name, array in params.items() if name not in trained}
    frozen = store(frozen, execution)
    del params
    shardings = parameter_shardings(trained, mesh)
    create = lambda params: TrainState.create(params, optimizer)  # noqa: E731
    state_shardings = like_parameters(jax.eval_shape(create, trained), shardings, mesh)
    state = jax.jit(create, out_shardings=state_shardings)(jax.device_put(trained, shardings))
    frozen = jax.device_put(frozen, parameter_shardings(frozen, mesh))
    del trained
    module = reward_functional(config, execution)
    objective = reward_objective(module, LossConfig(), SigmaConfig("constant", (SIGMA,)))
    frozen_shardings = {name: array.sharding for name, array in frozen.items()}
    step = make_step(objective, optimizer, optimizer_config, mesh, 0, state_shardings, frozen_shardings)
    batch = put_rows(PreferenceBatch(latents, 0.9 * latents, prompt), len(latents), mesh)
    with jax.set_mesh(mesh):
        compiled, *known = _compile(step, (state, frozen, batch))
    holder = [state]
    del state

    def call():
        holder[0], metrics = compiled(holder[0], frozen, batch)  # the old state is donated
        return jax.block_until_ready((holder[0], metrics))

    return Work(call, *known)


def _compile(function, arguments) -> tuple[jax.stages.Compiled, float, float, float, int]:
    start = time.perf_counter()
    lowered = function.lower(*arguments)
    traced = time.perf_counter()
    compiled = lowered.compile()
    ended = time.perf_counter()
    flops = float((lowered.cost_analysis() or {}).get("flops", 0.0))
    return compiled, traced - start, ended - traced, flops, compiled.memory_analysis().temp_size_in_bytes


def gemm_peak(dtype: str, rows: int, width: int, repeats: int = 5) -> float:
    """FLOP/s of the model's own largest products, (rows, D) x (4D, D) and back, every weight read from memory once.

    The best of `repeats` calls over four distinct pairs of weights, 75 MB each in float32.
    """
    key = jax.random.key(0)
    x = jax.random.normal(key, (rows, width), dtype)
    up = [jax.random.normal(key, (4 * width, width), dtype) for _ in range(4)]
    down = [jax.random.normal(key, (width, 4 * width), dtype) for _ in range(4)]

    @jax.jit
    def chain(x, up, down):
        contract = (((1,), (1,)), ((), ()))
        for a, b in zip(up, down):
            x = jax.lax.dot_general(jax.lax.dot_general(x, a, contract), b, contract) * width**-1.5
        return x

    jax.block_until_ready(chain(x, up, down))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(chain(x, up, down))
        seconds.append(time.perf_counter() - start)
    return 4 * 2 * 2 * rows * 4 * width**2 / min(seconds)
