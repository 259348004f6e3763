"""What a reward model is: backbone, taps, adapters, head and the encoders that its inputs come from."""

import dataclasses

from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.backbone.family import BackboneConfig
from dinalrm_jax.model.backbone.sd3.config import SD3Config
from dinalrm_jax.model.encoding import EncodersConfig
from dinalrm_jax.model.head import AnyHeadConfig, HeadConfig
from dinalrm_jax.model.lora import LoRAConfig
from dinalrm_jax.model.lrm import LRMHeadConfig


@dataclasses.dataclass(frozen=True)
class RewardModelConfig:
    """A truncated backbone, its taps, adapters and head. The defaults are the published model.

    A tap `i` is the stream after block `i`; 0 is the embedded input.
    """

    transformer: BackboneConfig = SD3Config()
    num_blocks: int = 12
    visual_taps: tuple[int, ...] = (4, 8, 12)
    text_taps: tuple[int, ...] = (4, 8, 12)
    lora: LoRAConfig | None = LoRAConfig()
    head: AnyHeadConfig = HeadConfig()
    logistic: bool = False
    encoders: EncodersConfig = EncodersConfig()

    def __post_init__(self):
        if not 1 <= self.num_blocks <= self.transformer.num_layers:
            raise ConfigError(f"num_blocks must be in 1..{self.transformer.num_layers}, got {self.num_blocks}")
        if not self.visual_taps:
            raise ConfigError("visual_taps is empty: the head needs at least one image tap")
        for name in ("visual_taps", "text_taps"):
            taps = getattr(self, name)
            if list(taps) != sorted(set(taps)) or any(not 0 <= tap <= self.num_blocks for tap in taps):
                raise ConfigError(f"{name} must be increasing numbers in 0..{self.num_blocks}, got {taps}")
        deepest = self.transformer.deepest_text_tap
        if deepest is None and self.text_taps:
            raise ConfigError(f"text_taps is {self.text_taps}, but this backbone has no text stream; leave it empty")
        if self.text_taps and self.text_taps[-1] > deepest:
            raise ConfigError(
                f"text_taps names layer {self.text_taps[-1]}, after which the transformer has no text stream; tap at "
                f"most {deepest}"
            )
        if isinstance(self.head, HeadConfig) and self.head_width % self.head.num_attn_heads:
            raise ConfigError(f"head width {self.head_width} is not divisible by {self.head.num_attn_heads} heads")
        if isinstance(self.head, LRMHeadConfig) and self.text_taps:
            raise ConfigError(f"text_taps is {self.text_taps}, but the lrm head reads no text stream; leave it empty")

    @property
    def head_width(self) -> int:
        return self.head.width or self.transformer.width

    @property
    def only_tokens(self) -> int | None:
        """How many tokens a prompt must have; None: any number."""
        return self.encoders.tokens if isinstance(self.head, LRMHeadConfig) and self.head.guidance > 1 else None

    @property
    def adapts_last_text(self) -> bool:
        """Whether the last kept block's text-side projections have adapters.

        The released code leaves them out unless that block's text stream is tapped: nothing else reads it.
        """
        return self.text_taps[-1:] == (self.num_blocks,)
