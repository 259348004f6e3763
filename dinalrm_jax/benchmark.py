"""Times the model at full size on this machine, beside the machine's own limit and the PyTorch original.

    python -m dinalrm_jax.benchmark --mode score --resolution 256 [--reference PATH] [--output FILE.json]

Random weights, 12 blocks and head. Prints, and with --output saves, seconds a call after warm-up, compile
time, FLOPs by XLA and by the cost model, the share of the rate that the same machine reaches in the model's
largest matrix products, and memory. With --reference, a checkout of HKUST-C4G/diffusion-rm, its PyTorch code
does the same work in another process, call by call in turn (A B A B); the ratio is its time over ours.

With --compile-for it times nothing: it compiles the mode's program for accelerators that are not here and prints what
it needs of their memory, which kernels it calls and what the devices send each other. The compiler of TPUs is in
libtpu's wheel, that of GPUs in jax_cuda12_plugin's and jax_cuda12_pjrt's.

Modes: score, ensemble (three noise levels), gradient (of the score in the latents), train (one optimizer step
on a pair), text, image and decode (encoders and VAE; T5-XXL takes 10 GB in bfloat16), load (a float32 checkpoint
from disk, written to --scratch first); with --compile-for also generate, refl and refl_pixels, of the whole
generator. Of a loop's body (--layers=scan, a rollout's steps) XLA counts the FLOPs of one pass.
"""

from dinalrm_jax.cli.command import answer_help, run_command
from dinalrm_jax.cli.options import BenchmarkOptions

answer_help(__name__, __doc__, BenchmarkOptions)  # before the imports that take a second

import dataclasses
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import jax
import jaxlib
from tqdm import tqdm

from dinalrm_jax.devices.chips import Target
from dinalrm_jax.devices.compilation import disable_compilation_cache, enable_compilation_cache
from dinalrm_jax.devices.host_memory import keep_freed_memory
from dinalrm_jax.devices.mesh import MeshConfig, make_mesh
from dinalrm_jax.disk import check_writable, write_json
from dinalrm_jax.timing import loading
from dinalrm_jax.timing.costs import top_costs
from dinalrm_jax.timing.generation import generation_program
from dinalrm_jax.timing.memory import forget_peak, peak_bytes
from dinalrm_jax.timing.plan import as_table, plan
from dinalrm_jax.timing.programs import (
    encoder_program,
    encoder_shapes,
    model_flops,
    model_of,
    program_of,
    shapes_of,
)
from dinalrm_jax.timing.setting import GENERATION, PASSES, Setting
from dinalrm_jax.timing.work import gemm_peak, make_work

FROM_ENVIRONMENT = ("XLA_FLAGS", "OMP_NUM_THREADS", "JAX_PLATFORMS")


class Reference:
    """The PyTorch original in a process of its own."""

    def __init__(self, path: str, setting: Setting, compiled: bool):
        script = pathlib.Path(__file__).with_name("timing") / "reference.py"
        command = [sys.executable, "-P", str(script), path, json.dumps(dataclasses.asdict(setting))]
        command += ["--compile"] * compiled
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self._answer()

    def call(self) -> dict:
        """Seconds of one call, and the peak of memory since the first one."""
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


def seconds_of(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def spread(seconds: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds), "calls": len(seconds)}


