"""How datasets become records, and how records are mixed."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

from dinalrm_jax.data.buckets import BUCKETS, bucket_name, parse_bucket
from dinalrm_jax.data.names import Dataset
from dinalrm_jax.mapping import ConfigError, at_least, refuse_ignored
from dinalrm_jax.model.encoding import EncodersConfig
from dinalrm_jax.model.execution import Dtype

FORM = "COLUMN:WIN:TIE, for instance clip:0:0.03"
# The three that are published; the second is the one that trained the released models.
PUBLISHED = {
    f"mpcf{number}": (f"aesthetic:{least}:0.2", "clip:0:0.03", "vqa:0:0.07")
    for number, least in ((1, 0), (2, -0.5), (3, -1))
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """What one score says of a pair.

    column: of the score.
    win: the winner's score less the loser's is more than this.
    tie: the scores of a tie differ by less than this.
    """

    column: str
    win: float
    tie: float

    def keeps(self, gap: float, tied: bool) -> bool:
        """Whether a pair passes; `gap` is the winner's score less the loser's, of either order in a tie."""
        return abs(gap) < self.tie if tied else gap > self.win


def parse_rules(texts: Sequence[str]) -> tuple[Rule, ...]:
    """The rules of `--agree`: each COLUMN:WIN:TIE, or the name of a published set.

    Raises:
        ConfigError: another form, or a column that has two rules.
    """
    rules = []
    for text in (one for given in texts for one in PUBLISHED.get(given, (given,))):
        column, *numbers = text.split(":")
        try:
            win, tie = map(float, numbers)
        except ValueError:
            win = tie = math.nan
        if not column or not math.isfinite(win) or not tie > 0:
            known = ", ".join(PUBLISHED)
            raise ConfigError(f"agree is {text!r}, expected {FORM}, with TIE above 0; or one of {known}")
        rules.append(Rule(column, win, tie))
    columns = [rule.column for rule in rules]
    if len(set(columns)) < len(columns):
        raise ConfigError(f"agree has two rules for one column: {', '.join(columns)}")
    return tuple(rules)


@dataclasses.dataclass(frozen=True)
class OpinionConfig:
    """How AGIQA-3K's mean opinions become pairs (`dinalrm_jax.data.sources.agiqa3k`).

    quality: Share that quality has in an image's opinion; its alignment with the prompt has the rest.
    least_gap: Leave out pairs whose opinions differ by less.
    soft: Label pairs with the probability that their standard deviations give.
    """

    quality: float = 0.5
    least_gap: float = 0.0
    soft: bool = False

    def __post_init__(self):
        if not 0 <= self.quality <= 1 or self.least_gap < 0:
            raise ConfigError(
                f"quality lies in [0, 1] and least_gap is not negative, got {self.quality} and {self.least_gap}"
            )


@dataclasses.dataclass(frozen=True)
class PreparationConfig:
    """How a preference dataset becomes records (`dinalrm_jax.data.preparation`).

    dataset: Format of the source; dinalrm holds latents, the others hold images.
    encoders: What makes latents and embeddings.
    text_dtype: Compute dtype of the text encoders; the VAE always computes in float32.
    buckets: Image sizes, HEIGHTxWIDTH in pixels; the defaults are the paper's.
    fit: How an image is brought to its bucket: stretch resizes it, and drops it where no bucket has its shape
        (the paper's way); crop cuts it at the centre.
    aspect_tolerance: How far the logarithm of an image's aspect may be from its bucket's, where it is stretched.
    min_area: Drop images of fewer pixels.
    min_vote_share: Keep only rows whose winner has more than this share of the votes (`data.preferences.select`).
    min_confidence: Keep only rows of at least this confidence.
    ties: Keep training pairs that people tied, as ties.
    scores: CSV files of scores by image, each FILE, or NAME=FILE of what judge --csv writes; for agree.
    agree: Keep only training pairs on which scores agree with people (`data.agreement`): rules COLUMN:WIN:TIE, or a
        published set, mpcf1, mpcf2 or mpcf3.
    views: So many further views of every training pair, crops that may be mirrored (`data.views`); they count as rows
        of their prompt.
    max_rows_per_prompt: Keep at most so many training rows of one prompt (8 in the released code); 0 keeps all.
    holdout: Prompts to hold out where the source has no split of its own.
    benchmark_split: Which test set of GenAI-Bench to take.
    opinion: How opinions of agiqa3k become pairs.
    eval_pairs: Keep at most so many held-out pairs; 0 keeps all.
    seed: Seed of what is picked at random.
    images_per_shard: Images in a shard, which is what a killed run can lose of each process's work.
    prompts_per_shard: Prompts in a shard, which is what a killed run can lose of each process's work.
    batch_size: Images in a call of the VAE.
    prompt_batch_size: Prompts in a call of the text encoders.
    threads: Threads that read and decode images; their number changes no byte of the output.
    """

    dataset: Dataset
    encoders: EncodersConfig = EncodersConfig()
    text_dtype: Dtype = "bfloat16"
    buckets: tuple[str, ...] = tuple(map(bucket_name, BUCKETS))
    fit: Literal["stretch", "crop"] = "stretch"
    aspect_tolerance: float = 0.03
    min_area: int = 65536
    min_vote_share: float = 0.0
    min_confidence: float = 0.0
    ties: bool = False
    scores: tuple[str, ...] = ()
    agree: tuple[str, ...] = ()
    views: int = 0
    max_rows_per_prompt: int = 0
    holdout: int = 10
    benchmark_split: Literal["test", "test_v1"] = "test"
    opinion: OpinionConfig = OpinionConfig()
    eval_pairs: int = 0
    seed: int = 42
    images_per_shard: int = 512
    prompts_per_shard: int = 1024
    batch_size: int = 8
    prompt_batch_size: int = 32
    threads: int = 8

    def __post_init__(self):
        at_least(self, 1, ("images_per_shard", "prompts_per_shard", "batch_size", "prompt_batch_size", "threads"))
        for name in ("min_area", "views", "max_rows_per_prompt", "eval_pairs", "aspect_tolerance"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("min_vote_share", "min_confidence"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.dataset == "dinalrm" and self.fit == "crop":
            raise ConfigError("fit is crop, but dinalrm holds latents, which are not cut; leave fit at stretch")
        if self.dataset == "dinalrm":
            refuse_ignored(self, ("views",), "dinalrm holds latents, which are not cut")
        if self.dataset != "agiqa3k":
            refuse_ignored(self, ("opinion",), "only agiqa3k has mean opinions")
        if bool(self.scores) != bool(self.agree):
            raise ConfigError("scores are what agree compares: give both, or none of them")
        parse_rules(self.agree)
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
