"""Which encoders a model's inputs come from; apart from the model's other configuration, as this needs no JAX."""

import dataclasses
from typing import Literal

from dinalrm_jax.mapping import ConfigError

CLIP_TOKENS = 77


@dataclasses.dataclass(frozen=True)
class EncodersConfig:
    """What makes a model's latents and prompt embeddings (`dinalrm_jax.encoders`).

    kind: "sd3" for the VAE and text encoders of an SD3 pipeline, "tiny" for the built-in formulas.
    text_length: T5 tokens (DiNa-LRM: 128; diffusers' own default is 256); words for "tiny".
    """

    kind: Literal["sd3", "tiny"] = "sd3"
    text_length: int = 128

    def __post_init__(self):
        if self.text_length < 1:
            raise ConfigError(f"text_length must be at least 1, got {self.text_length}")

    @property
    def tokens(self) -> int:
        """Of an encoded prompt: of SD3's, those of CLIP come first."""
        return self.text_length + (CLIP_TOKENS if self.kind == "sd3" else 0)
