"""What glibc does with memory that this process has freed."""

import ctypes

# Of malloc.h, for mallopt.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Has the process keep what it frees; call it before JAX starts its threads, that is, uses a device.

    XLA takes a program's temporaries from the system at every call, and gives them back after it: on a CPU 2.7 GiB of
    a full-size train step, a page at a time. Kept, they are there at the next call. A process then holds up to twice
    the temporaries of its largest program. (Another C library than glibc does as it did.)
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(M_ARENA_MAX, 1)  # only the main heap holds more than 64 MiB in one piece
        set_option(M_MMAP_MAX, 0)
        set_option(M_TRIM_THRESHOLD, -1)


def return_freed_memory() -> None:
    """Gives back to the system what was freed and glibc keeps: 0.8 GiB after a full-size train step is compiled."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # another C library has none
    if trim is not None:
        trim(0)
