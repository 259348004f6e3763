"""How much memory this process has needed, for processes that may be ours or the PyTorch original's.

Imports nothing but the standard library: what it measures must not be its own.
"""

import contextlib
import pathlib
import resource


def forget_peak() -> None:
    """Starts the peak anew from what is held now, where the system can (Linux); else it stays that of all time."""
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The most resident memory since `forget_peak`."""
    try:
        status = pathlib.Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
