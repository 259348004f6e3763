"""The reward model: truncated backbone, LoRA and head as one module, and as a pure function of its parameters."""

import functools
from collections.abc import Callable, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float

from dinalrm_jax.devices.sharding import WHOLE, Rules, under
from dinalrm_jax.model.backbone.family import Features, family_of
from dinalrm_jax.model.batch import PromptEmbeds
from dinalrm_jax.model.config import RewardModelConfig
from dinalrm_jax.model.execution import Dtype, ExecutionConfig, Weights
from dinalrm_jax.model.head import RULES, HeadConfig, RewardHead
from dinalrm_jax.model.lora import add_lora
from dinalrm_jax.model.lrm import LRM_RULES, LRMHead, LRMHeadConfig
from dinalrm_jax.model.parameters import Functional, Params, functional
from dinalrm_jax.noise import AnyArray, add_noise, timestep


class RewardModule(nnx.Module):
    """Scores of noisy latents; `backbone`, `head` and, if configured, the logistic's `eta3`, `eta4`."""

    def __init__(self, config: RewardModelConfig, execution: ExecutionConfig, *, rngs: nnx.Rngs):
        self.config = config
        family = family_of(config.transformer)
        self.backbone = family.build(
            config.transformer, execution, num_blocks=config.num_blocks, zero_init=False, rngs=rngs
        )
        if config.lora is not None:
            add_lora(family.adapted(self.backbone, config.adapts_last_text), config.lora, rngs=rngs)
        self.head = _head(config, rngs)
        if config.logistic:
            self.eta3 = nnx.Param(jnp.zeros(()))
            self.eta4 = nnx.Param(jnp.full((), 0.15))

    def __call__(
        self,
        latents: Float[AnyArray, "b h w c"],
        prompt: PromptEmbeds,
        sigma: Float[AnyArray, " b"],
        eps: Float[AnyArray, "b h w c"],
    ) -> Float[Array, " b"]:
        """One noise level a row.

        Args:
            latents: (B, H, W, C) clean latents.
            prompt: B prompts.
            sigma: (B,) levels.
            eps: (B, H, W, C) standard normal noise.

        Returns:
            (B,) float32 scores.
        """
        return self.score_noisy(_noised(latents, sigma, eps), prompt, sigma)

    def score_noisy(
        self, noisy: Float[AnyArray, "b h w c"], prompt: PromptEmbeds, sigma: Float[AnyArray, " b"]
    ) -> Float[Array, " b"]:
        """Of latents that are noisy already, as a sampler has them at level `sigma`; (B,) float32 scores."""
        return self._squash(self.head.score(*self._tokens(noisy, prompt, sigma)))

    def ensemble(
        self,
        latents: Float[AnyArray, "b h w c"],
        prompt: PromptEmbeds,
        sigmas: Float[AnyArray, " k"] | Float[AnyArray, "k b"],
        eps: Float[AnyArray, "b h w c"],
    ) -> Float[Array, " b"]:
        """The token-level ensemble: the levels' tokens one after another, attended to once.

        All levels run as one vmapped pass; what does not depend on the level (the context
        embedder) is computed once.

        Args:
            latents, prompt, eps: as for a single level; every level uses the same eps.
            sigmas: (K,) levels, or (K, B).

        Returns:
            (B,) float32 scores.
        """
        sigmas = jnp.broadcast_to(sigmas.reshape(len(sigmas), -1), (len(sigmas), latents.shape[0]))
        image, text = jax.vmap(lambda sigma: self._tokens(_noised(latents, sigma, eps), prompt, sigma))(sigmas)
        return self._squash(self.head.score(_join_levels(image), None if text is None else _join_levels(text)))

    def score(
        self,
        latents: Float[AnyArray, "b h w c"],
        prompt: PromptEmbeds,
        levels: Float[AnyArray, ""] | Float[AnyArray, " k"],
        eps: Float[AnyArray, "b h w c"],
    ) -> Float[Array, " b"]:
        """A single level for all rows where `levels` is (), the ensemble where it is (K,)."""
        if levels.ndim == 0:
            return self(latents, prompt, jnp.broadcast_to(levels, latents.shape[0]), eps)
        return self.ensemble(latents, prompt, levels, eps)

    def features(self, latents: AnyArray, prompt: PromptEmbeds, sigma: AnyArray, eps: AnyArray) -> Features:
        """What the head sees of the noised latents, a row for every prompt that it has the backbone read; arguments as
        for a single level."""
        return self._features(_noised(latents, sigma, eps), prompt, sigma)

    def _features(self, noisy: AnyArray, prompt: PromptEmbeds, sigma: AnyArray) -> Features:
        config, prompts = self.config, self.head.prompts(prompt)
        copies = prompts.prompt_embeds.shape[0] // noisy.shape[0]
        noisy, sigma = (jnp.repeat(x, copies, axis=0) for x in (noisy, sigma))
        return self.backbone.features(
            noisy, timestep(sigma), prompts, visual_taps=config.visual_taps, text_taps=config.text_taps
        )

    def _tokens(self, noisy: AnyArray, prompt: PromptEmbeds, sigma: AnyArray) -> tuple[jax.Array, jax.Array | None]:
        return self.head.tokens(self._features(noisy, prompt, sigma), prompt)

    def _squash(self, score: jax.Array) -> jax.Array:
        """The optional logistic `(e1 - e2) / (1 + exp(-(r - e3) / (|e4| + 1e-6))) + e2`, e1 = 2, e2 = -2."""
        if not self.config.logistic:
            return score
        return 4 * jax.nn.sigmoid((score - self.eta3[...]) / (jnp.abs(self.eta4[...]) + 1e-6)) - 2


