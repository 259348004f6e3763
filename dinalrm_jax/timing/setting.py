"""What `dinalrm_jax.benchmark` times."""

import dataclasses
from typing import Literal

from dinalrm_jax.mapping import ConfigError, at_least
from dinalrm_jax.model.execution import AttentionImplementation, Dtype, ExecutionConfig, Layers, Remat

# How often the blocks' forward FLOPs are done for one image or pair: a backward pass takes as many as a forward.
PASSES = {"score": 1, "ensemble": 3, "gradient": 2, "train": 4}
# Of the whole generator; compiled ahead, not timed.
GENERATION = ("generate", "refl", "refl_pixels")
MODEL_OPTIONS = ("attention", "layers", "remat", "merged", "data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is timed.

    mode: What to time: scores of images (score, ensemble), the gradient of their sum in the latents (gradient), one
        optimizer step on pairs (train), prompts to embeddings (text), pixels to latents (image) and back (decode),
        or loading a checkpoint from disk (load). Compiled ahead only: a rollout of the whole generator with guidance
        (generate), and a step of ReFL on it by the reward of latents (refl) or by VAE and CLIP-H (refl_pixels).
    resolution: Side of an image in pixels, a multiple of 16.
    batch: How many images there are in a call; pairs for train, prompts for text.
    tokens: Text tokens of a prompt: 77 are CLIP's, the rest are T5's.
    blocks: Blocks of the backbone, up to 24.
    dtype: Compute dtype; with load, the dtype that weights are loaded to.
    attention: Which implementation of attention runs.
    layers: How the blocks run: one after another in the program (loop), or as the body of a loop (scan).
    remat: What a block keeps for its backward pass: everything (none), matrix products (dots), its
        inputs and what its attention gives (attention) or its inputs (block).
    merged: Add LoRA into the weights first; train has no such mode.
    data: Devices that split the batch; XLA_FLAGS=--xla_force_host_platform_device_count=8 makes eight of a CPU.
    fsdp: Devices that split the batch, and hold a part of the parameters each.
    tensor: Devices that split heads and hidden units.
    """

    mode: Literal[
        "score", "ensemble", "gradient", "train", "text", "image", "decode", "load", "generate", "refl", "refl_pixels"
    ] = "score"
    resolution: int = 256
    batch: int = 1
    tokens: int = 205
    blocks: int = 12
    dtype: Dtype = ExecutionConfig.dtype
    attention: AttentionImplementation = ExecutionConfig.attention
    layers: Layers = ExecutionConfig.layers
    remat: Remat = ExecutionConfig.remat
    merged: bool = False
    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        at_least(self, 1, ("batch", "tokens", "blocks", "data", "fsdp", "tensor"))
        if self.blocks > 24:
            raise ConfigError(f"the backbone has 24 blocks, got blocks {self.blocks}")
        if self.mode not in (*PASSES, *GENERATION):
            defaults = {field.name: field.default for field in dataclasses.fields(self)}
            ignored = [name for name in MODEL_OPTIONS if getattr(self, name) != defaults[name]]
            if ignored:
                raise ConfigError(f"mode {self.mode} does not take {', '.join(ignored)}, of the reward model")
        if self.resolution < 16 or self.resolution % 16:
            raise ConfigError(f"resolution must be a multiple of 16 pixels, got {self.resolution}")
        if self.merged and self.mode in ("train", "refl", "refl_pixels"):
            raise ConfigError(f"merged: LoRA is what {self.mode} trains")
        if self.merged and self.mode == "generate":
            raise ConfigError("merged: generate has no LoRA")

    @property
    def execution(self) -> ExecutionConfig:
        return ExecutionConfig(self.dtype, self.attention, self.layers, self.remat)
