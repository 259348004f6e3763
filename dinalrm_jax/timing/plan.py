"""Programs compiled for accelerators that are not here: what they need of a device's memory, and what they run."""

import collections
import dataclasses
import re
import time
from collections.abc import Callable, Mapping

import jax

from dinalrm_jax.devices.chips import GIB, Target, unchecked_cudnn
from dinalrm_jax.timing.collectives import collectives

# How a compiled program's text calls the kernels of `model.backbone.attention`.
KERNELS = {"splash": r'custom_call_target="tpu_custom_call"', "cudnn": r'custom_call_target="__cudnn\$fmha'}
# What a TPU's compiler says where it stops.
EXHAUSTED = re.compile(r"HLO temporaries \(([\d.]+)([GMK])\) exceeds|[Uu]sed ([\d.]+)([GMK]) of")
UNITS = {"G": 1.0, "M": 1 / 1024, "K": 1 / 1024**2}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a compiler says of a program on one of its devices. Sizes are GiB; None where it does not say.

    Attributes:
        target: the devices.
        available: what a program may use.
        needed: the most that it uses at a time, its arguments among it; of a program that a compiler gives up for lack
            of memory what that names, which may be its temporaries alone.
        arguments, temporaries: what it is given, parameters above all, and what it needs beside.
        flops: of a device; of a loop's body one pass, and none of the kernels'.
        kernels: calls of attention kernels in the program's text, by kernel.
        collectives: how many of a kind with which numbers, and how many GiB a device sends for them.
        trace_seconds, compile_seconds: what making it took here.
    """

    target: str
    available: float
    needed: float
    arguments: float | None
    temporaries: float | None
    flops: float | None
    kernels: dict[str, int]
    collectives: dict[str, tuple[int, float]]
    trace_seconds: float
    compile_seconds: float

    @property
    def fits(self) -> bool:
        return self.needed <= self.available


def plan(lower: Callable[[], jax.stages.Lowered], target: Target) -> Plan:
    """Compiles what `lower` lowers, a program over shapes that lie on the target's mesh.

    Raises:
        ConfigError: a kernel that the target does not have, or a mesh that the heads do not divide.
    """
    available = target.chip.usable / GIB
    with unchecked_cudnn():
        started = time.perf_counter()
        lowered = lower()
        traced = time.perf_counter()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            found = EXHAUSTED.search(str(error))
            if found is None:
                raise
            needed = float(found[1] or found[3]) * UNITS[found[2] or found[4]]
            seconds = traced - started, time.perf_counter() - traced
            return Plan(str(target), available, needed, None, None, None, {}, {}, *seconds)
        ended = time.perf_counter()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    sums: dict[str, tuple[int, float]] = collections.defaultdict(lambda: (0, 0.0))
    for one in collectives(text, target.count):
        name = f"{one.kind} {' '.join(one.dtypes)}"
        sums[name] = (sums[name][0] + 1, sums[name][1] + one.sent_bytes / GIB)
    flops = (compiled.cost_analysis() or {}).get("flops")
    return Plan(
        str(target),
        available,
        memory.peak_memory_in_bytes / GIB,
        memory.argument_size_in_bytes / GIB,
        memory.temp_size_in_bytes / GIB,
        flops and float(flops),
        {name: calls for name, pattern in KERNELS.items() if (calls := len(re.findall(pattern, text)))},
        dict(sums),
        traced - started,
        ended - traced,
    )


def as_table(plans: Mapping[str, Plan]) -> str:
    """Markdown, a row a plan, under its name where that is another than its devices'."""
    named = any(name != one.target for name, one in plans.items())
    names = (
        *[""] * named,
        "devices",
        "fits",
        "needed, GiB",
        "arguments + temporaries",
        "of",
        "kernels",
        "sent",
        "compile, s",
    )
    lines = [f"| {' | '.join(names)} |", f"|{len(names) * '---|'}"]
    for name, one in plans.items():
        parts = "" if one.arguments is None else f"{one.arguments:.2f} + {one.temporaries:.2f}"
        kernels = ", ".join(f"{kernel} x {calls}" for kernel, calls in one.kernels.items()) or "XLA's own"
        sent = ", ".join(f"{kind} x {calls}: {size:.2f} GiB" for kind, (calls, size) in one.collectives.items())
        fits = "yes" if one.fits else f"no, by {one.needed - one.available:.2f} GiB"
        sizes = (f"{one.needed:.2f}", parts, f"{one.available:.2f}")
        cells = (one.target, fits, *sizes, kernels, sent or "nothing", f"{one.compile_seconds:.0f}")
        lines.append(f"| {' | '.join((name, *cells) if named else cells)} |")
    return "\n".join(lines)
