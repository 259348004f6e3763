import ctypes
import os
import subprocess
import sys
import types

import numpy as np
import pytest

from dinalrm_jax import align, train
from dinalrm_jax.cli.options import AlignOptions, TrainOptions
from dinalrm_jax.devices import host_memory, processes

PROGRAM = """
import resource
import sys
import jax
import jax.numpy as jnp
from dinalrm_jax.devices.host_memory import keep_freed_memory

if "keep" in sys.argv:
    keep_freed_memory()
x = jnp.ones((1024, 64))
wide, narrow = jnp.ones((64, 1 << 14)), jnp.ones((1 << 14, 4))
work = jax.jit(lambda x: jax.nn.softmax(x @ wide) @ narrow).lower(x).compile()  # its logits are there while it runs
assert work.memory_analysis().temp_size_in_bytes >= 64 << 20
for _ in range(10):
    work(x).block_until_ready()
taken = []
for _ in range(21):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work(x).block_until_ready()
    taken.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(taken)[10])  # the median: a call now and then takes another piece
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_a_program_finds_its_temporaries_where_the_last_call_left_them():
    """Else every call takes each page of them from the system again: 16,384 pages of 4 KiB."""
    taken, environment = {}, {**os.environ, "JAX_PLATFORMS": "cpu"}
    for how in ("keep", "return"):
        command = [sys.executable, "-c", PROGRAM, how]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        taken[how] = int(done.stdout)
    assert taken["keep"] < taken["return"] / 5, taken


STOPPED = """
import pathlib
import numpy as np
from dinalrm_jax.devices.host_memory import keep_freed_memory, stop_keeping

def resident():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) >> 8  # MiB

keep_freed_memory()
start = resident()
np.ones(600 << 17)  # 600 MiB, freed at once
print(resident() - start)
stop_keeping()
print(resident() - start)
large, beyond = np.ones(600 << 17), np.ones(200 << 17)
del large
print(resident() - start)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_memory_is_kept_until_that_is_stopped():
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", STOPPED], env=environment, capture_output=True, text=True, check=True)
    found = [int(line) for line in done.stdout.split()]
    np.testing.assert_allclose(found, [600, 0, 200], atol=50, err_msg="MiB; the last is what lies beyond the hole")


@pytest.mark.parametrize(
    ("named", "plugins", "libtpu", "expected"),
    [
        ("cpu", ["cuda"], None, True), ("tpu", [], None, False), (None, [], None, True), (None, ["cuda"], None, False),
        (None, [], "a spec", False),
    ],
)  # fmt: skip
def test_freed_memory_is_kept_where_only_cpus_compute(monkeypatch, named, plugins, libtpu, expected):
    monkeypatch.setattr(host_memory, "jax", types.SimpleNamespace(config=types.SimpleNamespace(jax_platforms=named)))
    monkeypatch.setattr(host_memory, "entry_points", lambda group: plugins)
    monkeypatch.setattr(host_memory, "find_spec", lambda name: libtpu)
    assert host_memory._only_cpus() is expected


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (train, TrainOptions(config="configs/quickstart.py")),
        (align, AlignOptions(config="configs/quickstart_align.py")),
    ],
)
def test_a_run_keeps_memory_before_it_looks_for_devices(monkeypatch, command, options):
    """Later is too late: JAX's threads have heaps of their own by then, and no error says so."""
    called = []

    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "keep_freed_memory", lambda: called.append("kept"))
    monkeypatch.setattr(processes, "initialize", stop)
    with pytest.raises(KeyboardInterrupt):
        command.main(options)
    assert called == ["kept"]
