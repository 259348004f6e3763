"""The programs that `dinalrm_jax.benchmark` times or compiles, at any size: over arrays, or over their shapes alone."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from dinalrm_jax.config import OptimizerConfig, StageConfig
from dinalrm_jax.devices.mesh import check_batch_size
from dinalrm_jax.devices.sharding import WHOLE, row_sharded
from dinalrm_jax.encoders.clip import CLIPTextConfig, CLIPTextModel
from dinalrm_jax.encoders.prompt import encode_ids
from dinalrm_jax.encoders.t5 import T5Config, T5Encoder
from dinalrm_jax.encoders.vae import AutoencoderKL, VAEConfig
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.batch import PreferenceBatch, PromptEmbeds
from dinalrm_jax.model.config import RewardModelConfig
from dinalrm_jax.model.encoding import CLIP_TOKENS
from dinalrm_jax.model.lora import merge
from dinalrm_jax.model.parameters import Functional, functional, split
from dinalrm_jax.model.reward import is_trainable, reward_functional, stored_shapes
from dinalrm_jax.noise import SigmaConfig, seed_key
from dinalrm_jax.preference import LossConfig
from dinalrm_jax.reward_model import RewardModel
from dinalrm_jax.timing.setting import PASSES, Setting
from dinalrm_jax.training.objectives import reward_objective
from dinalrm_jax.training.step import assemble

SIGMA, ENSEMBLE = 0.4, (0.2, 0.5, 0.7)
VAE_BLOCK = 8  # pixels along a side of one latent
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
class Program:
    """What is compiled.

    Attributes:
        step: a jitted function.
        arguments: arrays, or shapes that say where arrays would lie.
        mesh: that it is traced, and called, under.
        carries: the first result is the next call's first argument, which is donated.
    """

    step: jax.stages.Wrapped
    arguments: tuple
    mesh: Mesh
    carries: bool = False

    def lower(self) -> jax.stages.Lowered:
        with jax.set_mesh(self.mesh):
            return self.step.lower(*self.arguments)


def shapes_of(setting: Setting, config: RewardModelConfig, mesh: Mesh) -> tuple:
    """(parameters, latents, prompt) of a reward model on the mesh, without arrays.

    Raises:
        ConfigError: a batch that the mesh does not divide.
    """
    check_batch_size("batch", setting.batch, 1, mesh)
    shardings = reward_functional(config, setting.execution).shardings(mesh)
    params = {
        name: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=shardings[name])
        for name, shape in stored_shapes(config, setting.execution).items()
    }
    spec, side = config.transformer.latents, setting.resolution // config.transformer.latents.downsampling
    rows: Any = functools.partial(row_sharded, dtype=jnp.float32, mesh=mesh)
    prompt = PromptEmbeds(
        rows((setting.batch, setting.tokens, spec.text_width)), rows((setting.batch, spec.pooled_width))
    )
    return params, rows((setting.batch, side, side, spec.channels)), prompt


def program_of(setting: Setting, config: RewardModelConfig, mesh: Mesh, inputs: tuple) -> Program:
    """The program of a mode of the reward model, over inputs like those of `shapes_of`, or arrays in their place."""
    params, latents, prompt = inputs
    if setting.mode == "train":
        stage = StageConfig(
            setting.batch, steps=1000, optimizer=OptimizerConfig(warmup_steps=0, ema_decay=0.0)
        )  # the original takes no average
        module = reward_functional(config, setting.execution)
        objective = reward_objective(module, LossConfig(), SigmaConfig("constant", (SIGMA,)))
        assembled = assemble(objective, *split(params, is_trainable), stage, mesh)
        batch = PreferenceBatch(latents, latents, prompt)
        return Program(assembled.step, (assembled.state, assembled.frozen, batch), mesh, carries=True)
    if setting.merged:
        params, config = _merged(params, config), dataclasses.replace(config, lora=None)
    reward = RewardModel(config, params, setting.execution).reward_fn(ENSEMBLE if setting.mode == "ensemble" else SIGMA)

    def score(latents, params, prompt, key):
        return reward(params, latents, prompt, key)

    derived = jax.grad(lambda *arguments: score(*arguments).sum())
    function = derived if setting.mode == "gradient" else score
    return Program(jax.jit(function), (latents, params, prompt, seed_key(0)), mesh)


def _merged(params: dict[str, Any], config: RewardModelConfig) -> dict[str, Any]:
    if isinstance(next(iter(params.values())), jax.Array):
        return merge(params, config.lora)
    shapes = jax.eval_shape(lambda params: merge(params, config.lora), params)
    return {
        name: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=params[name].sharding)
        for name, shape in shapes.items()
    }


def encoder_shapes(setting: Setting, mesh: Mesh) -> tuple:
    """(parameters, ids, pixels or latents) of encoders and decoder, without arrays, whole on every device."""
    if setting.mode == "decode":
        side = setting.resolution // VAE_BLOCK
        return _shapes(_vae(), setting, mesh), whole_on_every_device(
            (setting.batch, side, side, VAEConfig.latent_channels), setting.dtype, mesh
        )
    if setting.mode == "image":
        shape = (setting.batch, setting.resolution, setting.resolution, 3)
        return _shapes(_vae(), setting, mesh), whole_on_every_device(shape, setting.dtype, mesh)
    if setting.tokens <= CLIP_TOKENS:
        raise ConfigError(f"text tokens are {CLIP_TOKENS} of CLIP and T5's, got {setting.tokens} in all")
    lengths = (CLIP_TOKENS, CLIP_TOKENS, setting.tokens - CLIP_TOKENS)
    ids = tuple(whole_on_every_device((setting.batch, length), jnp.int32, mesh) for length in lengths)
    return {name: _shapes(module, setting, mesh) for name, module in _text_modules().items()}, ids


def encoder_program(setting: Setting, mesh: Mesh, inputs: tuple) -> Program:
    """The encoders of prompts or images, or the decoder, over inputs like those of `encoder_shapes`."""
    params, data = inputs
    if setting.mode == "decode":
        decoder = _vae()
        return Program(jax.jit(lambda params, latents: decoder.bind(params).decode(latents)), (params, data), mesh)
    if setting.mode == "image":
        module = _vae()
        return Program(jax.jit(lambda params, pixels: module.bind(params).encode(pixels)), (params, data), mesh)
    clip_l, clip_g, t5 = _text_modules().values()
    encode = functools.partial(encode_ids, clip_l, clip_g, t5, setting.dtype)
    return Program(jax.jit(lambda params, ids: encode(params, *ids)), (params, data), mesh)


def _text_modules() -> dict[str, Functional]:
    return {
        "clip_l": functional(lambda rngs: CLIPTextModel(CLIP_L, rngs=rngs)),
        "clip_g": functional(lambda rngs: CLIPTextModel(CLIP_G, rngs=rngs)),
        "t5": functional(lambda rngs: T5Encoder(T5Config(), rngs=rngs)),
    }


def _vae() -> Functional:
    return functional(lambda rngs: AutoencoderKL(VAEConfig(), rngs=rngs))


def _shapes(module: Functional, setting: Setting, mesh: Mesh) -> dict[str, Any]:
    return {name: whole_on_every_device(shape.shape, setting.dtype, mesh) for name, shape in module.shapes.items()}


def whole_on_every_device(shape: tuple[int, ...], dtype, mesh: Mesh) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, WHOLE))


def model_flops(config: RewardModelConfig, mode: str, rows: int, side: int, tokens: int) -> float:
    """The blocks' FLOPs by the family's cost model, for all passes of a mode.

    Args:
        rows: images, or pairs for "train".
        side: of the latents; tokens: of the prompt.
    """
    backbone = config.transformer
    image = backbone.latents.tokens(side, side)
    return float(rows * PASSES[mode] * backbone.flops(config.num_blocks, image, tokens))
