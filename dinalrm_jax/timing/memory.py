"""How much memory this process has needed, for processes that may be ours or the PyTorch original's.

Imports nothing but the standard library: what it measures must not be its own.
"""

import contextlib
import pathlib
import re
import resource
import sys


def forget_peak() -> None:
    """Starts the peak anew from what is held now, where the system can (Linux); else it stays that of all time."""
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The most resident memory since `forget_peak`."""
    with contextlib.suppress(OSError):
        if found := re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text()):
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
