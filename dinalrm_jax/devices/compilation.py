"""What surrounds compilation: the cache of compiled programs, and the memory that compiling leaves behind."""

import ctypes
import os
import pathlib
from collections.abc import Callable

import jax


def enable_compilation_cache() -> None:
    """Turns on JAX's persistent cache, so that a second start need not compile again.

    JAX_COMPILATION_CACHE_DIR says where, else ~/.cache/dinalrm_jax.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path("~/.cache/dinalrm_jax/xla").expanduser()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def return_freed_memory() -> None:
    """Gives back to the system what the compiler freed and glibc keeps: 0.8 GiB after a full-size train step."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # another C library has none
    if trim is not None:
        trim(0)


def compile_if_it_fits(
    lowered: jax.stages.Lowered, fits: Callable[[jax.stages.Compiled], bool]
) -> jax.stages.Compiled | None:
    """The program, or None where the compiler or `fits` says that it needs more memory than there is."""
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None
    return compiled if fits(compiled) else None


def fits_beside(compiled: jax.stages.Compiled) -> bool:
    """Whether a device has room for a program's temporaries and results beside what it holds now.

    True where the device does not say how much memory it has (a CPU), or the compiler how much a program needs.
    """
    stats, analysis = jax.local_devices()[0].memory_stats() or {}, compiled.memory_analysis()
    if "bytes_limit" not in stats or analysis is None:
        return True
    return stats["bytes_in_use"] + analysis.temp_size_in_bytes + analysis.output_size_in_bytes <= stats["bytes_limit"]
