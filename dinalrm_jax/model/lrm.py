"""The head of the Latent Reward Model (arXiv 2502.01051), on a flow-matching transformer: docs/lrm_lpo.md.

A score is the cosine of an image's and a prompt's feature. The image's is pooled from the backbone's tokens, which the
prompt conditions; visual feature enhancement takes it further away from what the backbone sees without the prompt.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike
from jaxtyping import Float

from dinalrm_jax.devices.sharding import WHOLE, Rules
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.backbone.family import Features
from dinalrm_jax.model.batch import PromptEmbeds
from dinalrm_jax.model.head import AnyHeadConfig
from dinalrm_jax.model.layers import Linear
from dinalrm_jax.noise import AnyArray

# Where its parameters lie on a mesh.
LRM_RULES: Rules = (
    (r"(?:visual|text)_projection\.weight", P(None, "fsdp")),
    (r"log_scale|unconditional_.*", WHOLE),
)
SCALE = 1 / 0.07  # of the cosine, at the start


@dataclasses.dataclass(frozen=True)
class LRMHeadConfig(AnyHeadConfig):
    """The Latent Reward Model's head.

    width: of the features that are compared; None means the backbone's.
    guidance: how far the deepest tap's feature is taken from the unconditional one's (visual feature enhancement);
        1: it is not, and the backbone runs once instead of twice.
    """

    kind = "lrm"
    width: int | None = None
    guidance: float = 7.5

    def __post_init__(self):
        if self.guidance < 1:
            raise ConfigError(f"guidance must be at least 1, which enhances nothing, got {self.guidance}")


class LRMHead(nnx.Module):
    """From pooled taps and the pooled prompt to `exp(tau) cos(W_v image, W_t text)`.

    `unconditional_embeds` (1, T, D) and `unconditional_pooled` (1, P) begin as the encoding of the empty prompt
    (`training.run_weights.empty_prompt`) and train: LRM trains the text encoders, which here are frozen. They belong to
    the checkpoint, so that nothing that scores needs the text encoders for them.

    Args:
        config: width and guidance.
        token_dim: of the backbone's tokens.
        visual_taps: how many.
        prompt: shapes (T, D) and (P,) of an encoded prompt.
    """

    def __init__(
        self,
        config: LRMHeadConfig,
        token_dim: int,
        visual_taps: int,
        prompt: tuple[tuple[int, int], int],
        *,
        rngs: nnx.Rngs,
    ):
        (length, text_width), pooled_width = prompt
        width, normal = config.width or token_dim, jax.nn.initializers.normal(0.02)

        def projection(inputs):
            return Linear(inputs, width, rngs=rngs, kernel_init=normal, use_bias=False)

        self.guidance = config.guidance
        self.visual_projection = projection(visual_taps * token_dim)
        self.text_projection = projection(pooled_width)
        self.log_scale = nnx.Param(jnp.full((), math.log(SCALE)))
        if config.guidance > 1:
            self.unconditional_embeds = nnx.Param(jnp.zeros((1, length, text_width)))
            self.unconditional_pooled = nnx.Param(jnp.zeros((1, pooled_width)))

    def prompts(self, prompt: PromptEmbeds) -> PromptEmbeds:
        """What the backbone reads: the B prompts, each followed by the empty one where features are enhanced.

        Raises:
            ValueError: prompts of another length than the empty one's.
        """
        if self.guidance == 1:
            return prompt
        empty = PromptEmbeds(self.unconditional_embeds[...], self.unconditional_pooled[...])
        lengths = prompt.prompt_embeds.shape[1], empty.prompt_embeds.shape[1]
        if lengths[0] != lengths[1]:
            raise ValueError(
                f"this model's empty prompt has {lengths[1]} tokens, the prompts have {lengths[0]}; encode them with "
                "the model's own text length (config.encoders.text_length)"
            )

        def both(given: AnyArray, one: jax.Array) -> jax.Array:
            # In the trained one's dtype: float16, which records hold, would round its gradient.
            stacked = jnp.stack([given.astype(one.dtype), jnp.broadcast_to(one, given.shape)], axis=1)
            return stacked.reshape(-1, *given.shape[1:])  # devices that split the rows have nothing to exchange

        return jax.tree.map(both, prompt, empty)

    def tokens(self, features: Features, prompt: PromptEmbeds) -> tuple[jax.Array, jax.Array]:
        """One level's features -> (B, 1, taps x D) image and (B, 1, P) prompt, float32."""
        pooled = [tap.astype(jnp.float32).mean(axis=1) for tap in features.visual]
        if self.guidance > 1:
            shallow, deepest = [tap[::2] for tap in pooled[:-1]], pooled[-1]
            pooled = [*shallow, enhanced(deepest[::2], deepest[1::2], self.guidance)]
        image = jnp.concatenate(pooled, axis=-1)
        return image[:, None], jnp.asarray(prompt.pooled_prompt_embeds, jnp.float32)[:, None]

    @jax.default_matmul_precision("highest")
    def score(self, image: Float[Array, "b n d"], text: Float[Array, "b n p"]) -> Float[Array, " b"]:
        """(B, K, taps x D), (B, K, P) of K levels, whose mean counts -> (B,) float32 scores."""
        return cosine_score(
            self.visual_projection(image.mean(axis=1)),
            self.text_projection(text.mean(axis=1)),
            jnp.exp(self.log_scale[...]),
        )


def enhanced(conditional: Float[Array, "b d"], unconditional: Float[Array, "b d"], guidance: float) -> jax.Array:
    """Visual feature enhancement, `u + guidance (c - u)`."""
    return unconditional + guidance * (conditional - unconditional)


def cosine_score(
    image: Float[AnyArray, "b d"], text: Float[AnyArray, "b d"], scale: Float[ArrayLike, ""]
) -> Float[Array, " b"]:
    """(B,) `scale cos(image, text)`; 0 where one of them is zero."""

    def unit(x: AnyArray) -> jax.Array:
        square = jnp.square(x).sum(axis=-1, keepdims=True)
        return jnp.asarray(x) * jax.lax.rsqrt(jnp.where(square > 0, square, 1.0))

    return jnp.asarray(scale) * (unit(image) * unit(text)).sum(axis=-1)
