"""Times the model at full size on this machine, beside the machine's own limit and the PyTorch original.

    python -m dinalrm_jax.benchmark --mode score --resolution 256 [--reference PATH] [--output benchmarks/NAME.json]

Random weights, 12 blocks and head. Prints, and with --output saves, seconds a call after warm-up, compile
time, FLOPs by XLA and by the cost model, the share of the rate that the same machine reaches in the model's
largest matrix products, and memory. With --reference, a checkout of HKUST-C4G/diffusion-rm, its PyTorch code
does the same work in another process, call by call in turn (A B A B); the ratio is its time over ours.
"""

import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time

import jax
from absl import app, flags, logging
from tqdm import tqdm

from dinalrm_jax.compilation_cache import enable_compilation_cache
from dinalrm_jax.config import ExecutionConfig, RewardModelConfig
from dinalrm_jax.disk import check_writable, write_json
from dinalrm_jax.timing.work import MODES, gemm_peak, make_work, model_flops

FROM_ENVIRONMENT = ("XLA_FLAGS", "OMP_NUM_THREADS", "JAX_PLATFORMS")


class Reference:
    """The PyTorch original in a process of its own."""

    def __init__(
        self, path: str, mode: str, dtype: str, rows: int, side: int, tokens: int, blocks: int, compiled: bool
    ):
        arguments = [f"--mode={mode}", f"--dtype={dtype}", f"--rows={rows}", f"--side={side}", f"--tokens={tokens}"]
        arguments += [f"--blocks={blocks}"] + ["--compile"] * compiled
        command = [sys.executable, "-m", "dinalrm_jax.timing.reference", path, *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self._answer()

    def call(self) -> dict:
        """Seconds and peak bytes of one call."""
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict:
        for line in self._process.stdout:
            if line.startswith("{"):  # that code prints too
                return json.loads(line)
        raise RuntimeError("the reference ended; its error stands above")


def seconds_of(call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def spread(seconds: list[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds), "calls": len(seconds)}


def run(values) -> dict:
    """Everything that is measured, as JSON values."""
    config = RewardModelConfig(num_blocks=values.blocks, **_taps(values.blocks))
    execution = ExecutionConfig(values.dtype, values.attention, values.layers, values.remat)
    side = values.resolution // 8
    sizes = {"rows": values.batch, "side": side, "tokens": values.tokens}
    image_tokens = (side // config.transformer.patch_size) ** 2
    peak = gemm_peak(values.dtype, values.batch * (image_tokens + values.tokens), config.transformer.inner_dim)
    work = make_work(values.mode, config, execution, **sizes, merged=values.merged)
    reference = None
    if values.reference is not None:
        reference = Reference(
            values.reference,
            values.mode,
            values.dtype,
            **sizes,
            blocks=values.blocks,
            compiled=values["compile-reference"].value,
        )
    ours, theirs = [], []
    for number in tqdm(range(values.repeats + 1), desc=values.mode, unit="call"):
        seconds = seconds_of(work.call)
        answer = reference.call() if reference is not None else None
        if number:  # the first is a warm-up
            ours.append(seconds)
            if answer is not None:
                theirs.append(answer["seconds"])
    modelled = model_flops(config, values.mode, **sizes)
    median = statistics.median(ours)
    stats = jax.local_devices()[0].memory_stats() or {}
    result = {
        "mode": values.mode,
        "resolution": values.resolution,
        "batch": values.batch,
        "text_tokens": values.tokens,
        "blocks": values.blocks,
        "merged": values.merged,
        "execution": {
            "dtype": values.dtype,
            "attention": values.attention,
            "layers": values.layers,
            "remat": values.remat,
        },
        "machine": {
            "device": jax.devices()[0].device_kind,
            "cores": os.cpu_count(),
            "processor": _processor(),
            "environment": {name: os.environ[name] for name in FROM_ENVIRONMENT if name in os.environ},
        },
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "seconds": spread(ours),
        "trace_seconds": work.trace_seconds,
        "compile_seconds": work.compile_seconds,
        "gflop": {"xla": work.flops / 1e9, "cost_model": modelled / 1e9},
        "gflop_per_second": modelled / median / 1e9,
        "gemm_peak_gflop_per_second": peak / 1e9,
        "share_of_gemm_peak": modelled / median / peak,
        "temporary_bytes": work.temporary_bytes,
        "peak_bytes": stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024),
    }
    if reference is not None:
        result["reference"] = {**reference.about, "seconds": spread(theirs), "peak_bytes": answer["peak_bytes"]}
        result["ratio"] = statistics.median(theirs) / median
        reference.close()
    return result


def as_text(result: dict) -> str:
    """The lines for people."""
    machine, flops = result["machine"], result["gflop"]
    size = f"{result['resolution']} x {result['resolution']} pixels, batch {result['batch']}"
    how = ", ".join(result["execution"].values()) + ", LoRA merged" * result["merged"]
    share = f"{100 * result['share_of_gemm_peak']:.0f} % of its GEMMs' {result['gemm_peak_gflop_per_second']:.0f}"
    lines = [
        f"{result['mode']}, {size}, {result['text_tokens']} text tokens, {result['blocks']} blocks, {how}",
        f"jax {result['versions']['jax']}, {machine['device']}, {machine['cores']} cores, {machine['processor']}",
        f"  {_seconds(result['seconds'])} a call; trace {result['trace_seconds']:.1f} s, "
        f"compile {result['compile_seconds']:.1f} s",
        f"  {flops['cost_model']:.0f} GFLOP by the cost model, {flops['xla']:.0f} by XLA; "
        f"{result['gflop_per_second']:.0f} GFLOP/s, {share}",
        f"  peak memory {_gib(result['peak_bytes'])}, temporaries {_gib(result['temporary_bytes'])}",
    ]
    if "reference" in result:
        theirs = result["reference"]
        lines.append(
            f"  the original, torch {theirs['torch']}: {_seconds(theirs['seconds'])}, peak memory "
            f"{_gib(theirs['peak_bytes'])}; its time over ours: {result['ratio']:.2f}"
        )
    return "\n".join(lines)


def _seconds(spread: dict[str, float]) -> str:
    return f"{spread['median']:.3f} s (median of {spread['calls']}; {spread['min']:.3f} to {spread['max']:.3f})"


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


def _taps(blocks: int) -> dict[str, tuple[int, ...]]:
    taps = tuple(range(4, blocks + 1, 4)) or (blocks,)
    return {"visual_taps": taps, "text_taps": taps}


def _processor() -> str:
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), "")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    logging.set_verbosity(logging.WARNING)
    values = flags.FLAGS
    if values.cache:
        enable_compilation_cache()
    try:
        if values.output is not None:
            check_writable(values.output)
        result = run(values)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(as_text(result))
    if values.output is not None:
        write_json(pathlib.Path(values.output), result, indent=1)


