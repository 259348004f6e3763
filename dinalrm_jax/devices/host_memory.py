"""What glibc does with memory that this process has freed."""

import ctypes
from importlib.metadata import entry_points
from importlib.util import find_spec

import jax

# Of malloc.h, for mallopt.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8


def keep_freed_memory() -> None:
    """Has a process that computes on CPUs keep what it frees.

    Call it before JAX starts its threads, which it does at the first use of a device. XLA takes a program's temporaries
    from the system at every call, and gives them back after it: 2.7 GiB of a full-size train step, a page at a time.
    Kept, they are there at the next call, unless something small has taken a place among them meanwhile: then there
    are two such pieces, or three, until `return_freed_memory`. (Another C library than glibc does as it did.)
    """
    _set(M_ARENA_MAX, 1)  # threads have no heaps of their own, which end at 64 MiB
    _set(M_MMAP_MAX, 0)  # no mapping for a large piece, which ends when it is freed
    _set(M_TRIM_THRESHOLD, -1)  # the heap does not shrink


def stop_keeping() -> None:
    """Undoes `keep_freed_memory` for what is large: programs that take turns would each keep their own.

    glibc's own rule is to map what is larger than the largest mapping freed so far, 32 MiB at most, and to keep
    twice that. It goes no further once an option is set, so where it ends is set here.
    """
    _set(M_MMAP_MAX, 65536)
    _set(M_MMAP_THRESHOLD, 32 << 20)
    _set(M_TRIM_THRESHOLD, 64 << 20)
    return_freed_memory()


def return_freed_memory() -> None:
    """Gives back to the system what was freed and glibc keeps: 0.8 GiB after a full-size train step is compiled."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # another C library has none
    if trim is not None:
        trim(0)


def _set(option: int, value: int) -> None:
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None and _only_cpus():
        set_option(option, value)


def _only_cpus() -> bool:
    """Whether JAX will compute on CPUs, as far as can be known before it has looked for devices."""
    named = jax.config.jax_platforms  # type: ignore[attr-defined]
    return named == "cpu" if named else not entry_points(group="jax_plugins") and find_spec("libtpu") is None
