"""Several processes as one: joining them, and what only the first of them does."""

import os
import sys
import threading
import traceback
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from dinalrm_jax.mapping import ConfigError

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
    # Connects the processes while they stand side by side: on CPUs, the first exchange ends the job where one of
    # them comes to it half a minute late, later ones wait.
    barrier("start")


def leave(status: int) -> NoReturn:
    """Ends this process; one of several at once, as the usual way out waits for the others, which wait for it."""
    if jax.process_count() == 1:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _end(*exception) -> None:
    if threading.current_thread() is not threading.main_thread():
        return  # a library's thread, whose failure the main one raises too
    traceback.print_exception(*exception)
    leave(1)


def is_first() -> bool:
    """Whether this process is the one that prints and writes what is written once."""
    return jax.process_index() == 0


def devices() -> str:
    """The devices of the job, for people: "8 x TPU v5 lite of 2 processes"."""
    several = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}{several}"


def say(text: str) -> None:
    """Prints once for all processes."""
    if is_first():
        print(text, flush=True)


def progress(**options) -> tqdm:
    """A bar, shown by the first process."""
    return tqdm(**options, disable=not is_first(), dynamic_ncols=True)


def gather_bytes(data: bytes) -> list[bytes]:
    """Every process's bytes, in the processes' order, on every process."""
    if jax.process_count() == 1:
        return [data]
    lengths = multihost_utils.process_allgather(np.array([len(data)])).ravel()
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row[:length].tobytes() for row, length in zip(rows, lengths)]


def all_agree(yes: bool) -> bool:
    """Whether every process says yes; each calls it at the same point of its work."""
    return all(data == b"1" for data in gather_bytes(b"1" if yes else b"0"))


def barrier(name: str) -> None:
    """Waits for all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
