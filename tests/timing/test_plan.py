"""What is said of programs for devices that are not here; the compilers of TPUs and GPUs are there in few places."""

import dataclasses
import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import configs.hpdv3 as hpdv3
from dinalrm_jax.config import TrainConfig
from dinalrm_jax.devices.chips import GIB, Target, peak_flops
from dinalrm_jax.mapping import ConfigError, from_mapping
from dinalrm_jax.timing.forecast import advice
from dinalrm_jax.timing.plan import EXHAUSTED, Plan, as_table, plan
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("v5e", (1, 1)), ("v5e:8", (2, 4)), ("v5e:4x4", (4, 4)), ("v6e:16", (4, 4)), ("v5p:4", (2, 2, 1)),
        ("v5p:2x2x2", (2, 2, 2)), ("v5p:16", (2, 2, 4)), ("h100", (1,)), ("h200:8", (8,)),
    ],
)  # fmt: skip
def test_targets(text, shape):
    target = Target.parse(text)
    assert target.shape == shape
    assert target.count == np.prod(shape)
    assert Target.parse(str(target)) == target


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v9", "'v9' is no chip that can be compiled for; choose one of v4, v5e, v5p, v6e, h100, h200"),
        ("v5e:3", "'v5e:3' is no slice of v5e; its topologies are like v5e:2x4"),
        ("v5p:2x2", "'v5p:2x2' is no slice of v5p; its topologies are like v5p:2x2x2"),
        ("h100:two", "names no devices; write h100:8"),
        ("v5e:0", "names no devices; write v5e:8"),
    ],
)
def test_targets_that_there_are_not(text, message):
    with pytest.raises(ConfigError, match=message):
        Target.parse(text)


def test_peaks_by_the_name_that_jax_has():
    assert (peak_flops("TPU v5"), peak_flops("TPU v5 lite")) == (459e12, 197e12)
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA GeForce") is None


def test_a_plan_counts_bytes_and_what_devices_send():
    """A product of known sizes whose rows two devices share, and whose sum they exchange."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    rows = jax.NamedSharding(mesh, jax.P("data"))
    x = jax.ShapeDtypeStruct((2048, 4096), jnp.float32, sharding=rows)
    found = plan(lambda: jax.jit(lambda x: (x.T @ x).sum(axis=1)).lower(x), Target.parse("h100:2"))
    assert found.arguments == 1024 * 4096 * 4 / GIB
    assert found.temporaries >= 4096 * 4096 * 4 / GIB
    assert found.needed >= found.arguments
    assert found.flops >= 2 * 4096 * 4096 * 1024
    ((name, (calls, size)),) = found.collectives.items()
    assert (name, calls) == ("all-reduce f32", 1)
    assert size in (4096 * 4 / GIB, 4096 * 4096 * 4 / GIB)  # a ring of two sends as much as there is
    assert found.fits
    assert not dataclasses.replace(found, available=found.needed / 2).fits


def test_what_a_tpu_compiler_says_where_it_stops():
    said = "the total memory required for HLO temporaries (30.85G) exceeds available HBM (15.75G)."
    assert EXHAUSTED.search(said).groups()[:2] == ("30.85", "G")


def test_a_table_and_advice():
    plans = {
        "train step": Plan("v5e", 15.75, 40.5, None, None, None, {}, {}, 1.0, 2.0),
        "evaluation": Plan("v5e", 15.75, 4.0, 3.0, 1.0, 1e12, {"splash": 6}, {"all-reduce f32": (2, 0.25)}, 1.0, 2.0),
    }
    lines = as_table(plans).splitlines()
    assert "| train step | v5e | no, by 24.75 GiB | 40.50 |" in lines[2]
    assert "| 4.00 | 3.00 + 1.00 | 15.75 | splash x 6 | all-reduce f32 x 2: 0.25 GiB |" in lines[3]
    config = from_mapping(TrainConfig, hpdv3.get_config())
    assert "train step does not fit; reward.micro_batches=2" in advice(config, plans)
    assert advice(config, {"evaluation": plans["evaluation"]}) == "it fits"
    kept = dataclasses.replace(config, execution=dataclasses.replace(config.execution, remat="none"))
    assert 'execution.remat="block"' in advice(kept, plans)


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env=env | environment)


def test_commands_refuse_before_they_compile():
    for arguments, message in (
        (("-m", "dinalrm_jax.benchmark", "--compile-for", "v9"), "'v9' is no chip"),
        (("-m", "dinalrm_jax.benchmark", "--compile-for", "v5e", "--profile"), "--compile-for runs nothing"),
        (("-m", "dinalrm_jax.benchmark", "--compile-for", "v5e", "--cache"), "no device here to load onto"),
        (
            ("-m", "dinalrm_jax.train", "--config", "configs/hpdv3.py", "--check-memory"),
            "--check-memory and --for go together",
        ),
        (
            ("-m", "dinalrm_jax.train", "--config", "configs/hpdv3.py", "--for", "v5e"),
            "--check-memory and --for go together",
        ),
        (
            ("-m", "dinalrm_jax.train", "--config", "configs/ablation.py", "--check-memory", "--for", "v5e"),
            "every run of a sweep",
        ),
    ):
        done = command(*arguments)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
    if importlib.util.find_spec("libtpu") is None:
        done = command("-m", "dinalrm_jax.benchmark", "--compile-for", "v5e")
        assert "pip install libtpu" in done.stderr


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiles for a TPU with libtpu: pip install it"
)
DEVICES = """
from dinalrm_jax.devices.chips import CHIPS, Target
from dinalrm_jax.devices.mesh import MeshConfig, make_mesh
for name, chip in CHIPS.items():
    if chip.platform == "tpu":
        for count in (1, 4, 8):
            target = Target.parse(f"{name}:{count}")
            devices = target.devices()
            mesh = make_mesh(MeshConfig(data=-1), devices)
            print(name, count, len(devices), mesh.size, devices[0].device_kind == chip.kind)
"""


@needs_libtpu
def test_every_chip_of_a_slice_is_one_device():
    """A v4's two cores too, and JAX makes a mesh of them, which it does of no half chips."""
    done = command("-c", DEVICES)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{name} {count} {count} {count} True" for name in ("v4", "v5e", "v5p", "v6e") for count in (1, 4, 8)
    ]


@needs_libtpu
def test_a_run_is_checked_for_a_tpu():
    smoke = ("-m", "dinalrm_jax.train", "--config", "configs/hpdv3.py:smoke", "--check-memory", "--for", "v5e:4")
    done = command(*smoke)
    assert done.returncode == 0, done.stderr
    (step,) = [line for line in done.stdout.splitlines() if line.startswith("| train step")]
    assert "| v5e:2x2 | yes |" in step
    assert "splash x" in step
    assert "all-reduce f32" in step
    assert done.stdout.splitlines()[-1].endswith("as there are no records yet: it fits")