def run(
    setting: Setting, repeats: int, reference_path: str | None, compile_reference: bool, profile: bool = False
) -> dict:
    """Everything that is measured of one mode, as JSON values."""
    work = make_work(setting)
    config = model_of(setting)
    spec = config.transformer.latents
    side = setting.resolution // spec.downsampling
    rows = setting.batch * (spec.tokens(side, side) + setting.tokens)
    peak = gemm_peak(setting.dtype, rows, config.transformer.width)
    reference = Reference(reference_path, setting, compile_reference) if reference_path is not None else None
    ours, theirs = [], []
    for number in tqdm(range(repeats + 1), desc=setting.mode, unit="call"):
        seconds = seconds_of(work.call)
        answer = reference.call() if reference is not None else None
        if not number:  # a warm-up
            forget_peak()
            continue
        ours.append(seconds)
        if answer is not None:
            theirs.append(answer["seconds"])
    modelled = (
        model_flops(config, setting.mode, setting.batch, side, setting.tokens) if setting.mode in PASSES else None
    )
    median = statistics.median(ours)
    rate = (modelled or work.flops) / median / (setting.data * setting.fsdp * setting.tensor)
    result = {
        **_conditions(setting),
        "seconds": spread(ours),
        "trace_seconds": work.trace_seconds,
        "compile_seconds": work.compile_seconds,
        "gflop": {"xla": work.flops / 1e9, "cost_model": modelled and modelled / 1e9},
        "gflop_per_second_and_device": rate / 1e9,
        "gemm_peak_gflop_per_second": peak / 1e9,
        "share_of_gemm_peak": rate / peak,
        "bytes": {"accessed": work.bytes_accessed, "arguments": work.argument_bytes, "temporary": work.temporary_bytes},
        "peak_bytes": _peak_bytes(),
    }
    if reference is not None:
        result["reference"] = {**reference.about, "seconds": spread(theirs), "peak_bytes": answer["peak_bytes"]}
        result["ratio"] = statistics.median(theirs) / median
        reference.close()
    if profile:
        result["profile"] = top_costs(work.call)
    return result


def run_load(setting: Setting, repeats: int, scratch: str | None) -> dict:
    """Loading a float32 checkpoint, in turn with reading its bytes; the files are in the page cache."""
    directory = pathlib.Path(tempfile.mkdtemp(prefix="dinalrm_load_", dir=scratch))
    try:
        loading.write_checkpoint(directory / "native", model_of(setting))
        reads, loads = [], []
        for number in tqdm(range(repeats + 1), desc="load", unit="call"):
            read_seconds, file_bytes = loading.read(directory / "native")
            seconds, peak = loading.load(directory / "native", setting.dtype)
            if number:
                reads.append(read_seconds)
                loads.append(seconds)
    finally:
        shutil.rmtree(directory)
    return {
        **_conditions(setting),
        "seconds": spread(loads),
        "read_seconds": spread(reads),
        "times_reading": statistics.median(loads) / statistics.median(reads),
        "file_bytes": file_bytes,
        "peak_bytes": peak,
    }


def run_plans(setting: Setting, targets: Sequence[str]) -> dict:
    """The program of a mode, compiled for devices that are not here.

    Raises:
        ConfigError: a chip that is not known or whose compiler is not here, a kernel that it does not have, or a mesh
            that does not fit.
    """
    plans = {}
    for target in tqdm([Target.parse(text) for text in targets], desc="compiling", unit="target"):
        mesh = make_mesh(MeshConfig(-1, setting.fsdp, setting.tensor), target.devices())
        if setting.mode in GENERATION:
            program = generation_program(setting, mesh)
        elif setting.mode in PASSES:
            config = model_of(setting)
            program = program_of(setting, config, mesh, shapes_of(setting, config, mesh))
        else:
            program = encoder_program(setting, mesh, encoder_shapes(setting, mesh))
        plans[str(target)] = plan(program.lower, target)
    size = f"{setting.resolution} x {setting.resolution} pixels, batch {setting.batch}, {setting.dtype}"
    heading = f"{setting.mode}, {size}; attention {setting.attention}, {setting.layers}, remat {setting.remat}"
    table = f"{heading}; jax {jax.__version__}\n\n{as_table(plans)}"
    return {
        "table": table,
        "setting": dataclasses.asdict(setting),
        "plans": [dataclasses.asdict(one) for one in plans.values()],
        "jax": jax.__version__,
    }


