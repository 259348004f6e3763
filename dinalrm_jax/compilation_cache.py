"""Compiled programs kept between runs, so that a second start need not compile again."""

import os
import pathlib

import jax


def enable_compilation_cache() -> None:
    """Turns on JAX's persistent cache; JAX_COMPILATION_CACHE_DIR says where, else ~/.cache/dinalrm_jax."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path("~/.cache/dinalrm_jax/xla").expanduser()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
