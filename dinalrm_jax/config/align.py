"""How one alignment is configured: the algorithm, its rewards, and what watches."""

import dataclasses
from typing import Literal

from dinalrm_jax.config.train import ProfileConfig, StageConfig
from dinalrm_jax.devices.mesh import MeshConfig
from dinalrm_jax.mapping import ConfigError, at_least, refuse_ignored
from dinalrm_jax.model.config import LoRAConfig
from dinalrm_jax.model.execution import ExecutionConfig
from dinalrm_jax.scenes.config import SceneCaptionsConfig


@dataclasses.dataclass(frozen=True)
class ReFLConfig:
    """Reward feedback learning (docs/method.md, Alignment): the reward's own gradient at one denoising step.

    steps, guidance: of the sampler, up to the step that trains; that one is computed without guidance.
    first, last: the step that trains is drawn from these, counted from 0, the last one among them.
    scale: of the reward, within the loss.
    pretraining: directory of pairs (`preprocess` makes one), on whose chosen images the policy also keeps its loss as a
        generator, at levels drawn from `tuning.sigma`: `(loss + weight x that) / (1 + weight)`,
    pretraining_weight: of this weight.
    """

    steps: int = 40
    guidance: float = 4.5
    first: int = 30
    last: int = 39
    scale: float = 0.1
    pretraining: str | None = None
    pretraining_weight: float = 0.0

    def __post_init__(self):
        if (self.pretraining is None) != (self.pretraining_weight == 0) or self.pretraining_weight < 0:
            raise ConfigError(
                "pretraining names the images and pretraining_weight, above 0, how much they count; got "
                f"{self.pretraining} and {self.pretraining_weight}"
            )
        if not 0 <= self.first <= self.last < self.steps:
            raise ConfigError(f"0 <= first <= last < steps is needed, got {self.first}, {self.last} and {self.steps}")


@dataclasses.dataclass(frozen=True)
class FlowGRPOConfig:
    """Flow-GRPO (docs/method.md, Alignment): images of one prompt against each other, by their log-probabilities.

    steps, guidance: of the sampler, and of the steps that train.
    kind, noise_level: of the steps with noise; see `sampling.transition`.
    window: how many steps have noise, and train.
    first, last: the window lies within the steps first .. last - 1; where is drawn for every image.
    group: images of a prompt.
    scale: whose deviation advantages are divided by: of all rewards of the batch, or of the group's.
    advantage_clip: the largest advantage.
    clip_range: how far a ratio of probabilities may go from 1 and still have a gradient.
    updates: of the optimizer from one rollout, each from its part of the images.
    guard: GRPO-Guard's ratios (arXiv 2510.22319), freed of their bias and brought to one scale for all steps.
    """

    steps: int = 10
    guidance: float = 1.0
    kind: Literal["cps", "sde", "dance"] = "cps"
    noise_level: float = 0.8
    window: int = 3
    first: int = 0
    last: int = 5
    group: int = 18
    scale: Literal["global", "group"] = "global"
    advantage_clip: float = 5.0
    clip_range: float = 3e-6
    updates: int = 2
    guard: bool = False

    def __post_init__(self):
        at_least(self, 1, ("updates",))
        if self.clip_range <= 0:
            raise ConfigError(f"clip_range must be above 0, got {self.clip_range}")
        if self.guard and self.kind == "cps":
            raise ConfigError('guard needs the kind "sde" or "dance": the log-probability of "cps" has no variance')
        if not (self.first >= 0 and 1 <= self.window <= self.last - self.first and self.last < self.steps):
            raise ConfigError(
                f"a window of {self.window} steps must lie within first..last - 1 = {self.first}..{self.last - 1} and "
                f"before the last of {self.steps} steps, whose noise is none"
            )
        if self.noise_level <= 0:
            raise ConfigError(f"noise_level {self.noise_level} gives no log-probability; it must be above 0")
        at_least(self, 2, ("group",))


@dataclasses.dataclass(frozen=True)
class DPOConfig:
    """Diffusion-DPO (docs/method.md, Alignment): the chosen image's error of flow matching against the rejected one's.

    beta: how soon a pair counts as learned.
    records: directory of pairs (`preprocess` makes one); None: the best and the worst of a prompt's images,
    group: so many of them,
    steps, guidance: by this sampler,
    updates: from which the optimizer makes so many updates.
    """

    beta: float = 2000.0
    records: str | None = None
    group: int = 8
    steps: int = 10
    guidance: float = 1.0
    updates: int = 1

    def __post_init__(self):
        at_least(self, 1, ("steps", "updates"))
        if self.records is not None:
            refuse_ignored(self, ("group", "steps", "guidance", "updates"), "pairs of records are not sampled")
        at_least(self, 2, ("group",))


