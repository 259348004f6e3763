"""Which operations a call spends its time in, by JAX's profiler."""

import collections
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator

import jax

# Events on a thread or stream that hold others or are none of the program's.
CONTAINERS = ("ThunkExecutor", "while", "SlinkyThreadPool", "ThreadpoolListener", "end: ")


def top_costs(call: Callable[[], object], count: int = 12) -> list[dict[str, float | str]]:
    """The costliest kinds of operations of one call: name, seconds summed over threads or streams, share, number.

    A kind is an instruction's name in the compiled program without its number; shares are of all
    operations' seconds. Empty where the profiler saw none.
    """
    seconds: dict[str, float] = collections.defaultdict(float)
    numbers = collections.Counter()
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            call()
        for path in pathlib.Path(directory).rglob("*.xplane.pb"):
            for name, nanoseconds in _operations(jax.profiler.ProfileData.from_file(str(path))):
                kind = re.sub(r"[.\d]+$", "", name)
                seconds[kind] += nanoseconds / 1e9
                numbers[kind] += 1
    total = sum(seconds.values())
    costliest = sorted(seconds.items(), key=lambda item: item[1], reverse=True)[:count]
    return [
        {"name": kind, "seconds": spent, "share": spent / total, "number": numbers[kind]} for kind, spent in costliest
    ]


def _operations(profile: jax.profiler.ProfileData) -> Iterator[tuple[str, float]]:
    """(name, nanoseconds) of every operation: of a device's streams, or of the CPU backend's threads."""
    devices = [plane for plane in profile.planes if plane.name.startswith("/device:")]
    for plane in devices or profile.planes:
        for line in plane.lines:
            if line.name.startswith(("XLA Ops", "Stream") if devices else "tf_XLA"):
                for event in line.events:
                    if not event.name.startswith(CONTAINERS):
                        yield event.name, event.duration_ns
