"""Several processes as one: joining them, and what only the first of them does."""

import os
import sys
import traceback

import jax

from dinalrm_jax.config import ConfigError

HELP = (
    "Join the other processes of this job: found by itself on TPU pods, Slurm and Open MPI, elsewhere from "
    "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID."
)


def initialize(wanted: bool) -> None:
    """Joins the job's processes where `wanted`; call it before anything touches a device.

    Raises:
        ConfigError: the environment does not say which processes there are.
    """
    if not wanted:
        return
    try:
        count, number = (
            int(os.environ[name]) if name in os.environ else None for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        )
        jax.distributed.initialize(num_processes=count, process_id=number)
    except ValueError as error:
        raise ConfigError(f"--distributed found no processes to join: {error}\n{HELP}") from error
    sys.excepthook = _end


def _end(*exception) -> None:
    """Ends a crashed process at once: the usual way out waits minutes for the others, which wait for this one."""
    traceback.print_exception(*exception)
    sys.stderr.flush()
    os._exit(1)


def is_first() -> bool:
    """Whether this process is the one that prints and writes what is written once."""
    return jax.process_index() == 0