@dataclasses.dataclass(frozen=True)
class NFTConfig:
    """DiffusionNFT (docs/method.md, Alignment): towards the images that were judged well, away from the others.

    steps, guidance: of the sampler. The averaged policy samples; `tuning.optimizer.ema_decay` says how old it is.
    group: images of a prompt.
    levels: at so many noise levels is every image learned.
    beta: how far the two mixtures go from the policy that sampled.
    advantage_clip: the largest advantage.
    updates: of the optimizer from one rollout, each from its part of the images.
    """

    steps: int = 10
    guidance: float = 1.0
    group: int = 8
    levels: int = 2
    beta: float = 0.1
    advantage_clip: float = 5.0
    updates: int = 1

    def __post_init__(self):
        at_least(self, 1, ("steps", "levels", "updates"))
        at_least(self, 2, ("group",))
        if self.beta <= 0:
            raise ConfigError(f"beta must be above 0, got {self.beta}")


@dataclasses.dataclass(frozen=True)
class LPOConfig:
    """LPO (docs/lrm_lpo.md): at every sampling step the best of several outcomes against the worst.

    The reward scores noisy outcomes at their own levels, and its `sigma` is what it is watched at; or, "clean", it
    scores the jumps to clean latents at `sigma`.

    steps, guidance: of the sampler, and of the steps that train.
    kind, noise_level: of its steps; see `sampling.transition`.
    candidates: outcomes of a step that are compared.
    scored_at: what of an outcome is scored: itself, at the level that the step reaches ("next") or, as in the published
        code, at the one it comes from ("current"); or, for a reward that orders noisy latents badly, its jump to clean
        latents ("clean"), which takes a pass of the policy for every candidate, all of a step's at once.
    threshold: (low, high): by how much the probabilities of best and worst must differ to be a pair, at the step of the
        least noise and at that of the most; between these it rises with the noise.
    pairs: of a trajectory's pairs at most so many are learned from.
    beta: how soon a pair counts as learned.
    epsilon: how far a ratio of probabilities may go from 1 and still have a gradient.
    updates: of the optimizer from one rollout, each from its part of the trajectories.
    """

    steps: int = 20
    guidance: float = 5.0
    kind: Literal["ddim", "sde", "dance"] = "ddim"
    noise_level: float = 1.0
    candidates: int = 4
    scored_at: Literal["next", "current", "clean"] = "next"
    threshold: tuple[float, ...] = (0.45, 0.6)
    pairs: int = 19
    beta: float = 500.0
    epsilon: float = 0.1
    updates: int = 1

    def __post_init__(self):
        at_least(self, 3, ("steps",))  # two with noise, and the last, which has none
        at_least(self, 1, ("pairs", "updates"))
        at_least(self, 2, ("candidates",))
        if len(self.threshold) != 2 or not 0 <= self.threshold[0] <= self.threshold[1] < 1:
            raise ConfigError(f"threshold is (low, high) with 0 <= low <= high < 1, got {self.threshold}")
        if self.pairs >= self.steps:
            raise ConfigError(f"a trajectory of {self.steps} steps has {self.steps - 1} pairs, got pairs {self.pairs}")
        if self.noise_level <= 0 or (self.kind == "ddim" and self.noise_level > 1):
            raise ConfigError(
                f"noise_level {self.noise_level} must be above 0, and of ddim, whose eta it is, at most 1"
            )
        if self.beta <= 0 or not 0 < self.epsilon < 1:
            raise ConfigError(f"beta must be above 0 and epsilon in (0, 1), got {self.beta} and {self.epsilon}")


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """A judge of decoded images.

    kind: "scenes" are the rules for drawn scenes; the others are `evaluation.judges`.
    model, head, tokenizer: of those, as for `python -m dinalrm_jax.judge`.
    """

    kind: Literal["scenes", "clip", "pickscore", "hpsv2", "aesthetic"]
    model: str | None = None
    head: str | None = None
    tokenizer: str | None = None

    def __post_init__(self):
        if self.kind == "scenes":
            refuse_ignored(self, ("model", "head", "tokenizer"), "the rules have no weights")
        elif self.model is None:
            raise ConfigError(f"the judge {self.kind!r} needs its model, a directory or hub id")


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """A reward that a policy is tuned with: a reward model, or a judge of the decoded images.

    checkpoint: a reward model on the policy's own backbone: released, native or of a training run.
    judge: the kind "scenes" gives the share of its caption that a drawn scene shows, which has no gradient: a control.
    sigma: the noise levels that a reward model scores at; several are the token-level ensemble.
    weight: of its advantages, or of its scores for ReFL, where there are several.
    """

    checkpoint: str | None = None
    judge: JudgeConfig | None = None
    sigma: tuple[float, ...] = (0.4,)
    weight: float = 1.0

    def __post_init__(self):
        if (self.checkpoint is None) == (self.judge is None):
            raise ConfigError("a reward is a reward model (checkpoint=...) or a judge (judge=...); name one of them")
        if self.judge is not None:
            refuse_ignored(self, ("sigma",), "a judge takes no noise level")
        if not self.sigma or not all(0 <= level <= 1 for level in self.sigma):
            raise ConfigError(f"sigma holds levels in [0, 1], got {self.sigma}")

    @property
    def differentiable(self) -> bool:
        return self.judge is None or self.judge.kind != "scenes"


