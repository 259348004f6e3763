"""What a second start finds of the first one's compiling, counted by JAX itself."""

import base64
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PARTS = ("backbone", "trained")  # of a model
COUNT = """
import sys
import jax
seen = []
jax.monitoring.register_event_listener(lambda event, **_: seen.append(event.rpartition("/")[2]))
def counted():
    return f"of {seen.count('compile_requests_use_cache')} programs {seen.count('cache_hits')} were there"
"""
ONE = """
import numpy as np
from dinalrm_jax.devices.compilation import enable_compilation_cache
enable_compilation_cache()
print(jax.jit(lambda x: jax.numpy.tanh(x @ x).sum())(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)))
print(counted())
"""
TRAIN = """
import atexit
import runpy
atexit.register(lambda: print(counted()))
runpy.run_module("dinalrm_jax.train", run_name="__main__")
"""
TOGETHER = """
import pathlib
import numpy as np
from dinalrm_jax.devices import processes
from dinalrm_jax.devices.compilation import enable_compilation_cache
from dinalrm_jax.devices.mesh import MeshConfig, make_mesh
processes.initialize(True)
before = len(seen)
enable_compilation_cache(pathlib.Path(sys.argv[1]))
mesh = make_mesh(MeshConfig())
rows = jax.sharding.NamedSharding(mesh, jax.P("data"))
x = jax.make_array_from_callback((4, 64), rows, lambda index: np.ones((4, 64), np.float32)[index])
print(float(jax.jit(lambda x: (x @ x.T).sum(), out_shardings=jax.sharding.NamedSharding(mesh, jax.P()))(x)))
del seen[:before]
print(counted(), flush=True)
jax.distributed.shutdown()  # which waits for the others: none ends while another still reads from it
"""
KERNEL = """
from dinalrm_jax.devices.compilation import enable_compilation_cache
from dinalrm_jax.model.backbone.attention import splash
enable_compilation_cache()
x = jax.ShapeDtypeStruct((1, 600, 2, 64), "bfloat16")
print(jax.jit(splash.attend).trace(x, x, x).lower(lowering_platforms=("tpu",)).as_text())
"""


def start(script: str, *arguments: str, root: pathlib.Path = ROOT, **environment: str) -> subprocess.Popen:
    env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    return subprocess.Popen(
        [sys.executable, "-c", COUNT + script, *arguments],
        cwd=root,
        env=env | {"JAX_PLATFORMS": "cpu"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> tuple[str, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err


def counts(out: str) -> tuple[int, int]:
    """How many programs were asked for, and how many of them were in the cache."""
    (found,) = re.findall(r"of (\d+) programs (\d+) were there", out)
    return int(found[0]), int(found[1])


@pytest.mark.heavy
def test_a_second_run_compiles_nothing(tmp_path):
    """Every program of a run, its small ones too, wherever the cache lies now; and the numbers are the same."""
    flags = ["--config=tests/tiny_run.py", "--config.scenes.train_pairs=16", "--config.scenes.eval_pairs=4"]
    flags += [f"--config.{stage}.steps=2" for stage in ("generator", "reward")]
    models, programs = [], []
    for name in ("first", "second"):
        cache = tmp_path / f"cache of the {name}"
        workdir = f"--workdir={tmp_path / name}"
        out, _ = finish(start(TRAIN, *flags, workdir, JAX_COMPILATION_CACHE_DIR=str(cache)))
        programs.append(counts(out))
        models.append([(tmp_path / name / "model" / f"{part}.safetensors").read_bytes() for part in PARTS])
        if name == "first":
            shutil.move(cache, tmp_path / "cache of the second")
    (asked, _), (again, found) = programs
    assert asked == again == found > 50
    assert models[0] == models[1]


def test_a_broken_file_is_said_and_replaced(tmp_path):
    def one() -> tuple[str, tuple[int, int], str]:
        out, err = finish(start(ONE, JAX_COMPILATION_CACHE_DIR=str(tmp_path)))
        return out.splitlines()[0], counts(out), err

    value, (asked, _), _ = one()
    for path in tmp_path.glob("*-cache"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    again, (_, found), said = one()
    assert "Error reading persistent compilation cache entry for 'jit__lambda'" in said
    assert (again, found) == (value, 0)
    assert one() == (value, (asked, asked), "")


def test_a_job_keeps_programs_beside_its_run(tmp_path):
    """Where all of its processes see them. The first writes and reads; the second, on CPUs, has keys of its own."""
    found = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        job = {"JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_CPU_DEVICES": "2"}
        processes = [start(TOGETHER, str(tmp_path), JAX_PROCESS_ID=number, **job) for number in "01"]
        found.append([finish(process)[0] for process in processes])
    assert list((tmp_path / "programs").glob("*-cache"))
    values = {line for outs in found for out in outs for line in out.splitlines() if line[0].isdigit()}
    assert len(values) == 1
    assert [counts(first) for first, _ in found] == [(1, 0), (1, 1)]


def test_a_kernel_says_nothing_of_where_the_packages_lie():
    """Its body is in the program's key; the paths within the packages stay, so that a profile can name lines."""
    out, _ = finish(start(KERNEL))
    bodies = [base64.b64decode(body) for body in re.findall(r"body\\22: \\22([A-Za-z0-9+/=]+)", out)]
    assert bodies
    paths = {path.decode() for body in bodies for path in re.findall(rb"[\w/.-]+\.py", body)}
    assert "dinalrm_jax/model/backbone/attention/splash.py" in paths
    assert not [path for path in paths if path.startswith("/")]
