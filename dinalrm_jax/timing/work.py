"""The work that `dinalrm_jax.benchmark` times: one call of each mode, at any size, with random weights."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dinalrm_jax.config import OptimizerConfig, StageConfig
from dinalrm_jax.devices.compilation import return_freed_memory
from dinalrm_jax.devices.mesh import MeshConfig, check_batch_size, make_mesh
from dinalrm_jax.devices.placement import place
from dinalrm_jax.devices.sharding import put_rows
from dinalrm_jax.encoders.clip import CLIPTextConfig, CLIPTextModel
from dinalrm_jax.encoders.prompt import CLIP_TOKENS, encode_ids
from dinalrm_jax.encoders.t5 import T5Config, T5Encoder
from dinalrm_jax.encoders.vae import AutoencoderKL, VAEConfig
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.batch import PreferenceBatch, PromptEmbeds
from dinalrm_jax.model.config import RewardModelConfig
from dinalrm_jax.model.execution import ExecutionConfig
from dinalrm_jax.model.lora import merge
from dinalrm_jax.model.parameters import Functional, Params, functional, split
from dinalrm_jax.model.reward import is_trainable, reward_functional, stored_shapes
from dinalrm_jax.noise import SigmaConfig
from dinalrm_jax.preference import LossConfig
from dinalrm_jax.reward_model import RewardModel
from dinalrm_jax.timing.setting import PASSES, Setting
from dinalrm_jax.training.objectives import reward_objective
from dinalrm_jax.training.step import assemble

SIGMA, ENSEMBLE = 0.4, (0.2, 0.5, 0.7)
# SD3.5's text encoders beside T5-XXL: CLIP ViT-L/14 and ViT-bigG/14.
CLIP_L = CLIPTextConfig(
    hidden_size=768, intermediate_size=3072, projection_dim=768, num_hidden_layers=12, num_attention_heads=12
)
CLIP_G = CLIPTextConfig(
    hidden_size=1280,
    intermediate_size=5120,
    projection_dim=1280,
    num_hidden_layers=32,
    num_attention_heads=20,
    hidden_act="gelu",
)


def model_of(setting: Setting) -> RewardModelConfig:
    """SD3.5-Medium's width, with the released taps as far as the blocks go."""
    taps = tuple(range(4, setting.blocks + 1, 4)) or (setting.blocks,)
    return RewardModelConfig(num_blocks=setting.blocks, visual_taps=taps, text_taps=taps)


@dataclasses.dataclass(frozen=True)
class Work:
    """A compiled call and what is known of it before it runs.

    Attributes:
        call: does the work once and waits for it.
        trace_seconds, compile_seconds: what making it took.
        flops, bytes_accessed: XLA's counts; the first before optimisation, and of a scan's body one pass.
        argument_bytes, temporary_bytes: what the program takes and needs beside it, by XLA's plan.
    """

    call: Callable[[], object]
    trace_seconds: float
    compile_seconds: float
    flops: float
    bytes_accessed: float
    argument_bytes: int
    temporary_bytes: int


def model_flops(config: RewardModelConfig, mode: str, rows: int, side: int, tokens: int) -> float:
    """The blocks' FLOPs by the family's cost model, for all passes of a mode.

    Args:
        rows: images, or pairs for "train".
        side: of the latents; tokens: of the prompt.
    """
    backbone = config.transformer
    image = backbone.latents.tokens(side, side)
    return float(rows * PASSES[mode] * backbone.flops(config.num_blocks, image, tokens))


def make_work(setting: Setting, config: RewardModelConfig | None = None) -> Work:
    """Builds and compiles one mode; `config` stands in for the full-size model.

    Raises:
        ConfigError: a mesh or a batch that does not fit.
    """
    if setting.mode == "text":
        return _text(setting)
    if setting.mode == "image":
        return _image(setting)
    config = config or model_of(setting)
    mesh = make_mesh(MeshConfig(setting.data, setting.fsdp, setting.tensor))
    check_batch_size("batch", setting.batch, 1, mesh)
    rng = np.random.default_rng(1)
    spec = config.transformer.latents
    side = setting.resolution // spec.downsampling
    latents = rng.standard_normal((setting.batch, side, side, spec.channels), np.float32)
    prompt = PromptEmbeds(
        rng.standard_normal((setting.batch, setting.tokens, spec.text_width), np.float32),
        rng.standard_normal((setting.batch, spec.pooled_width), np.float32),
    )
    with jax.set_mesh(mesh):
        if setting.mode == "train":
            return _train(setting, config, mesh, latents, prompt)
        return _reward(setting, config, mesh, latents, prompt)


def _reward(setting: Setting, config: RewardModelConfig, mesh: Mesh, latents, prompt) -> Work:
    params = random_params(config, setting.execution, mesh)
    if setting.merged:
        params, config = merge(params, config.lora), dataclasses.replace(config, lora=None)
    reward = RewardModel(config, params, setting.execution).reward_fn(ENSEMBLE if setting.mode == "ensemble" else SIGMA)
    latents, prompt = put_rows((latents, prompt), setting.batch, mesh)
    arguments = (latents, params, prompt, jax.random.key(0))
    if setting.mode == "gradient":
        function = jax.grad(lambda latents, *rest: reward(rest[0], latents, *rest[1:]).sum())
    else:
        function = lambda latents, *rest: reward(rest[0], latents, *rest[1:])  # noqa: E731
    return _compiled(function, arguments, mesh)