@dataclasses.dataclass(frozen=True)
class PolicyEvaluationConfig:
    """How a policy is watched: images of held-out prompts with the same noise every time, without noise on the way.

    prompts: how many prompts are held out: the file's last ones, or captions of scenes of their own.
    each: images of every one of them.
    steps, guidance: of the sampler.
    sigma: levels that the reward scores at here, not those that it trains with: what rises at one level only is no
        better picture.
    images: how many of these are drawn at every evaluation,
    preview: by TAESD3 in the VAE's place, faster and a little off: a directory or the hub id madebyollin/taesd3.
    noises: the reward scores every image under so many noises; their spread is the reward's own error.
    judges: of the decoded images; the first one says which state is the best, where there is one.
    patience: a run ends where the first judge fell at so many evaluations one after the other; 0: it does not.
    """

    prompts: int = 16
    each: int = 1
    steps: int = 28
    guidance: float = 4.5
    sigma: tuple[float, ...] = (0.2, 0.5, 0.7)
    images: int = 8
    preview: str | None = None
    noises: int = 2
    judges: tuple[JudgeConfig, ...] = ()
    patience: int = 0

    def __post_init__(self):
        at_least(self, 1, ("prompts", "each", "steps", "images"))
        at_least(self, 2, ("noises",))
        kinds = [judge.kind for judge in self.judges]
        if len(set(kinds)) < len(kinds):
            raise ConfigError(f"judges are told apart by their kinds, which must differ, got {', '.join(kinds)}")
        if self.patience and not self.judges:
            raise ConfigError("patience waits for what a judge says; name one in evaluation.judges")


ALGORITHMS = ("refl", "flow_grpo", "dpo", "nft", "lpo")  # the fields of AlignConfig that name one


