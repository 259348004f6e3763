"""What `python -m benchmarks.gpu` measures, a process a part: each gives JSON values."""

import dataclasses
import functools
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import dinalrm_jax as dina
from benchmarks import attention, parity, server
from dinalrm_jax.alignment.opened import names_in
from dinalrm_jax.alignment.policy import POLICY, REWARD, Policy, PromptBatch
from dinalrm_jax.alignment.refl import refl as refl_objective
from dinalrm_jax.alignment.rewards import LatentReward, Rewards
from dinalrm_jax.benchmark import seconds_of, spread
from dinalrm_jax.config import OptimizerConfig, ReFLConfig, StageConfig
from dinalrm_jax.devices.chips import GIB, Target
from dinalrm_jax.devices.compilation import disable_compilation_cache
from dinalrm_jax.devices.mesh import MeshConfig, make_mesh
from dinalrm_jax.devices.placement import place
from dinalrm_jax.devices.sharding import BY_ROW
from dinalrm_jax.model.backbone.family import transformer_functional
from dinalrm_jax.model.backbone.sd3.config import SD3Config
from dinalrm_jax.model.config import LoRAConfig, RewardModelConfig
from dinalrm_jax.model.execution import ExecutionConfig
from dinalrm_jax.model.parameters import draw
from dinalrm_jax.model.reward import is_trainable, reward_functional
from dinalrm_jax.server.config import ServerConfig
from dinalrm_jax.server.protocol import RowShape
from dinalrm_jax.timing.memory import peak_bytes
from dinalrm_jax.timing.plan import plan
from dinalrm_jax.timing.programs import model_flops, program_of, shapes_of
from dinalrm_jax.timing.setting import Setting
from dinalrm_jax.timing.work import gemm_peak, make_work
from dinalrm_jax.training.step import assemble
from dinalrm_jax.weights.pretrained import truncate


@dataclasses.dataclass(frozen=True)
class Size:
    """At what size everything is measured.

    Attributes:
        config: of the reward model.
        served: of the server's, which takes requests of SD3.5-M's widths.
        large, small: sides of images, in pixels.
        tokens: of a prompt.
        dtype: of the computation.
        batch, pairs: images of a score, pairs of a train step.
        attention_tokens: numbers of tokens that kernels are compared at.
        row: of a request to the server.
        requests: to the server at once.
        refl: images of an alignment's step, and its sampler.
        repeats: timed calls.
    """

    config: RewardModelConfig
    served: RewardModelConfig
    large: int
    small: int
    tokens: int
    dtype: str
    batch: int
    pairs: int
    attention_tokens: tuple[int, ...]
    row: str
    requests: int
    refl: tuple[int, ReFLConfig]
    repeats: int


FULL = Size(
    RewardModelConfig(), RewardModelConfig(), 1024, 512, 205, "bfloat16", 8, 4, (1229, 4301), "64x64x205", 256,
    (4, ReFLConfig()), 20,
)  # fmt: skip
TINY = RewardModelConfig(
    SD3Config(sample_size=16, num_layers=2, num_attention_heads=2, attention_head_dim=8, joint_attention_dim=24,
              caption_projection_dim=16, pooled_projection_dim=20, pos_embed_max_size=12, dual_attention_layers=(0,)),
    num_blocks=1, visual_taps=(1,), text_taps=(1,), lora=LoRAConfig(2, 4.0),
)  # fmt: skip
REHEARSAL = Size(
    TINY, server.SMALL, 64, 32, 5, "float32", 2, 2, (70,), "8x8x5", 16, (2, ReFLConfig(4, 1.5, 1, 3)), 2
)  # fmt: skip


