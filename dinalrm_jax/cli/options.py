"""What each command is told: one frozen dataclass a command, from which `cli.flags` makes its flags and its help.

Only modules that need no JAX are imported here, so that help and mistyped flags are answered at once.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from dinalrm_jax.cli.flags import UsageError, flag
from dinalrm_jax.data.config import PreparationConfig
from dinalrm_jax.data.names import BenchmarkName
from dinalrm_jax.model.execution import Dtype, DtypeOrAuto, Weights
from dinalrm_jax.server.config import URL, ServerConfig
from dinalrm_jax.timing.setting import GENERATION, PASSES, Setting


def at_least(options: Any, least: float, names: Sequence[str]) -> None:
    """Raises UsageError where one of these options is below `least`."""
    for name in names:
        if not getattr(options, name) >= least:  # NaN is not either
            raise UsageError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(options, name)}")


def are_levels(options: Any, names: Sequence[str]) -> None:
    """Raises UsageError where one of these options holds a number that is no noise level."""
    for name in names:
        if not all(0 <= level <= 1 for level in getattr(options, name)):
            raise UsageError(f"--{name} takes levels in [0, 1] (0 clean, 1 pure noise), got {getattr(options, name)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """A model to score with.

    checkpoint: The checkpoint: released, native or of a training run; a directory or hub id.
    revision: Commit, tag or branch of a checkpoint that is a hub id.
    base_model: The SD3 pipeline, with VAE and text encoders where images and prompts are scored; a directory or
        hub id. A checkpoint in the released layout needs it for the backbone.
    dtype: Compute dtype; auto is float32 on CPUs and bfloat16 elsewhere, int8 the same with frozen matrices in int8.
    """

    checkpoint: str = flag(metavar="CHECKPOINT")
    revision: str | None = flag(None, metavar="REVISION")
    base_model: str | None = flag(None, metavar="BASE_MODEL")
    dtype: Weights = "auto"


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobOptions:
    """One process or several.

    distributed: Join the other processes of this job, which are found by themselves on TPU pods, Slurm and Open MPI,
        elsewhere from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """

    distributed: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions(JobOptions):
    """What `train` is told.

    config: The experiment's file, for instance configs/quickstart.py; a packaged config where there is no such file.
    workdir: Directory of everything the run writes, also gs://BUCKET/DIRECTORY; runs/NAME, with the config's name,
        where it is not given.
    overrides: Change one value of the config, for instance --config.seed=1 or --config.reward.steps=100; None turns
        off what may be None, a whole section among it (--config.generator=None).
    check_memory: Train nothing; compile for other devices, which need not be here, and say whether the run fits them.
    devices: The devices to check, for instance v5e:2x4 or h100:8.
    """

    config: str = flag(metavar="FILE")
    workdir: str | None = flag(None, metavar="DIR")
    check_memory: bool = False
    devices: str | None = flag(None, metavar="CHIP[:DEVICES]", aliases=("for",))
    overrides: tuple[str, ...] = flag((), metavar="KEY=VALUE", prefix="config.")

    def __post_init__(self):
        if self.check_memory != (self.devices is not None):
            raise UsageError("--check-memory and --for go together: train --config FILE --check-memory --for v5e:2x4")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignOptions(JobOptions):
    """What `align` is told.

    config: The experiment's file, for instance configs/refl.py; a packaged config where there is no such file.
    workdir: Directory of everything the run writes, also gs://BUCKET/DIRECTORY; runs/NAME, with the config's name,
        where it is not given.
    overrides: Change one value of the config, for instance --config.seed=1 or --config.tuning.steps=100.
    """

    config: str = flag(metavar="FILE")
    workdir: str | None = flag(None, metavar="DIR")
    overrides: tuple[str, ...] = flag((), metavar="KEY=VALUE", prefix="config.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ModelOptions, JobOptions):
    """What `evaluate` is told.

    benchmark: Format of the data.
    data: Directory of the benchmark.
    split: The part to score: of GenAI-Bench test (which is taken where none is given) or test_v1, of records train
        or eval (which is taken where none is given).
    quality: Share that quality has in AGIQA-3K's opinions; alignment with the prompt has the rest.
    holdout: Score only so many prompts of AGIQA-3K, those that preprocess --holdout holds out; 0 takes all.
    sigma: Single noise levels to score at.
    ensemble: Levels of the token-level ensemble; empty (--ensemble=) for none.
    seed: Seed of the first noise draw.
    seeds: Number of noise draws, with the seeds seed, seed + 1 and so on; the table has their spread.
    shared_noise: Also score with one noise for all images, which takes twice the time.
    calibrate: Fit k and sigma_0 of Thurstone's likelihood to half of the prompts' pairs, judge by the others, and write
        them into the checkpoint, a native one, as calibration.json: probabilities of its scores are by them from then
        on, in the place of the likelihood that it was trained with, also Bradley and Terry's.
    size: HEIGHTxWIDTH to resize all images to; where it is not given, they keep their own and large ones are
        scaled down.
    batch_size: Images in one program.
    output: Directory to write, which must not exist; runs/evaluation/BENCHMARK where it is not given.
    """

    benchmark: Literal[BenchmarkName, "records"]
    data: str = flag(metavar="DIR")
    split: str | None = None
    quality: float | None = None
    holdout: int | None = None
    sigma: tuple[float, ...] = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    ensemble: tuple[float, ...] = (0.2, 0.5, 0.7)
    seed: int = 0
    seeds: int = 1
    shared_noise: bool = True
    calibrate: bool = False
    size: str | None = flag(None, metavar="HEIGHTxWIDTH")
    batch_size: int = 8
    output: str | None = flag(None, metavar="DIR")

    def __post_init__(self):
        at_least(self, 1, ("seeds", "batch_size"))
        are_levels(self, ("sigma", "ensemble"))
        if not self.levels:
            raise UsageError("give at least one level: --sigma and --ensemble are both empty")
        if self.split is not None and self.benchmark not in ("genai_bench", "records"):
            raise UsageError(f"--split goes with genai_bench and records; {self.benchmark} has one test set")
        if self.benchmark != "agiqa3k" and (self.quality is not None or self.holdout is not None):
            raise UsageError(f"--quality and --holdout go with agiqa3k, not with {self.benchmark}")
        if not 0 <= (self.quality or 0) <= 1 or (self.holdout or 0) < 0:
            raise UsageError(f"--quality lies in [0, 1], --holdout is not negative; got {self.quality}, {self.holdout}")
        if self.calibrate and len(set(self.sigma)) < 2:
            raise UsageError("--calibrate needs two noise levels or more to tell k from sigma_0, as in --sigma=0.2,0.4")
        if self.size is not None and self.benchmark == "records":
            raise UsageError("--size goes with images; records have the sizes they were made with")

    @property
    def levels(self) -> list[float | tuple[float, ...]]:
        return [*self.sigma, *([self.ensemble] if self.ensemble else [])]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreprocessOptions(JobOptions):
    """What `preprocess` is told.

    source: Directory of the dataset.
    output: Record directory to write, which must not exist.
    base_model: The SD3 pipeline with VAE and text encoders; a directory or hub id.
    """

    source: str = flag(metavar="DIR")
    output: str = flag(metavar="DIR")
    base_model: str | None = flag(None, metavar="BASE_MODEL")
    preparation: PreparationConfig = flag(names={"encoders.kind": "encoders", "encoders.images": "image_encoder"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """What `convert` is told.

    direction: What to convert into what, as above: released, native, export or diffusers.
    checkpoint: The checkpoint: released, native or of a training run; a directory or hub id.
    base_model: The base model in diffusers layout; a directory or hub id.
    revision: Commit, tag or branch of what is converted, where that is a hub id.
    output: Directory to write, which must not exist.
    dtype: Stored dtype of the frozen weights.
    verify: Score with PyTorch from the released files too, and compare.
    """

    direction: Literal["released", "native", "export", "diffusers"] = flag(metavar="DIRECTION", positional=True)
    checkpoint: str | None = flag(None, metavar="CHECKPOINT")
    base_model: str | None = flag(None, metavar="BASE_MODEL")
    revision: str | None = flag(None, metavar="REVISION")
    output: str = flag(metavar="DIR")
    dtype: Dtype = "float32"
    verify: bool = False

    def __post_init__(self):
        needed = {"released": ("checkpoint", "base_model"), "diffusers": ("base_model",)}
        missing = [name for name in needed.get(self.direction, ("checkpoint",)) if getattr(self, name) is None]
        if missing:
            flags = ", ".join("--" + name.replace("_", "-") for name in missing)
            raise UsageError(f"{self.direction} needs {flags}")
        if self.verify and self.direction != "released":
            raise UsageError("--verify goes with `released`: it compares with the released files")
        if self.verify and self.dtype != "float32":
            raise UsageError("--verify compares in float32; convert with --dtype float32, bfloat16 rounds the weights")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """Images to rank, and where the ranking goes.

    images: Image files, and directories whose images are scored in the order of their names.
    prompt: The prompt of all images.
    prompt_file: A text file with one line for all images, or one line for each. Images that `generate` wrote say
        their prompts where neither is given.
    json: File to write JSON to; - for standard output.
    csv: File to write CSV to; - for standard output.
    sheet: Image file to draw a contact sheet to, in rank order.
    """

    images: tuple[str, ...] = flag((), metavar="IMAGE...", positional=True)
    prompt: str | None = None
    prompt_file: str | None = flag(None, metavar="FILE")
    json: str | None = flag(None, metavar="FILE")
    csv: str | None = flag(None, metavar="FILE")
    sheet: str | None = flag(None, metavar="FILE")

    def __post_init__(self):
        if self.prompt is not None and self.prompt_file is not None:
            raise UsageError("give either --prompt or --prompt-file")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreOptions(ImageOptions, ModelOptions):
    """What `score` is told.

    sigma: Noise level in [0, 1], 0.4 where none is given; several between commas are the token-level ensemble.
    ensemble: Levels of the token-level ensemble, for instance 0.2,0.5,0.7; in the place of --sigma.
    seed: Seed of the noise, which all images share.
    samples: Number of noise draws to average over; above 1 the standard error is told too.
    size: HEIGHTxWIDTH to resize all images to; where it is not given, they keep their own and large ones are
        scaled down.
    fast_vae: Encode images by TAESD3 in the place of SD3's VAE: faster, and scores differ a little; a directory or the
        hub id madebyollin/taesd3.
    batch_size: Images in one program.
    """

    sigma: tuple[float, ...] = ()
    ensemble: tuple[float, ...] = ()
    seed: int = 0
    samples: int = 1
    size: str | None = flag(None, metavar="HEIGHTxWIDTH")
    fast_vae: str | None = flag(None, metavar="TAESD3")
    batch_size: int = 8

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, ("samples", "batch_size"))
        are_levels(self, ("sigma", "ensemble"))
        if self.sigma and self.ensemble:
            raise UsageError("give either --sigma or --ensemble: --sigma with several levels is the ensemble")

    @property
    def level(self) -> float | tuple[float, ...]:
        if self.ensemble:
            return self.ensemble
        return self.sigma if len(self.sigma) > 1 else (*self.sigma, 0.4)[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeOptions(ImageOptions):
    """What `judge` is told.

    judge: Who judges, as above.
    model: Its weights, a directory, file or hub id, as above.
    head: Of aesthetic, the file sac+logos+ava1-l14-linearMSE.pth.
    tokenizer: A directory or hub id, where the model's has none.
    """

    judge: Literal["clip", "pickscore", "hpsv2", "aesthetic", "scenes"]
    model: str | None = flag(None, metavar="MODEL")
    head: str | None = flag(None, metavar="FILE")
    tokenizer: str | None = flag(None, metavar="TOKENIZER")

    def __post_init__(self):
        super().__post_init__()
        if self.judge == "scenes" and (self.model or self.head or self.tokenizer):
            raise UsageError("the judge scenes is rules and has no weights: leave --model, --head and --tokenizer out")
        if self.judge != "scenes" and self.model is None:
            raise UsageError(f"the judge {self.judge} needs its weights: --model")
        if self.judge == "aesthetic" and (self.prompt is not None or self.prompt_file is not None):
            raise UsageError("the judge aesthetic reads no prompt: leave --prompt and --prompt-file out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions(JobOptions):
    """What `generate` is told.

    base_model: The pipeline or backbone to sample from; a directory or hub id.
    policy: A LoRA to add to it: an alignment's WORKDIR, a directory or file in PEFT's or diffusers' layout.
    prompt: A prompt; give the flag again for more.
    prompts: A text file with a prompt a line.
    negative_prompt: What images should not show.
    output: Directory to write, which must not exist or be empty.
    count: Images of every prompt.
    checkpoint: A reward model that ranks each prompt's images.
    sigma: The noise levels that it ranks at; 0.2,0.5,0.7 where none are given.
    size: HEIGHTxWIDTH in pixels; 512x512, or as large as the backbone was trained for, where it is not given.
    steps: Steps of the sampler.
    guidance: Scale of classifier-free guidance; 1 for none.
    seed: Seed of the initial noise.
    text_length: T5 tokens of a prompt; 256, or what the backbone was trained with, where it is not given.
    batch_size: Images in one program.
    preview: Decode with TAESD3 in the VAE's place; a directory, or the hub id madebyollin/taesd3.
    dtype: Compute dtype; auto is float32 on CPUs and bfloat16 elsewhere.
    """

    base_model: str = flag(metavar="BASE_MODEL")
    policy: str | None = flag(None, metavar="LORA")
    prompt: tuple[str, ...] = flag((), metavar="TEXT", whole=True)
    prompts: str | None = flag(None, metavar="FILE")
    negative_prompt: str = ""
    output: str = flag(metavar="DIR")
    count: int = 1
    checkpoint: str | None = flag(None, metavar="CHECKPOINT")
    sigma: tuple[float, ...] = ()
    size: str | None = flag(None, metavar="HEIGHTxWIDTH")
    steps: int = 28
    guidance: float = 4.5
    seed: int = 0
    text_length: int | None = None
    batch_size: int = 4
    preview: str | None = flag(None, metavar="TAESD3")
    dtype: DtypeOrAuto = "auto"

    def __post_init__(self):
        at_least(self, 1, ("count", "steps", "batch_size"))
        at_least(self, 1, ("guidance",))
        are_levels(self, ("sigma",))
        if self.sigma and self.checkpoint is None:
            raise UsageError("--sigma is where a reward model ranks: give --checkpoint too")
        if self.negative_prompt and self.guidance <= 1:
            raise UsageError(f"--negative-prompt needs guidance above 1, got --guidance {self.guidance:g}")
        if self.text_length is not None:
            at_least(self, 1, ("text_length",))
        if bool(self.prompt) == (self.prompts is not None):
            raise UsageError("give either --prompt, once or more, or --prompts with a file")

    @property
    def levels(self) -> tuple[float, ...]:
        """That images are ranked at."""
        return self.sigma or (0.2, 0.5, 0.7)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeOptions(ModelOptions):
    """What `serve` is told.

    base_model: The base model in diffusers layout, a directory or hub id; the released layout needs it.
    api_key_env: Environment variable that holds a key which clients must send.
    log_json: Write the log as lines of JSON.
    """

    checkpoint: str = flag(metavar="CHECKPOINT", aliases=("model-path",))
    base_model: str | None = flag(None, metavar="BASE_MODEL", aliases=("base-model-path",))
    server: ServerConfig = ServerConfig()
    api_key_env: str | None = flag(None, metavar="NAME")
    log_json: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """What `benchmark` is told.

    compile_for: Time nothing; compile for other devices, which need not be here, and say what memory the program
        takes there: v5e, v6e:8, v5p:2x2x1, h100. Devices that fsdp and tensor leave split the batch.
    repeats: Timed calls, after one to warm up.
    reference: Checkout of HKUST-C4G/diffusion-rm, whose code is timed in turn.
    compile_reference: Compile the backbone of the reference with torch.compile.
    profile: Profile one more call and name the costliest operations.
    scratch: Directory for the checkpoint that load writes, 5.6 GB; the system's temporary one where it is not given.
    cache: Use the compilation cache.
    output: JSON file to save the result to.
    """

    setting: Setting = Setting()
    compile_for: tuple[str, ...] = flag((), metavar="CHIP[:DEVICES][,CHIP...]")
    repeats: int = 5
    reference: str | None = flag(None, metavar="DIR")
    compile_reference: bool = False
    profile: bool = False
    scratch: str | None = flag(None, metavar="DIR")
    cache: bool = False
    output: str | None = flag(None, metavar="FILE")

    def __post_init__(self):
        at_least(self, 1, ("repeats",))
        if self.compile_for and (self.reference is not None or self.profile or self.setting.mode == "load"):
            raise UsageError("--compile-for runs nothing: it has no --reference, no --profile and no load mode")
        if self.compile_for and self.cache:
            raise UsageError("--cache keeps programs to load; those of --compile-for have no device here to load onto")
        if self.compile_for and self.setting.data != 1:
            raise UsageError("with --compile-for the devices that --fsdp and --tensor leave are data; leave --data out")
        if self.setting.mode in GENERATION and not self.compile_for:
            raise UsageError(f"the mode {self.setting.mode} is compiled ahead, not timed: give --compile-for too")
        if self.setting.mode == "load" and self.reference is not None:
            raise UsageError("--reference has no load mode")
        if self.setting.mode not in PASSES and self.compile_reference:
            raise UsageError("--compile-reference compiles the original's backbone, which this mode has not")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClientOptions:
    """What `client` is told.

    url: The server, without a path.
    api_key_env: Environment variable that holds the key which the server wants.
    wait: Seconds to wait for the server to be ready.
    repeat: Scores to time.
    """

    url: str = flag(URL, metavar="URL")
    api_key_env: str | None = flag(None, metavar="NAME")
    wait: float = 0.0
    repeat: int = 5

    def __post_init__(self):
        at_least(self, 0, ("wait",))
        at_least(self, 1, ("repeat",))