@dataclasses.dataclass(frozen=True)
class AlignConfig:
    """A generator tuned with a reward model.

    base_model: the generator: a diffusers pipeline or a native backbone.
    prompts: a text file with a prompt a line; or
    scenes: captions of drawn scenes, with others that are held out.
    reward: what is made larger.
    mixed: further rewards, each normalised apart where advantages are compared.
    tuning: the stage; its batch_size counts images (of `dpo.records` pairs), its sigma is drawn from by DPO and NFT.
    refl, flow_grpo, dpo, nft, lpo: the algorithm, one of them.
    lora: the policy's adapters, on all blocks.
    reward_noises: every image is scored under so many noises, whose mean counts; their spread is the reward's error.
    reference_weight: weight of the squared distance between the policy's velocities and the generator's own at the
        steps that train; for Flow-GRPO of the KL divergence. DPO has beta for it.
    reference_scale: "error" multiplies that weight, image by image, by the standard error of its reward over noises:
        where the reward does not know, the policy stays.
    height, width: of the images, in pixels.
    text_length: T5 tokens that the policy reads; the reward reads as many as it was trained with.
    """

    name: str
    base_model: str
    reward: RewardConfig
    tuning: StageConfig
    prompts: str | None = None
    scenes: SceneCaptionsConfig | None = None
    refl: ReFLConfig | None = None
    flow_grpo: FlowGRPOConfig | None = None
    dpo: DPOConfig | None = None
    nft: NFTConfig | None = None
    lpo: LPOConfig | None = None
    mixed: tuple[RewardConfig, ...] = ()
    lora: LoRAConfig = LoRAConfig(rank=32, alpha=64.0)
    reward_noises: int = 1
    reference_weight: float = 0.0
    reference_scale: Literal["constant", "error"] = "constant"
    height: int = 512
    width: int = 512
    text_length: int = 256
    seed: int = 0
    evaluation: PolicyEvaluationConfig = PolicyEvaluationConfig()
    execution: ExecutionConfig = ExecutionConfig()
    mesh: MeshConfig = MeshConfig()
    wandb_project: str | None = None
    profile: ProfileConfig = ProfileConfig()

    def __post_init__(self):
        if (self.prompts is None) == (self.scenes is None):
            raise ConfigError(
                "the prompts are those of a file (prompts=...) or captions of drawn scenes (scenes=...): give one of "
                "them, and the other as None"
            )
        chosen = [name for name in ALGORITHMS if getattr(self, name) is not None]
        if len(chosen) != 1:
            raise ConfigError(
                f"an alignment has one algorithm, of {', '.join(ALGORITHMS)}; got {', '.join(chosen) or 'none'}"
            )
        if self.tuning.steps is None:
            raise ConfigError("tuning is so many steps long; give steps, not epochs")
        at_least(self, 1, ("reward_noises",))
        if self.reference_scale == "error" and (self.reward_noises < 2 or not self.reference_weight):
            raise ConfigError(
                'reference_scale "error" needs reward_noises of at least 2, whose spread it is, and a reference_weight'
            )
        pretrains = self.refl is not None and self.refl.pretraining is not None
        if self.dpo is None and self.nft is None and not pretrains:
            refuse_ignored(self.tuning, ("sigma",), f"{chosen[0]} draws no noise levels to train at")
        if (self.dpo or self.lpo) is not None and self.reference_weight:
            raise ConfigError(
                f"{chosen[0]}'s loss holds the policy near its reference by beta; reference_weight has no place"
            )
        if self.lpo is not None and (self.mixed or self.reward.judge is not None or self.reward_noises > 1):
            raise ConfigError(
                "lpo compares a step's outcomes by one reward model, whose likelihood says how sure it is: give "
                "reward.checkpoint, and leave reward.judge, mixed and reward_noises out"
            )
        if self.dpo is not None and self.dpo.records is not None and self.mixed:
            raise ConfigError("pairs of records are not scored; leave mixed out")
        if self.refl is not None and not all(reward.differentiable for reward in (self.reward, *self.mixed)):
            raise ConfigError("refl needs the reward's gradient, which rules do not have; give a checkpoint")
        if self.tuning.batch_size % (self.group * self.updates):
            raise ConfigError(
                f"tuning.batch_size {self.tuning.batch_size} must be a multiple of the group x the updates of a "
                f"rollout, {self.group} x {self.updates}"
            )
        training = {level for reward in (self.reward, *self.mixed) if reward.judge is None for level in reward.sigma}
        if self.lpo is not None:
            if self.lpo.scored_at != "clean":
                training = set()  # it is every step's own level
            refuse_ignored(self.reward, ("weight",), "lpo has one reward, whose order alone counts")
        if training & set(self.evaluation.sigma):
            raise ConfigError(
                f"evaluation.sigma {self.evaluation.sigma} must be other levels than those that train, "
                f"{', '.join(map(str, sorted(training)))} (the rewards' own sigma); set either, for instance "
                "--config.evaluation.sigma=0.1,0.6"
            )
        levels = self.evaluation.sigma
        if not levels or not all(0 <= level <= 1 for level in levels):
            raise ConfigError(f"evaluation.sigma holds levels in [0, 1], got {levels}")
        if self.reference_weight < 0:
            raise ConfigError(f"reference_weight must not be negative, got {self.reference_weight}")

    @property
    def group(self) -> int:
        """Images of a prompt in a batch."""
        grouped = self.flow_grpo or self.nft or (self.dpo if self.dpo and self.dpo.records is None else None)
        return 1 if grouped is None else grouped.group

    @property
    def updates(self) -> int:
        """Of the optimizer in a step."""
        grouped = self.flow_grpo or self.nft or self.dpo or self.lpo
        return 1 if grouped is None else grouped.updates
