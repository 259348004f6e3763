"""Which encoders a model's inputs come from; apart from the model's other configuration, as this needs no JAX."""

import dataclasses
from typing import Literal

from dinalrm_jax.mapping import ConfigError

CLIP_TOKENS = 77


@dataclasses.dataclass(frozen=True)
class EncodersConfig:
    """What makes a model's latents and prompt embeddings (`dinalrm_jax.encoders`).

    kind: sd3, the VAE and text encoders of the base model; tiny, built-in formulas without weights; or minilm, prompts
        by all-MiniLM-L6-v2, from its package.
    text_length: T5 tokens (DiNa-LRM: 128; diffusers' own default is 256), tokens of MiniLM, or words of "tiny".
    images: taesd3, in place of SD3's VAE, whose latent space it shares; where it is not given, the codec of `kind`.
    """

    kind: Literal["sd3", "tiny", "minilm"] = "sd3"
    text_length: int = 128
    images: Literal["taesd3"] | None = None

    def __post_init__(self):
        if self.text_length < 1:
            raise ConfigError(f"text_length must be at least 1, got {self.text_length}")
        if self.kind == "minilm" and self.images is None:
            raise ConfigError('minilm encodes prompts only; name what encodes images: images = "taesd3"')
        if self.kind == "tiny" and self.images is not None:
            raise ConfigError(f"images is {self.images!r}, but the tiny encoders have their own codec; leave it out")

    @property
    def tokens(self) -> int:
        """Of an encoded prompt: of SD3's, those of CLIP come first."""
        return self.text_length + (CLIP_TOKENS if self.kind == "sd3" else 0)
