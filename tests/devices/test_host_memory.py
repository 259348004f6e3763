import ctypes
import os
import subprocess
import sys
import types

import pytest

from dinalrm_jax.devices import host_memory

PROGRAM = """
import resource
import sys
import jax
import jax.numpy as jnp
from dinalrm_jax.devices.host_memory import keep_freed_memory, stop_keeping

if "return" not in sys.argv:
    keep_freed_memory()
x = jnp.ones((1024, 64))
wide, narrow = jnp.ones((64, 1 << 14)), jnp.ones((1 << 14, 4))
work = jax.jit(lambda x: jax.nn.softmax(x @ wide) @ narrow).lower(x).compile()  # its logits are there while it runs
assert work.memory_analysis().temp_size_in_bytes >= 64 << 20
for _ in range(10):
    work(x).block_until_ready()
if "stop" in sys.argv:
    stop_keeping()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    work(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_a_program_finds_its_temporaries_where_the_last_call_left_them():
    """Else every call takes each page of them from the system again: 16,384 pages of 4 KiB, ten times."""
    taken, environment = {}, {**os.environ, "JAX_PLATFORMS": "cpu"}
    for how in ("keep", "return", "stop"):
        command = [sys.executable, "-c", PROGRAM, how]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        taken[how] = int(done.stdout)
    assert taken["keep"] < taken["return"] / 5, taken
    assert taken["stop"] > taken["return"] / 2, taken


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
