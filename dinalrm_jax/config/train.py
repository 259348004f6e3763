"""The tree of a training run's configuration; its parts stand beside what they configure."""

import dataclasses
from typing import Literal

from dinalrm_jax.data.config import MixedConfig
from dinalrm_jax.devices.mesh import MeshConfig
from dinalrm_jax.mapping import ConfigError, at_least, refuse_ignored
from dinalrm_jax.model.backbone.sd3.config import SD3Config
from dinalrm_jax.model.config import RewardModelConfig
from dinalrm_jax.model.execution import ExecutionConfig
from dinalrm_jax.noise import SigmaConfig
from dinalrm_jax.preference import LossConfig
from dinalrm_jax.scenes.config import RehearsalConfig, SamplesConfig, ScenesConfig


@dataclasses.dataclass(frozen=True)
class EnsembleTermConfig:
    """Trains the token-level ensemble too: every pair is also scored at several levels at once.

    Neither the paper nor the released code has it: their head first sees several levels when it is evaluated.

    count: levels of one pair's ensemble, drawn like its single level, which is one of them.
    weight: of the ensemble's loss; the single level's has the rest.
    """

    count: int = 3
    weight: float = 0.5

    def __post_init__(self):
        if self.count < 2 or not 0 < self.weight <= 1:
            raise ConfigError(
                f"an ensemble has 2 levels or more and its loss a weight in (0, 1], got {self.count} and {self.weight}"
            )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warmup, a schedule after it, clipping by global norm, an average of the weights.

    schedule: the learning rate stays, or falls to zero at the last step by a cosine or a line.
    """

    learning_rate: float = 5e-5
    weight_decay: float = 0.01
    b1: float = 0.9
    b2: float = 0.999
    warmup_steps: int = 1000
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    max_grad_norm: float = 1.0
    ema_decay: float = 0.995

    def __post_init__(self):
        if self.learning_rate < 0 or self.max_grad_norm <= 0 or self.warmup_steps < 0:
            raise ConfigError(
                "learning_rate and warmup_steps must not be negative and max_grad_norm must be positive, got "
                f"{self.learning_rate}, {self.warmup_steps} and {self.max_grad_norm}"
            )
        if not 0.0 <= self.ema_decay < 1.0:
            raise ConfigError(f"ema_decay must be in [0, 1), got {self.ema_decay}; 0 averages nothing")


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One training stage.

    batch_size: pairs an optimizer step.
    steps: optimizer steps, or
    epochs: passes over the training pairs; one of the two is given.
    micro_batches: a batch passes as so many parts, one after another, in the memory of one.
    checkpoint_every, log_every, evaluate_every: steps.
    """

    batch_size: int
    steps: int | None = None
    epochs: float | None = None
    micro_batches: int = 1
    optimizer: OptimizerConfig = OptimizerConfig()
    sigma: SigmaConfig = SigmaConfig()
    checkpoint_every: int = 1000
    log_every: int = 20
    evaluate_every: int = 1000

    def __post_init__(self):
        names = ("batch_size", "steps", "micro_batches", "checkpoint_every", "log_every", "evaluate_every")
        at_least(self, 1, names)
        if (self.steps is None) == (self.epochs is None):
            raise ConfigError(
                f"a stage is so many steps or so many epochs long, got steps {self.steps} and epochs {self.epochs}; "
                "give one of them, and the other as None"
            )
        if self.epochs is not None and not self.epochs > 0:
            raise ConfigError(f"epochs must be positive, got {self.epochs}")

    def lasting(self, pairs: float) -> "StageConfig":
        """The same stage in steps, of so many training pairs an epoch."""
        if self.steps is not None:
            return self
        return dataclasses.replace(self, steps=max(1, round(self.epochs * pairs / self.batch_size)), epochs=None)


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """A window of the reward stage that JAX's profiler records: `steps` steps (0: none) after step `start`."""

    start: int = 10
    steps: int = 0

    def __post_init__(self):
        if not self.steps:
            refuse_ignored(self, ("start",), "no steps are recorded (profile.steps is 0)")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Held-out evaluation.

    sigma: the single level that stands for a run.
    levels: single levels evaluated while training, beside `sigma`.
    report: single levels of the report at the end, beside these.
    ensemble: the levels of the ensemble; evaluated while training where `levels` is not empty.
    max_pairs: at most so many held-out pairs, spread evenly; 0: all.
    batch_size: images a batch, at most: half as many, and so on, where they do not fit beside the training state.
    seed: of the noise, of which every image has its own.
    """

    sigma: float = 0.4
    levels: tuple[float, ...] = ()
    report: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    max_pairs: int = 0
    ensemble: tuple[float, ...] = (0.2, 0.5, 0.7)
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self):
        levels = (self.sigma, *self.levels, *self.report, *self.ensemble)
        if wrong := [level for level in levels if not 0 <= level <= 1]:
            raise ConfigError(f"evaluation's noise levels must lie in [0, 1], got {', '.join(map(str, wrong))}")
        if not self.ensemble:
            raise ConfigError("evaluation.ensemble is empty; name its levels, for instance (0.2, 0.5, 0.7)")
        if self.batch_size < 1 or self.max_pairs < 0:
            raise ConfigError(
                f"batch_size must be at least 1 and max_pairs at least 0, got {self.batch_size}, {self.max_pairs}"
            )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A whole training run.

    data: directory of records (`dinalrm_jax.data.records`); None: WORKDIR/data, or
    mixture: several of them, each with a weight.
    scenes: draw the quickstart's scenes into `data` where it does not exist; None: it must exist.
    samples: the reward's pairs are pictures by the generator that this run trains on its scenes, judged by rules.
    rehearsal: make base model and data from nothing, instead of `data`, `scenes` and `base_model`.
    base_model: a diffusers directory or a native backbone to start from; None: random weights.
    init_from: a reward model to go on from, native (with its own backbone, unless base_model names one) or released
        (then base_model is needed): its LoRA and head are what the reward stage starts with.
    generator: a flow-matching stage that trains the whole backbone first; None: skip it.
    reward: the stage that trains LoRA and head on preference pairs.
    prompt_weights: a pair counts the less, the more training pairs its prompt has (`preference.prompt_weights`).
    ensemble_term: train the ensemble too; None: single levels only, as the paper does.
    wandb_project: log to this Weights & Biases project too; needs `wandb` installed.
    profile: steps to record into WORKDIR/profile.
    """

    name: str
    model: RewardModelConfig
    reward: StageConfig
    seed: int = 0
    data: str | None = None
    mixture: tuple[MixedConfig, ...] = ()
    scenes: ScenesConfig | None = None
    samples: SamplesConfig | None = None
    base_model: str | None = None
    init_from: str | None = None
    generator: StageConfig | None = None
    loss: LossConfig = LossConfig()
    prompt_weights: bool = False
    ensemble_term: EnsembleTermConfig | None = None
    execution: ExecutionConfig = ExecutionConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    mesh: MeshConfig = MeshConfig()
    rehearsal: RehearsalConfig | None = None
    wandb_project: str | None = None
    profile: ProfileConfig = ProfileConfig()

    def __post_init__(self):
        if self.rehearsal is not None and not isinstance(self.model.transformer, SD3Config):
            raise ConfigError(
                f"a rehearsal makes an SD3 pipeline, and model.transformer is of family "
                f"{self.model.transformer.family!r}; leave rehearsal out"
            )
        if self.rehearsal is not None and (self.scenes is not None or self.data or self.base_model):
            raise ConfigError("a rehearsal makes its own data and base model; leave scenes, data and base_model out")
        if self.generator is not None:
            refuse_ignored(self.generator, ("evaluate_every",), "a generator is not evaluated while it trains")
        if self.samples is not None and (self.generator is None or self.scenes is None):
            raise ConfigError("samples are those of a generator of scenes; give scenes and generator too")
        if self.mixture and (self.data or self.scenes is not None or self.rehearsal is not None):
            raise ConfigError("mixture names the data; leave data, scenes and rehearsal out")
        if self.init_from is not None and (self.generator is not None or self.rehearsal is not None):
            raise ConfigError(
                "init_from is a model on a backbone of its own; a generator stage or a rehearsal would make another: "
                "set them to None (--config.generator=None)"
            )


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """Several runs on the same data, each with every seed; runs of one seed share its generator."""

    name: str
    runs: tuple[TrainConfig, ...]
    seeds: tuple[int, ...]

    def __post_init__(self):
        names = [run.name for run in self.runs]
        if len(set(names)) != len(names) or not names or not self.seeds:
            raise ConfigError(f"a sweep needs seeds and runs of different names, got {names} and {self.seeds}")
        if len({run.generator for run in self.runs if run.generator is not None}) > 1:
            raise ConfigError("runs of a sweep share one generator a seed, so their generator stages must be equal")
