"""Which operations a call spends its time in, by JAX's profiler."""

import collections
import pathlib
import re
import tempfile
from collections.abc import Callable

import jax


def top_costs(call: Callable[[], object], count: int = 12) -> list[dict[str, float | str]]:
    """The costliest kinds of operations of one call: name, seconds summed over threads or streams, share, number.

    A kind is an instruction's name in the compiled program without its number. What is left of the
    threads' time between operations is "(waiting)".
    """
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            call()
        (path,) = pathlib.Path(directory).rglob("*.xplane.pb")
        lines = list(_device_lines(jax.profiler.ProfileData.from_file(str(path))))
    seconds, numbers, total = collections.Counter(), collections.Counter(), 0.0
    for events in lines:
        total += (max(end for _, _, end in events) - min(start for _, start, _ in events)) / 1e9
        for name, start, end in events:
            kind = re.sub(r"[.\d]+$", "", name)
            seconds[kind] += (end - start) / 1e9
            numbers[kind] += 1
    seconds["(waiting)"] = max(0.0, total - seconds.total())
    return [
        {"name": kind, "seconds": spent, "share": spent / total, "number": numbers[kind]}
        for kind, spent in seconds.most_common(count)
    ]


def _device_lines(profile):
    """(name, start, end) of the operations of every thread or stream that ran them, containers left out."""
    on_device = [plane for plane in profile.planes if plane.name.startswith("/device:")]
    for plane in on_device or profile.planes:
        for line in plane.lines:
            wanted = line.name.startswith(("XLA Ops", "Stream")) if on_device else "XLAEigen" in line.name
            events = [
                (event.name, event.start_ns, event.start_ns + event.duration_ns)
                for event in line.events
                if not event.name.startswith(("ThunkExecutor", "while", "SlinkyThreadPool"))
            ]
            if wanted and events:
                yield events
