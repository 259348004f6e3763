"""How datasets become records, and how records are mixed."""

import dataclasses
from typing import Literal

from dinalrm_jax.data.buckets import BUCKETS, bucket_name, parse_bucket
from dinalrm_jax.data.names import Dataset
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.encoding import EncodersConfig


@dataclasses.dataclass(frozen=True)
class PreparationConfig:
    """How a preference dataset becomes records (`dinalrm_jax.data.preparation`).

    dataset: the source's format; "dinalrm" holds latents, the others images.
    encoders: what makes latents and embeddings.
    text_dtype: compute dtype of the text encoders; the VAE computes in float32, on every backend.
    buckets: image sizes, height x width in pixels; the defaults are the paper's.
    fit: "stretch" resizes an image to a bucket whose log aspect is within `aspect_tolerance` and
        drops it where there is none (the paper's way); "crop" cuts it at the centre to the nearest.
    min_area: pixels below which an image is dropped.
    min_vote_share, min_confidence: `data.preferences.select`.
    max_rows_per_prompt: keep at most so many training rows of one prompt (released: 8); 0: all.
    holdout: prompts to hold out where the source has no split of its own.
    benchmark_split: of GenAI-Bench, "test" or "test_v1".
    eval_pairs: keep at most so many held-out pairs; 0: all.
    seed: of what is picked at random.
    images_per_shard, prompts_per_shard: what a killed run can lose of each process's work.
    batch_size, prompt_batch_size: of the encoders.
    threads: that read and decode images; changes no byte.
    """

    dataset: Dataset
    encoders: EncodersConfig = EncodersConfig()
    text_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    buckets: tuple[str, ...] = tuple(map(bucket_name, BUCKETS))
    fit: Literal["stretch", "crop"] = "stretch"
    aspect_tolerance: float = 0.03
    min_area: int = 65536
    min_vote_share: float = 0.0
    min_confidence: float = 0.0
    max_rows_per_prompt: int = 0
    holdout: int = 10
    benchmark_split: Literal["test", "test_v1"] = "test"
    eval_pairs: int = 0
    seed: int = 42
    images_per_shard: int = 512
    prompts_per_shard: int = 1024
    batch_size: int = 8
    prompt_batch_size: int = 32
    threads: int = 8

    def __post_init__(self):
        for name in ("images_per_shard", "prompts_per_shard", "batch_size", "prompt_batch_size", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("min_area", "max_rows_per_prompt", "eval_pairs", "aspect_tolerance"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("min_vote_share", "min_confidence"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.dataset == "dinalrm" and self.fit == "crop":
            raise ConfigError("fit is crop, but dinalrm holds latents, which are not cut; leave fit at stretch")
        if not self.buckets:
            raise ConfigError("buckets is empty: name at least one, height x width, for instance 512x512")
        for name in self.buckets:
            try:
                parse_bucket(name)
            except ValueError as error:
                raise ConfigError(str(error)) from None


@dataclasses.dataclass(frozen=True)
class MixedConfig:
    """One of several record directories to train on; its pairs come `weight` times an epoch."""

    data: str
    weight: float = 1.0

    def __post_init__(self):
        if not self.weight > 0:
            raise ConfigError(f"weight must be positive, got {self.weight}; leave {self.data} out instead")
