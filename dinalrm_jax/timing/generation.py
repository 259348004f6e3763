"""Programs of a generator at full size, over shapes alone: sampling, and a step of ReFL by either kind of reward."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dinalrm_jax.alignment.opened import DECODER, TOKEN_IDS, names_in
from dinalrm_jax.alignment.policy import POLICY, REWARD, Policy, PromptBatch
from dinalrm_jax.alignment.refl import refl
from dinalrm_jax.alignment.rewards import JudgeReward, LatentReward, Reward, Rewards
from dinalrm_jax.config import OptimizerConfig, ReFLConfig, StageConfig
from dinalrm_jax.devices.mesh import check_batch_size
from dinalrm_jax.devices.sharding import row_sharded
from dinalrm_jax.encoders.clip import CLIPTextConfig
from dinalrm_jax.encoders.clip_pair import CLIPConfig, CLIPModel, CLIPVisionConfig
from dinalrm_jax.encoders.load import to_unit_range
from dinalrm_jax.encoders.vae import AutoencoderKL, VAEConfig
from dinalrm_jax.evaluation.judges.clip import TOKENS, judge_score
from dinalrm_jax.generator import sampler
from dinalrm_jax.model.backbone.family import transformer_functional
from dinalrm_jax.model.batch import PromptEmbeds
from dinalrm_jax.model.config import LoRAConfig, RewardModelConfig
from dinalrm_jax.model.parameters import Functional, functional, split
from dinalrm_jax.model.reward import is_trainable, stored_shapes
from dinalrm_jax.reward_model import RewardModel
from dinalrm_jax.timing.programs import Program, model_of, whole_on_every_device
from dinalrm_jax.timing.setting import Setting
from dinalrm_jax.training.step import assemble
from dinalrm_jax.weights.pretrained import truncate

GUIDANCE, STEPS, SHIFT = 4.5, 28, 3.0
LORA = LoRAConfig(rank=32, alpha=64.0)  # of the published recipes
# The towers of HPSv2.1: open_clip's ViT-H-14.
CLIP_H = CLIPConfig(
    CLIPTextConfig(
        hidden_size=1024, intermediate_size=4096, projection_dim=1024, num_hidden_layers=24, num_attention_heads=16,
        hidden_act="gelu",
    ),
    CLIPVisionConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14,
        hidden_act="gelu",
    ),
    projection_dim=1024,
    fit="pad",
)  # fmt: skip


def generation_program(setting: Setting, mesh: Mesh) -> Program:
    """The program of "generate", "refl" or "refl_pixels" over shapes.

    Raises:
        ConfigError: a batch that the mesh does not divide.
    """
    check_batch_size("batch", setting.batch, 1, mesh)
    return _sampling(setting, mesh) if setting.mode == "generate" else _refl(setting, mesh)


def _sampling(setting: Setting, mesh: Mesh) -> Program:
    """A whole rollout with guidance, its prompts encoded."""
    config = model_of(setting).transformer
    params = _stored(transformer_functional(config, setting.execution), setting, mesh)
    sigmas = whole_on_every_device((STEPS + 1,), jnp.float32, mesh)
    arguments = (params, _latents(setting, mesh), _prompt(setting, mesh), _prompt(setting, mesh), sigmas)
    return Program(sampler(config, setting.execution, GUIDANCE), arguments, mesh)


def _refl(setting: Setting, mesh: Mesh) -> Program:
    """A step of ReFL on the whole transformer with adapters; the reward reads latents, or the decoded pixels."""
    config = model_of(setting)
    tuned = transformer_functional(config.transformer, setting.execution, lora=LORA)
    policy = Policy(
        tuned, transformer_functional(config.transformer, setting.execution), _latents(setting, mesh).shape[1:], SHIFT
    )
    adapters, base = split(_stored(tuned, setting, mesh), lambda name: ".lora_" in name)
    reward, own = _of_latents(setting, config, base, mesh) if setting.mode == "refl" else _of_pixels(setting, mesh)
    frozen = {f"{POLICY}{name}": x for name, x in base.items()} | own
    adapters = {f"{POLICY}{name}": x for name, x in adapters.items()}
    stage = StageConfig(setting.batch, steps=1000, optimizer=OptimizerConfig(warmup_steps=0, ema_decay=0.0))
    rewards = Rewards({"reward": (reward, 1.0)})
    assembled = assemble(refl(policy, rewards, ReFLConfig(), 0.0), adapters, frozen, stage, mesh)
    prompt = _prompt(setting, mesh)
    batch = PromptBatch(prompt, prompt, prompt, _rows((setting.batch,), jnp.int32, mesh))
    return Program(assembled.step, (assembled.state, assembled.frozen, batch), mesh, carries=True)


def _of_latents(
    setting: Setting, config: RewardModelConfig, base: dict[str, Any], mesh: Mesh
) -> tuple[Reward, dict[str, Any]]:
    """The reward model on the policy's own first blocks."""
    own, _ = split(stored_shapes(config, setting.execution), is_trainable)
    own = {name: whole_on_every_device(shape.shape, shape.dtype, mesh) for name, shape in own.items()}
    names = names_in(truncate(base, config) | own, base, f"{REWARD}0.")
    reward = LatentReward(RewardModel(config, {}, setting.execution), names, (0.4,))
    return reward, {names[name]: shape for name, shape in own.items()}


def _of_pixels(setting: Setting, mesh: Mesh) -> tuple[Reward, dict[str, Any]]:
    """SD3's VAE and CLIP-H, as HPSv2.1 scores."""
    vae = functional(lambda rngs: AutoencoderKL(VAEConfig(), rngs=rngs))
    clip = functional(lambda rngs: CLIPModel(CLIP_H, rngs=rngs))
    prefix, ids = f"{REWARD}0.", f"{TOKEN_IDS}{REWARD}0."
    named = {f"{DECODER}{name}": shape for name, shape in vae.shapes.items()}
    named |= {f"{prefix}{name}": shape for name, shape in clip.shapes.items()}
    own = {name: whole_on_every_device(shape.shape, setting.dtype, mesh) for name, shape in named.items()}
    own[ids] = whole_on_every_device((1000, TOKENS), jnp.int32, mesh)

    def decode(params, latents):
        return to_unit_range(vae.bind(params).decode(latents))

    score = functools.partial(judge_score, "hpsv2", clip, None)
    return JudgeReward(decode, score, ids, DECODER, prefix, setting.dtype), own


def _stored(module: Functional, setting: Setting, mesh: Mesh) -> dict[str, Any]:
    """A transformer's parameters as a run has them: adapters in float32, the others in the compute dtype."""
    shardings = module.shardings(mesh)
    return {
        name: jax.ShapeDtypeStruct(
            shape.shape, jnp.float32 if ".lora_" in name else setting.dtype, sharding=shardings[name]
        )
        for name, shape in module.shapes.items()
    }


def _rows(shape: tuple[int, ...], dtype, mesh: Mesh) -> Any:
    return row_sharded(shape, dtype, mesh)


def _latents(setting: Setting, mesh: Mesh) -> Any:
    spec = model_of(setting).transformer.latents
    side = setting.resolution // spec.downsampling
    return _rows((setting.batch, side, side, spec.channels), jnp.float32, mesh)


def _prompt(setting: Setting, mesh: Mesh) -> PromptEmbeds:
    spec = model_of(setting).transformer.latents
    return PromptEmbeds(
        _rows((setting.batch, setting.tokens, spec.text_width), jnp.float16, mesh),
        _rows((setting.batch, spec.pooled_width), jnp.float16, mesh),
    )