def _conditions(setting: Setting) -> dict:
    return {
        "setting": dataclasses.asdict(setting),
        "machine": {
            "device": jax.devices()[0].device_kind,
            "cores": os.cpu_count(),
            "processor": processor(),
            "environment": {name: os.environ[name] for name in FROM_ENVIRONMENT if name in os.environ},
        },
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "jaxlib": jaxlib.__version__},
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _peak_bytes() -> int:
    """Of the device where it has memory of its own, of all time; else of this process, since the warm-up."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use") or peak_bytes()


def as_text(result: dict) -> str:
    """The lines for people."""
    machine, setting = result["machine"], Setting(**result["setting"])
    size = f"{setting.resolution} x {setting.resolution} pixels, batch {setting.batch}, {setting.tokens} text tokens"
    how: list[str] = [setting.dtype]
    if setting.mode in PASSES:
        size += f", blocks: {setting.blocks}"
        how += [f"attention {setting.attention}", setting.layers, f"remat {setting.remat}"]
    how += ["LoRA merged"] * setting.merged
    mesh = {name: getattr(setting, name) for name in ("data", "fsdp", "tensor") if getattr(setting, name) > 1}
    how += [f"{name}={count}" for name, count in mesh.items()]
    lines = [
        f"{setting.mode}, {size}; {', '.join(how)}",
        f"jax {result['versions']['jax']}, {machine['device']}, {machine['cores']} cores, {machine['processor']}",
    ]
    if setting.mode == "load":
        lines[0] = f"load, {result['file_bytes'] / 1e9:.2f} GB of float32 to {setting.dtype}, page cache warm"
        lines += [
            f"  {_seconds(result['seconds'])}; reading the same bytes {_seconds(result['read_seconds'])}: "
            f"{result['times_reading']:.2f} times",
            f"  peak resident memory {_gib(result['peak_bytes'])}, the mapped files among it",
        ]
        return "\n".join(lines)
    flops = result["gflop"]
    by_model = "" if flops["cost_model"] is None else f"{flops['cost_model']:.0f} GFLOP by the cost model and "
    lines += [
        f"  {_seconds(result['seconds'])} a call; trace {result['trace_seconds']:.1f} s, "
        f"compile {result['compile_seconds']:.1f} s",
        f"  {by_model}{flops['xla']:.0f} GFLOP by XLA; {result['gflop_per_second_and_device']:.0f} GFLOP/s a device, "
        f"{100 * result['share_of_gemm_peak']:.0f} % of its GEMMs' {result['gemm_peak_gflop_per_second']:.0f}",
        f"  peak memory {_gib(result['peak_bytes'])}; of the program, arguments {_gib(result['bytes']['arguments'])}, "
        f"temporaries {_gib(result['bytes']['temporary'])}",
    ]
    if "reference" in result:
        theirs = result["reference"]
        lines.append(
            f"  the original, torch {theirs['torch']}{', compiled' * theirs['compiled']}: "
            f"{_seconds(theirs['seconds'])}, peak memory {_gib(theirs['peak_bytes'])}; its time over ours: "
            f"{result['ratio']:.2f}"
        )
    if "profile" in result:
        lines.append("   share   seconds  number  operation (seconds of all threads or streams together)")
    for cost in result.get("profile", ()):
        lines.append(f"  {100 * cost['share']:4.1f} %  {cost['seconds']:8.3f}  {cost['number']:6d}  {cost['name']}")
    return "\n".join(lines)


def _seconds(spread: dict[str, float]) -> str:
    return f"{spread['median']:.3f} s (median of {spread['calls']}; {spread['min']:.3f} to {spread['max']:.3f})"


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


def processor() -> str:
    """The CPU's name, as the system has it."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), "")


def main(options: BenchmarkOptions) -> None:
    """Times what the options name."""
    if options.output is not None:
        check_writable(options.output)
    if options.cache:
        enable_compilation_cache()
    if options.compile_for:
        disable_compilation_cache()
        result = run_plans(options.setting, options.compile_for)
        print(result["table"])
    elif options.setting.mode == "load":
        result = run_load(options.setting, options.repeats, options.scratch)
    else:
        if options.setting.mode in ("gradient", "train"):
            keep_freed_memory()  # as the commands `align` and `train` do
        result = run(options.setting, options.repeats, options.reference, options.compile_reference, options.profile)
    if not options.compile_for:
        print(as_text(result))
    if options.output is not None:
        write_json(pathlib.Path(options.output), result, indent=1)


if __name__ == "__main__":
    run_command(main, BenchmarkOptions, errors=(ValueError, OSError, RuntimeError), interrupted="nothing was written")