def device(size: Size) -> dict:
    """What is measured on, and the rate of the model's largest products."""
    first = jax.devices()[0]
    if first.platform != "gpu" and size is FULL:
        return {"platform": first.platform}  # and the program ends
    rows = size.batch * (size.large // 16) ** 2
    return {
        "device": first.device_kind,
        "platform": first.platform,
        "platform_version": first.client.platform_version,
        "memory_bytes": (first.memory_stats() or {}).get("bytes_limit"),
        "jax": jax.__version__,
        "python": sys.version.split()[0],
        "gemm_tflop_per_second": {
            dtype: gemm_peak(dtype, rows, size.config.transformer.width) / 1e12 for dtype in (size.dtype, "float32")
        },
    }


def golden(size: Size) -> dict:
    """Against the released code's outputs, in float32 at the highest precision."""
    jax.config.update("jax_default_matmul_precision", "highest")
    found = dict(parity.deviations())
    checked = {name: value for name, value in found.items() if "bfloat16" not in name}
    return {"deviations": found, "largest_float32": max(checked.values())}


def kernels(size: Size) -> dict:
    """Each attention against XLA's in float32 at the highest precision, and its milliseconds."""
    heads, width = (24, 64) if size is FULL else (2, 8)
    found = {}
    for tokens in size.attention_tokens:
        inputs = attention.random_inputs(tokens, size.dtype, heads, width)
        kinds = attention.kernels_here(size.dtype)
        times = attention.milliseconds([(kind, None) for kind in kinds], inputs, size.repeats)
        found[str(tokens)] = {
            kind: {**attention.deviations(kind, inputs), "forward_ms": forward, "with_backward_ms": both}
            for kind, (forward, both) in zip(kinds, times)
        }
    return {"by_tokens": found}


def setting_of(size: Size, mode: str, resolution: int, batch: int) -> Setting:
    remat = "block" if mode in ("train", "gradient") else "none"
    return Setting(mode, resolution, batch, size.tokens, dtype=size.dtype, layers="scan", remat=remat)  # type: ignore


def timed(size: Size, mode: str, resolution: int, batch: int) -> dict:
    """One mode of `dinalrm_jax.benchmark`."""
    setting = setting_of(size, mode, resolution, batch)
    work = make_work(setting, size.config)
    result = work.call()
    values = [np.asarray(x, np.float32) for x in jax.tree.leaves(result) if jnp.issubdtype(x.dtype, jnp.floating)]
    if not all(np.isfinite(value).all() for value in values):
        raise FloatingPointError(f"{mode} gave NaN or infinity")
    seconds = spread([seconds_of(work.call) for _ in range(size.repeats)])
    side = resolution // size.config.transformer.latents.downsampling
    flops = model_flops(size.config, mode, batch, side, size.tokens)
    images = batch * (2 if mode == "train" else 1)
    peak = gemm_peak(size.dtype, images * ((resolution // 16) ** 2 + size.tokens), size.config.transformer.width)
    return {
        "setting": dataclasses.asdict(setting),
        "seconds": seconds,
        "images_per_second": images / seconds["median"],
        "tflop_per_second": flops / seconds["median"] / 1e12,
        "share_of_gemm_peak": flops / seconds["median"] / peak,
        "trace_seconds": work.trace_seconds,
        "compile_seconds": work.compile_seconds,
        "planned_gib": (work.argument_bytes + work.temporary_bytes) / GIB,
        "peak_gib": _peak_gib(),
    }


def refl(size: Size) -> dict:
    """One step of ReFL on the generator that the reward model shares its blocks with."""
    images, config = size.refl
    execution = ExecutionConfig(size.dtype, layers="scan", remat="block")  # type: ignore[arg-type]
    transformer, mesh = size.config.transformer, make_mesh(MeshConfig())
    tuned = transformer_functional(transformer, execution, lora=LoRAConfig(rank=32, alpha=64.0))
    shardings = tuned.shardings(mesh)
    drawn = draw(tuned, 0)
    base = {name: array for name, array in drawn.items() if ".lora_" not in name}
    adapters = place({name: drawn[name] for name in drawn.keys() - base.keys()}, np.float32, shardings)
    held = place(base, execution.dtype, shardings)
    module = reward_functional(size.config, execution)
    own = {name: array for name, array in draw(module, 1).items() if is_trainable(name)}
    params = truncate(held, size.config) | place(own, np.float32, module.shardings(mesh))
    model = dina.RewardModel(size.config, params, execution)
    spec, side = transformer.latents, size.small // transformer.latents.downsampling
    policy = Policy(tuned, transformer_functional(transformer, execution), (side, side, spec.channels), 3.0)
    names = names_in(params, held, f"{REWARD}0.")
    rewards = Rewards({"reward": (LatentReward(model, names, (0.4,)), 1.0)})
    objective = refl_objective(policy, rewards, config, 1.0)
    frozen = {f"{POLICY}{name}": array for name, array in held.items()}
    frozen |= {names[name]: array for name, array in params.items()}
    trained = {f"{POLICY}{name}": array for name, array in adapters.items()}
    stage = StageConfig(images, steps=100, optimizer=OptimizerConfig(warmup_steps=0, ema_decay=0.0))
    assembled = assemble(objective, trained, frozen, stage, mesh)
    rows = jax.NamedSharding(mesh, BY_ROW)
    rng = np.random.default_rng(0)

    def prompt():
        embeds = rng.standard_normal((images, size.tokens, spec.text_width), np.float32)
        return dina.PromptEmbeds(embeds, rng.standard_normal((images, spec.pooled_width), np.float32))

    batch = jax.device_put(PromptBatch(prompt(), prompt(), prompt(), np.zeros(images, np.int32)), rows)
    started = time.perf_counter()
    step = assembled.lower(batch).compile()
    compile_seconds = time.perf_counter() - started
    state = assembled.state

    def call() -> dict:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = jax.block_until_ready(step(state, assembled.frozen, batch))
        return metrics

    if not float(call()["finite"]):
        raise FloatingPointError("a step of ReFL gave NaN or infinity")
    seconds = spread([seconds_of(call) for _ in range(min(size.repeats, 5))])
    return {
        "images": images,
        "resolution": size.small,
        "sampler_steps": [config.first, config.last],
        "seconds": seconds,
        "images_per_second": images / seconds["median"],
        "compile_seconds": compile_seconds,
        "peak_gib": _peak_gib(),
    }


def throughput(size: Size) -> dict:
    """Scores over HTTP from clients in processes of their own, each compared with the model's own."""
    shape = RowShape.parse(size.row)
    execution = ExecutionConfig(size.dtype, layers="scan")  # type: ignore[arg-type]
    model = dina.RewardModel.init(size.served, execution)
    expected = server.expected_scores(model, size.requests, shape)
    rounds = []
    with (
        server.serving(model, ServerConfig(port=0, warmup=(size.row,))) as port,
        server.clients(None, port, shape, size.requests, 4 if size is FULL else 1, 2) as pipes,
    ):
        for _ in range(3):
            started = time.perf_counter()
            for pipe in pipes:
                pipe.send("go")
            results = [result for pipe in pipes for result in pipe.recv()]
            rounds.append((time.perf_counter() - started, results))
    seconds, results = rounds[-1]
    lost = [score for score, _ in results if isinstance(score, str)]
    if lost:
        raise RuntimeError(f"{len(lost)} of {len(results)} requests were lost: {lost[0]}")
    p50, p99 = np.percentile([latency for _, latency in results], [50, 99])
    error = max(abs(score - want) for (score, _), want in zip(results, expected))
    return {
        "row": size.row,
        "requests": size.requests,
        "rows_per_second": [len(found) / spent for spent, found in rounds],
        "p50_seconds": float(p50),
        "p99_seconds": float(p99),
        "largest_error": float(error),
        "peak_gib": _peak_gib(),
    }


def ahead(size: Size, name: str) -> dict:
    """What compiling ahead says that the timed programs need, on this machine's processors."""
    disable_compilation_cache()
    target = Target.parse(name)
    mesh = make_mesh(MeshConfig(), target.devices())
    found = {}
    for part, (mode, resolution, batch) in grid(size).items():
        if part in ("score_large_batch", "train_large", "gradient_large"):
            setting = setting_of(size, mode, resolution, batch)
            program = program_of(setting, size.config, mesh, shapes_of(setting, size.config, mesh))
            found[part] = dataclasses.asdict(plan(program.lower, target))
    return {"target": name, "needed_gib": {part: one["needed"] for part, one in found.items()}, "plans": found}


def original(size: Size, path: str | None, mode: str, compiled: bool) -> dict:
    """The released PyTorch code at the same work, alone on the device, its attention cuDNN's."""
    if path is None:
        raise NotMeasured("--reference names no checkout of HKUST-C4G/diffusion-rm")
    _, resolution, batch = grid(size)[{"score": "score_large_batch", "train": "train_large"}[mode]]
    setting = setting_of(size, mode, resolution, batch)
    script = pathlib.Path(__file__).with_name("original.py")
    command = [sys.executable, str(script), path, json.dumps(dataclasses.asdict(setting))]
    command += ["--compile"] * compiled
    done = subprocess.run(command, input=(1 + size.repeats) * "go\n", capture_output=True, text=True)
    if done.returncode:
        raise NotMeasured(done.stderr.strip().splitlines()[-1])
    about, _, *calls = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {
        **about,
        "setting": dataclasses.asdict(setting),
        "seconds": spread([call["seconds"] for call in calls]),
        "peak_gib": calls[-1]["peak_bytes"] / GIB,
    }


class NotMeasured(Exception):
    """What a part cannot do here, and why."""


def grid(size: Size) -> dict[str, tuple[str, int, int]]:
    """(mode, resolution, images or pairs) of the timed parts, the most important ones first."""
    return {
        "score_large_batch": ("score", size.large, size.batch),
        "train_large": ("train", size.large, size.pairs),
        "gradient_large": ("gradient", size.large, 1),
        "score_small_batch": ("score", size.small, size.batch),
        "score_large": ("score", size.large, 1),
        "score_small": ("score", size.small, 1),
        "ensemble_large": ("ensemble", size.large, 1),
    }


def parts(size: Size, reference: str | None, target: str) -> dict[str, Callable[[], dict]]:
    """Every part, in the order of importance."""
    timings = {name: functools.partial(timed, size, *what) for name, what in grid(size).items()}
    of_size = {"device": device, "golden": golden, "kernels": kernels}
    return {
        **{name: functools.partial(part, size) for name, part in of_size.items()},
        **timings,
        "refl": functools.partial(refl, size),
        "server": functools.partial(throughput, size),
        "original_score": functools.partial(original, size, reference, "score", False),
        "original_score_compiled": functools.partial(original, size, reference, "score", True),
        "original_train": functools.partial(original, size, reference, "train", False),
        "ahead": functools.partial(ahead, size, target),
    }


def _peak_gib() -> float:
    """Of the device's memory where it has its own, else of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return (stats.get("peak_bytes_in_use") or peak_bytes()) / GIB
