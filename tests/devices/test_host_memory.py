import subprocess
import sys

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


def test_a_program_finds_its_temporaries_where_the_last_call_left_them():
    """Else every call takes each page of them from the system again: 16,384 pages of 4 KiB, ten times."""
    taken = {}
    for how in ("keep", "return"):
        done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
        taken[how] = int(done.stdout)
    assert taken["keep"] < taken["return"] / 5, taken