if __name__ == "__main__":
    flags.DEFINE_enum("mode", "score", MODES, "What to time.")
    flags.DEFINE_integer("resolution", 256, "Image side in pixels.", 16)
    flags.DEFINE_integer("batch", 1, "Images, or pairs for train.", 1)
    flags.DEFINE_integer("tokens", 205, "Text tokens: 77 of CLIP, the rest T5's.", 1)
    flags.DEFINE_integer("blocks", 12, "Blocks of the backbone.", 1, 24)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute dtype.")
    flags.DEFINE_enum("attention", "auto", ["auto", "xla", "cudnn", "grouped"], "Its implementation.")
    flags.DEFINE_enum("layers", "loop", ["loop", "scan"], "How the blocks are run.")
    flags.DEFINE_enum("remat", "none", ["none", "dots", "block"], "What a block keeps for its backward pass.")
    flags.DEFINE_bool("merged", False, "Add LoRA into the weights first (not for train).")
    flags.DEFINE_integer("repeats", 5, "Timed calls after one warm-up.", 1)
    flags.DEFINE_string("reference", None, "A checkout of HKUST-C4G/diffusion-rm to time in turn.")
    flags.DEFINE_bool("compile-reference", False, "torch.compile its backbone.")
    flags.DEFINE_bool("cache", False, "Use the compilation cache.")
    flags.DEFINE_string("output", None, "Save the result to this JSON file.")
    app.run(main)
