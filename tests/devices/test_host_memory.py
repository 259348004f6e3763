import ctypes
import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

from dinalrm_jax.devices import host_memory

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
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    work(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_a_program_finds_its_temporaries_where_the_last_call_left_them():
    """Else every call takes each page of them from the system again: 16,384 pages of 4 KiB, ten times."""
    taken, environment = {}, {**os.environ, "JAX_PLATFORMS": "cpu"}
    for how in ("keep", "return"):
        command = [sys.executable, "-c", PROGRAM, how]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        taken[how] = int(done.stdout)
    assert taken["keep"] < taken["return"] / 5, taken


BOUNDED = """
import pathlib
import jax
import jax.numpy as jnp
import numpy as np
from dinalrm_jax.devices.host_memory import FreedMemory, keep_freed_memory

def resident():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) >> 8  # MiB

keep_freed_memory()
x, wide = jnp.ones((1024, 64)), jnp.ones((64, 1 << 14))
work = jax.jit(lambda x, wide: jax.nn.softmax(x @ wide) @ jnp.ones((1 << 14, 4))).lower(x, wide).compile()
assert work.memory_analysis().temp_size_in_bytes >> 20 == 64
freed = FreedMemory()
freed.before(work)
start = resident()
for size in (145, 200, 145, 600, 600):
    np.ones((size << 17,))  # that many MiB, freed at once
    freed.before(work)
    print(resident() - start)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_what_is_kept_has_a_bound():
    """1.5 times the next program's 64 MiB, and 64 more: 145 MiB stay, 200 go back, and 600 as often as they come."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", BOUNDED], env=environment, capture_output=True, text=True, check=True)
    np.testing.assert_allclose(
        [int(line) for line in done.stdout.split()], [145, 0, 145, 0, 0], atol=14
    )  # 160 is the bound


def test_resident_bytes_are_the_kernels():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    (kib,) = [line.split()[1] for line in lines if line.startswith("VmRSS")]
    assert host_memory._resident_bytes() == pytest.approx(1024 * int(kib), rel=0.05)


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
