"""What devices exchange in a train step, read from the compiled program (docs/scaling.md)."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

import configs.hpdv3 as hpdv3
from benchmarks.collectives import Collective, collectives
from dinalrm_jax.config import TrainConfig
from dinalrm_jax.mapping import from_mapping
from dinalrm_jax.model.reward import is_trainable, reward_functional
from dinalrm_jax.timing.forecast import abstract_batch, abstract_step
from dinalrm_jax.training.objectives import SIGMA_BINS


def test_data_parallelism_reduces_trainable_gradients_only():
    """Every trainable gradient once, in float32, and the metrics; no frozen weight, no pixel.

    Those are the loss, four numbers and three by noise level.
    The head's key biases, which softmax ignores, have no gradient: nothing computes them.
    """
    config = from_mapping(TrainConfig, hpdv3.get_config("smoke"))
    config = dataclasses.replace(config, execution=dataclasses.replace(config.execution, layers="loop"))
    mesh = Mesh(np.array(jax.devices()).reshape(-1, 1, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    found = collectives(
        abstract_step(config, mesh).lower(abstract_batch(config, mesh, (64, 64), mesh.size, 9)).compile().as_text(),
        mesh.size,
    )
    shapes = reward_functional(config.model, config.execution).shapes
    idle = [name for name in shapes if name.startswith("head.attn") and ".to_k_" in name and name.endswith("bias")]
    trainable = sum(4 * shape.size for name, shape in shapes.items() if is_trainable(name) and name not in idle)
    assert {one.kind for one in found} == {"all-reduce"}
    assert {one.group for one in found} == {mesh.size}
    assert sum(one.result_bytes for one in found) == trainable + 4 * (1 + 4 + 3 * SIGMA_BINS)


TPU_PROGRAM = """
import dataclasses, json, os
os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
import jax, numpy as np
jax.config.update("jax_platforms", "cpu")
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh
import configs.hpdv3 as hpdv3
from dinalrm_jax.timing.forecast import abstract_batch, abstract_step
from benchmarks.collectives import collectives
from dinalrm_jax.config import TrainConfig
from dinalrm_jax.mapping import from_mapping
from dinalrm_jax.timing.forecast import abstract_batch, abstract_step

config = from_mapping(TrainConfig, hpdv3.get_config("smoke"))
config = dataclasses.replace(
    config,
    execution=dataclasses.replace(config.execution, layers="loop", remat="none"),
    reward=dataclasses.replace(config.reward, micro_batches=2),
)
devices = np.array(topologies.get_topology_desc("v5e:2x4", "tpu").devices).reshape(8, 1, 1)
mesh = Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
text = abstract_step(config, mesh).lower(abstract_batch(config, mesh, (64, 64), 16, 9)).compile().as_text()
found = collectives(text, 8)
print(json.dumps([[one.kind, one.dtypes, one.result_bytes] for one in found]))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiles for a TPU with libtpu: pip install it")
def test_gradients_are_summed_once_and_in_float32_on_a_tpu():
    """Compiled ahead for eight v5e, in bfloat16, two micro-batches: as many bytes as one sum has.

    (A CPU's program shows nothing of it: its bfloat16 products are float32 ones.)
    """
    done = subprocess.run([sys.executable, "-c", TPU_PROGRAM], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {(kind, *dtypes) for kind, dtypes, _ in found} == {("all-reduce", "f32")}
    assert sum(size for _, _, size in found) == 4 * 130_662


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("%a = f32[4,6]{1,0} all-reduce(%x), replica_groups=[1,8]<=[8], to_apply=%add", ("all-reduce", 96, 8, 168)),
        ("%a = (bf16[4]{0}, f32[]) all-reduce(%x, %y), replica_groups={{0,1},{2,3}}", ("all-reduce", 12, 2, 12)),
        ("%a = bf16[8,2]{1,0} all-gather(%x), replica_groups=[2,4]<=[8]", ("all-gather", 32, 4, 24)),
        (
            "%a = (bf16[2,2]{1,0:T(8,128)}, bf16[8,2]{1,0:T(8,128)}) all-gather-start(%x), replica_groups={{0,1,2,3}}",
            ("all-gather", 32, 4, 24),
        ),
        (
            "%a = ((f32[1], f32[4]), (f32[8], f32[32])) all-gather-start(%x, %y), replica_groups=[1,8]<=[8]",
            ("all-gather", 160, 8, 140),
        ),
        (
            "%a = (bf16[64,64]{1,0}, bf16[64,64]{1,0}, u32[], u32[]) collective-permute-start(%x), channel_id=1",
            ("collective-permute", 8192, 8, 8192),
        ),
        ("%a = f32[2]{0} reduce-scatter(%x), replica_groups={}, dimensions={0}", ("reduce-scatter", 8, 8, 56)),
    ],
)
def test_reading_instructions(line, expected):
    (found,) = collectives(f"  %b = f32[2] add(%c, %d)\n  {line}\n", devices=8)
    assert (found.kind, found.result_bytes, found.group, found.sent_bytes) == expected
    assert found.dtypes[0] in line


def test_a_ring_sends_what_it_must():
    assert Collective("all-gather", 100, 4).sent_bytes + Collective("reduce-scatter", 25, 4).sent_bytes == (
        Collective("all-reduce", 100, 4).sent_bytes
    )