def _train(setting: Setting, config: RewardModelConfig, mesh: Mesh, latents, prompt) -> Work:
    stage = StageConfig(
        setting.batch, steps=1000, optimizer=OptimizerConfig(warmup_steps=0, ema_decay=0.0)
    )  # the original takes no average
    module = reward_functional(config, setting.execution)
    objective = reward_objective(module, LossConfig(), SigmaConfig("constant", (SIGMA,)))
    assembled = assemble(objective, *split(random_params(config, setting.execution, mesh), is_trainable), stage, mesh)
    batch = put_rows(PreferenceBatch(latents, 0.9 * latents, prompt), setting.batch, mesh)
    frozen, holder = assembled.frozen, [assembled.state]
    compiled, known = _compile(assembled.step, (assembled.state, frozen, batch))
    del assembled

    def call():
        with jax.set_mesh(mesh):
            holder[0], metrics = compiled(holder[0], frozen, batch)  # the old state is donated
        return jax.block_until_ready((holder[0], metrics))

    return Work(call, **known)


def _text(setting: Setting) -> Work:
    """All three encoders on random ids."""
    if setting.tokens <= CLIP_TOKENS:
        raise ConfigError(f"text tokens are {CLIP_TOKENS} of CLIP and T5's, got {setting.tokens} in all")
    modules: dict[str, Any] = {
        "clip_l": functional(lambda rngs: CLIPTextModel(CLIP_L, rngs=rngs)),
        "clip_g": functional(lambda rngs: CLIPTextModel(CLIP_G, rngs=rngs)),
        "t5": functional(lambda rngs: T5Encoder(T5Config(), rngs=rngs)),
    }
    params = {name: _random(module, setting.dtype) for name, module in modules.items()}
    rng = np.random.default_rng(1)
    lengths = (CLIP_TOKENS, CLIP_TOKENS, setting.tokens - CLIP_TOKENS)
    ids = [rng.integers(2, 32000, (setting.batch, length), np.int32) for length in lengths]
    return _compiled(
        functools.partial(encode_ids, modules["clip_l"], modules["clip_g"], modules["t5"], setting.dtype),
        (params, *ids),
    )


def _image(setting: Setting) -> Work:
    module = functional(lambda rngs: AutoencoderKL(VAEConfig(), rngs=rngs))
    pixels = np.random.default_rng(1).uniform(-1, 1, (setting.batch, setting.resolution, setting.resolution, 3))
    arguments = (_random(module, setting.dtype), jnp.asarray(pixels, setting.dtype))
    return _compiled(lambda params, pixels: module.bind(params).encode(pixels), arguments)


def random_params(config: RewardModelConfig, execution: ExecutionConfig, mesh: Mesh) -> Params:
    """A reward model's parameters on the mesh, drawn fast: enough to time with."""
    shapes = stored_shapes(config, execution)
    return _draw(shapes, reward_functional(config, execution).shardings(mesh))


def _random(module: Functional, dtype: str) -> Params:
    return _draw({name: jax.ShapeDtypeStruct(shape.shape, dtype) for name, shape in module.shapes.items()}, None)


def _draw(shapes: Mapping[str, jax.ShapeDtypeStruct], shardings) -> Params:
    """Vectors of ones, as norms have, and matrices that keep a token's size; one array at a time on the host."""
    numbers = np.random.default_rng(0).standard_normal(1 << 22, np.float32)
    params = {}
    for name, shape in shapes.items():
        scale = 1.0 if len(shape.shape) < 2 else np.prod(shape.shape[1:]) ** -0.5
        array = np.resize(numbers, shape.shape) * np.float32(scale) if scale != 1.0 else np.ones(shape.shape)
        params |= place({name: array}, shape.dtype, shardings)
    return params


def _compiled(function: Callable, arguments: tuple, mesh: Mesh | None = None) -> Work:
    compiled, known = _compile(jax.jit(function), arguments)

    def call():
        if mesh is None:
            return jax.block_until_ready(compiled(*arguments))
        with jax.set_mesh(mesh):
            return jax.block_until_ready(compiled(*arguments))

    return Work(call, **known)


def _compile(function, arguments) -> tuple[jax.stages.Compiled, dict[str, Any]]:
    start = time.perf_counter()
    lowered = function.lower(*arguments)
    traced = time.perf_counter()
    compiled = lowered.compile()
    ended = time.perf_counter()
    return_freed_memory()
    memory = compiled.memory_analysis()
    return compiled, {
        "trace_seconds": traced - start,
        "compile_seconds": ended - traced,
        "flops": float((lowered.cost_analysis() or {}).get("flops", 0.0)),
        "bytes_accessed": float((compiled.cost_analysis() or {}).get("bytes accessed", 0.0)),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
    }


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