def _noised(latents: AnyArray, sigma: AnyArray, eps: AnyArray) -> jax.Array:
    return add_noise(latents.astype(jnp.float32), sigma, eps.astype(jnp.float32))


def _head(config: RewardModelConfig, rngs: nnx.Rngs) -> RewardHead | LRMHead:
    head, width, taps = config.head, config.transformer.width, len(config.visual_taps)
    if isinstance(head, LRMHeadConfig):
        spec = config.transformer.latents
        prompt = (config.encoders.tokens, spec.text_width), spec.pooled_width
        return LRMHead(head, width, taps, prompt, rngs=rngs)
    return RewardHead(cast(HeadConfig, head), width, taps, len(config.text_taps), rngs=rngs)


def _join_levels(tokens: jax.Array) -> jax.Array:
    levels, batch, length, width = tokens.shape
    return tokens.transpose(1, 0, 2, 3).reshape(batch, levels * length, width)


def is_trainable(name: str) -> bool:
    """Whether a parameter of `RewardModule` trains: adapters, head and logistic; the rest is frozen."""
    return not name.startswith("backbone.") or name.endswith((".lora_A", ".lora_B"))


@functools.lru_cache(maxsize=32)
def reward_functional(config: RewardModelConfig, execution: ExecutionConfig) -> Functional[RewardModule]:
    """`RewardModule` as a pure function of named parameters."""
    return functional(lambda rngs: RewardModule(config, execution, rngs=rngs), sharding_rules(config))


def sharding_rules(config: RewardModelConfig) -> Rules:
    """Where the parameters of a reward model lie on a mesh."""
    backbone = family_of(config.transformer).sharding
    return (*under("backbone", backbone), *under("head", (*RULES, *LRM_RULES)), (r"eta[34]", WHOLE))


def stored_dtype(name: str, execution: ExecutionConfig) -> str:
    """The dtype that a parameter is held in: a frozen one the compute dtype, a trainable one float32."""
    return "float32" if is_trainable(name) else execution.dtype


def store(params: Params, execution: ExecutionConfig) -> Params:
    """Parameters in the dtypes they are held in."""
    return {name: array.astype(stored_dtype(name, execution)) for name, array in params.items()}


def chosen_dtype(dtype: Weights, backbone: Params | None = None) -> Dtype:
    """The compute dtype; "auto" is what a backbone's arrays have or, without them, what this machine is best at."""
    if dtype not in ("auto", "int8"):
        return cast(Dtype, dtype)
    if backbone:
        return cast(Dtype, str(next(iter(backbone.values())).dtype))
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def stored_shapes(config: RewardModelConfig, execution: ExecutionConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """The parameters of a model without their arrays, as `store` leaves them."""
    return {
        name: jax.ShapeDtypeStruct(shape.shape, stored_dtype(name, execution))
        for name, shape in reward_functional(config, execution).shapes.items()
    }


def check_levels(sigma: float | Sequence[float]) -> np.ndarray:
    """A level as an array (), or those of an ensemble, (K,); raises ValueError unless they lie in [0, 1]."""
    levels = np.asarray(sigma, np.float32)
    if levels.ndim > 1 or not levels.size:
        raise ValueError(f"sigma must be a number or a non-empty sequence of numbers, got {sigma!r}")
    if not ((levels >= 0) & (levels <= 1)).all():
        raise ValueError(f"sigma must lie in [0, 1] (0 clean, 1 pure noise), got {sigma!r}")
    return levels


@functools.lru_cache(maxsize=32)
def jitted_score(config: RewardModelConfig, execution: ExecutionConfig) -> Callable[..., jax.Array]:
    """`RewardModule.score` of (params, latents, prompt, levels, eps), compiled once for each set of shapes."""
    module = reward_functional(config, execution)
    return jax.jit(lambda params, *inputs: module.bind(params).score(*inputs))
