"""What the drawn scenes and the rehearsals hold."""

import dataclasses
from typing import Literal

from dinalrm_jax.data.config import PreparationConfig
from dinalrm_jax.mapping import ConfigError, at_least

TWO_GROUPS = 0.3  # share of scenes with two groups of objects


@dataclasses.dataclass(frozen=True)
class ScenesConfig:
    """The generated scenes of `dinalrm_jax.scenes.draw` (written to `data` when it is not there).

    held_out: what training never sees: some combinations of colour and shape, or a fifth of all captions.
    two_groups: share of scenes with two groups of objects; the others have one, and there are 360 captions of those.
    """

    train_pairs: int = 12000
    eval_pairs: int = 400
    image_size: int = 64
    held_out: Literal["combinations", "captions"] = "combinations"
    two_groups: float = TWO_GROUPS
    seed: int = 0

    def __post_init__(self):
        if self.train_pairs < 1 or self.eval_pairs < 1:
            raise ConfigError(
                f"train_pairs and eval_pairs must be positive, got {self.train_pairs} and {self.eval_pairs}"
            )
        if self.image_size < 16 or self.image_size % 16:
            raise ConfigError(f"image_size must be a positive multiple of 16 pixels, got {self.image_size}")
        _check_share(self.two_groups)


@dataclasses.dataclass(frozen=True)
class SceneCaptionsConfig:
    """Captions of drawn scenes, where a fifth of all captions is held out, as prompts to tune a generator with.

    count: of captions, all different.
    two_groups: share of captions with two groups of objects.
    """

    count: int
    two_groups: float = TWO_GROUPS

    def __post_init__(self):
        at_least(self, 1, ("count",))
        _check_share(self.two_groups)


def _check_share(two_groups: float) -> None:
    if not 0 <= two_groups <= 1:
        raise ConfigError(f"two_groups is a share of scenes, from 0 to 1, got {two_groups}")


@dataclasses.dataclass(frozen=True)
class SamplesConfig:
    """Preference pairs as real sets have them: several pictures of one caption, most of them a generator's own.

    They are ordered by what `dinalrm_jax.scenes.verify` says of them, as people would: with errors.

    train_captions, eval_captions: of the captions that training sees, and of those held out.
    rounds: how often a caption is sampled, each time beside a scene and a broken picture of their own;
    steps: of the sampler, for each of a round's samples; few give worse pictures.
    pairs: of a round, at most: those whose pictures differ in worth.
    error: standard deviation of what is added to a picture's worth, of 0 to 5, whenever it is compared.
    drawn: how often the pairs of drawn scenes come beside them in an epoch; 0: not at all.
    """

    train_captions: int = 2400
    eval_captions: int = 100
    rounds: int = 1
    steps: tuple[int, ...] = (12, 12, 12, 6)
    pairs: int = 6
    error: float = 0.3
    drawn: float = 1.0
    seed: int = 0

    def __post_init__(self):
        at_least(self, 1, ("train_captions", "eval_captions", "rounds", "pairs"))
        if len(self.steps) < 2 or min(self.steps) < 1 or self.error < 0 or self.drawn < 0:
            raise ConfigError(
                "a round has at least 2 samples of at least one step, and neither error nor drawn is negative, got "
                f"{self.steps}, {self.error} and {self.drawn}"
            )
        pictures = len(self.steps) + 2
        if self.pairs > pictures * (pictures - 1) // 2:
            raise ConfigError(
                f"a round's {pictures} pictures (samples, a scene and a broken one) make "
                f"{pictures * (pictures - 1) // 2} pairs, got pairs {self.pairs}"
            )


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
