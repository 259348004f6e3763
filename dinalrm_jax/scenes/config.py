"""What the drawn scenes and the rehearsals hold."""

import dataclasses

from dinalrm_jax.data.config import PreparationConfig
from dinalrm_jax.mapping import ConfigError


@dataclasses.dataclass(frozen=True)
class ScenesConfig:
    """The generated scenes of `dinalrm_jax.scenes.draw` (written to `data` when it is not there)."""

    train_pairs: int = 12000
    eval_pairs: int = 400
    image_size: int = 64
    seed: int = 0

    def __post_init__(self):
        if self.train_pairs < 1 or self.eval_pairs < 1:
            raise ConfigError(
                f"train_pairs and eval_pairs must be positive, got {self.train_pairs} and {self.eval_pairs}"
            )
        if self.image_size < 16 or self.image_size % 16:
            raise ConfigError(f"image_size must be a positive multiple of 16 pixels, got {self.image_size}")


@dataclasses.dataclass(frozen=True)
class RehearsalConfig:
    """The whole path on inputs made from nothing (`dinalrm_jax.scenes.rehearsal`).

    A random, tiny SD3 pipeline is written to WORKDIR/base_model and HPDv3-layout data to
    WORKDIR/source; that source is preprocessed with that pipeline into WORKDIR/data.
    """

    train_pairs: int = 96
    eval_pairs: int = 24
    preparation: PreparationConfig = PreparationConfig("hpdv3")
    seed: int = 0
