"""What surrounds compilation: the cache of compiled programs, and whether one fits."""

import os
from collections.abc import Callable

import jax
from jax._src import compilation_cache
from jax._src.lru_cache import LRUCache

from dinalrm_jax.disk import AnyPath, resolved


class ReplacingCache(LRUCache):
    """JAX's directory of compiled programs, where a program that was compiled anew takes its file's place.

    JAX compiles, and warns, where it cannot read a file: half of one, say, of a process that was killed or a disk that
    was full. But it leaves the file as it is, and so it would compile at every start from then on.
    """

    def put(self, key: str, value: bytes) -> None:
        (self.path / f"{key}-cache").unlink(missing_ok=True)
        super().put(key, value)


def enable_compilation_cache(workdir: AnyPath | None = None) -> None:
    """Turns on JAX's persistent cache: a start loads the programs that one before it compiled.

    JAX_COMPILATION_CACHE_DIR says where they are. Without it, a job of several processes that has a directory of its
    own keeps them there, as WORKDIR/programs, since its first process alone writes what all of them read; anything else
    keeps them in ~/.cache/dinalrm_jax/xla. Call it after `processes.initialize`.

    What a program is kept under says what it is, the compiler's version, options and devices. It does not say where
    this package or the cache lie, so both may move: a cache that is copied, a container, another host.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        shared = workdir is not None and jax.process_count() > 1
        directory = resolved(workdir) / "programs" if shared else resolved("~/.cache/dinalrm_jax/xla")
        jax.config.update("jax_compilation_cache_dir", str(directory))
    # The small ones too: hundreds that take a tenth of a second each.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # TPU kernels hold the paths of their source; those within the packages are enough to find it.
    jax.config.update("jax_hlo_source_file_canonicalization_regex", r".*/(?=dinalrm_jax/|jax/)")
    if jax.default_backend() != "gpu":  # that alone has a cache beside this one, whose path would be in the key
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    compilation_cache.LRUCache = ReplacingCache  # type: ignore[misc]  # JAX asks nobody how to write files


def disable_compilation_cache() -> None:
    """For devices that are not here: JAX writes a program for them too, and then cannot load it."""
    jax.config.update("jax_enable_compilation_cache", False)


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
