"""What flows between the stages: frozen pytree dataclasses that validate themselves.

Arrays are channels last. The axes of annotations, here and everywhere (`Float[Array, "b h w c"]`, by jaxtyping, which
the tests check): b rows, k noise levels, n image tokens, t text tokens, d width of a token, h and w sides of a latent,
c its channels, p width of a pooled prompt, q queries, heads and e of an attention. In prose: B, H x W, C, T, D.
"""

import dataclasses
import typing

import jax
import jax.export
from jaxtyping import Float

from dinalrm_jax.noise import AnyArray


@typing.dataclass_transform(frozen_default=True)
def _pytree(cls):
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@_pytree
class PromptEmbeds:
    """A batch of encoded prompts.

    Attributes:
        prompt_embeds: (B, T, D) token embeddings (SD3.5: 77 CLIP tokens, then T5's; D = 4096).
        pooled_prompt_embeds: (B, P) pooled embeddings (SD3.5: CLIP-L, then CLIP-G; P = 2048).
    """

    prompt_embeds: Float[AnyArray, "b t d"]
    pooled_prompt_embeds: Float[AnyArray, "b p"]

    def __getitem__(self, rows) -> "PromptEmbeds":
        return jax.tree.map(lambda array: array[rows], self)

    def validate(self, rows: int, width: int, pooled_width: int) -> None:
        """Raises ValueError unless this holds `rows` prompts of the model's embedding widths."""
        tokens, pooled = self.prompt_embeds.shape, self.pooled_prompt_embeds.shape
        if len(tokens) != 3 or tokens[-1] != width:
            raise ValueError(f"prompt_embeds must be (batch, tokens, {width}), got {tokens}")
        if len(pooled) != 2 or pooled[-1] != pooled_width:
            raise ValueError(f"pooled_prompt_embeds must be (batch, {pooled_width}), got {pooled}")
        if tokens[0] != rows or pooled[0] != rows:
            raise ValueError(
                f"{rows} latents but {tokens[0]} rows of prompt_embeds and {pooled[0]} of pooled_prompt_embeds; "
                "give one prompt per image (repeat a shared prompt)"
            )


# For `jax.export` of functions that take prompts.
jax.export.register_pytree_node_serialization(
    PromptEmbeds,
    serialized_name="dinalrm_jax.PromptEmbeds",
    serialize_auxdata=lambda aux: b"",
    deserialize_auxdata=lambda data: (),
)


@_pytree
class PreferenceBatch:
    """Pairs of clean latents under one prompt.

    Attributes:
        chosen, rejected: (B, H, W, C) clean, scaled latents; `chosen` is the preferred one.
        prompt: the B prompts.
        label: (B,) the probability that `chosen` is preferred; None: 1.
        weight: (B,) what a pair's loss is multiplied by; None: 1.
    """

    chosen: Float[AnyArray, "b h w c"]
    rejected: Float[AnyArray, "b h w c"]
    prompt: PromptEmbeds
    label: Float[AnyArray, " b"] | None = None
    weight: Float[AnyArray, " b"] | None = None

    @property
    def certainty(self) -> Float[AnyArray, " b"] | float:
        """`label`, or 1 for all."""
        return 1.0 if self.label is None else self.label
