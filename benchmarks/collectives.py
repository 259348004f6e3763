"""What devices tell each other in one train step, read from the compiled program.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m benchmarks.collectives
    pip install libtpu; python -m benchmarks.collectives --topology v5e:2x4

Compiles the step of configs/hpdv3.py (full size, one pair a device that takes rows) for eight virtual CPU devices,
or ahead of time for a TPU slice that need not be there, on four meshes, and prints the collectives by kind and
dtype: how many, their results' bytes, and the bytes that a device sends where they run as rings.
"""

import collections
import dataclasses
import math
import os
import re

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import numpy as np
from absl import app, flags
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

import configs.hpdv3 as hpdv3
from benchmarks.abstract_step import compile_step
from dinalrm_jax.config import TrainConfig
from dinalrm_jax.mapping import from_mapping

MESHES = ({"data": 8}, {"fsdp": 8}, {"tensor": 8}, {"data": 2, "fsdp": 2, "tensor": 2})
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction: its kind, the bytes of its result, how many devices take part together, what it carries."""

    kind: str
    result_bytes: int
    group: int
    dtypes: tuple[str, ...] = ("f32",)

    @property
    def sent_bytes(self) -> float:
        """What each device sends in a ring (a permute sends its operand as it is)."""
        share = (self.group - 1) / self.group
        times = {
            "all-reduce": 2 * share,
            "all-gather": share,
            "reduce-scatter": self.group * share,
            "collective-permute": 1.0,
            "all-to-all": share,
        }
        return self.result_bytes * times[self.kind]


def mesh_name(mesh: dict[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in mesh.items())


def collectives(hlo: str, devices: int) -> list[Collective]:
    """The collectives of a compiled program's text; one in a loop's body counts once."""
    found = []
    for line in hlo.splitlines():
        match = re.search(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
        if match is None:
            continue
        shapes, kind, start = match.groups()
        results = [
            (dtype, math.prod(map(int, filter(None, dims.split(",")))) * BYTES[dtype])
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
            if dtype in BYTES
        ]
        if start and kind == "all-gather":  # operands, then results
            results = results[len(results) // 2 :]
        elif start and kind == "collective-permute":  # operand, result, contexts
            results = results[1:2]
        dtypes = tuple(sorted({dtype for dtype, _ in results}))
        found.append(Collective(kind, sum(size for _, size in results), _group(line, devices), dtypes))
    return found


def _group(line: str, devices: int) -> int:
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(match[2])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(match[1].split(","))
    return devices


def as_table(found: list[Collective]) -> str:
    """Lines of a Markdown table by kind and dtype."""
    by_kind = collections.defaultdict(list)
    for one in found:
        by_kind[one.kind, " ".join(one.dtypes)].append(one)
    lines = []
    for kind, dtypes in sorted(by_kind, key=lambda key: (KINDS.index(key[0]), key[1])):
        members = by_kind[kind, dtypes]
        results, sent = (sum(getattr(one, name) for one in members) for name in ("result_bytes", "sent_bytes"))
        lines.append(f"| {kind} | {dtypes} | {len(members)} | {results / 2**20:,.1f} | {sent / 2**20:,.1f} |")
    return "\n".join(lines)


def main(_) -> None:
    values = flags.FLAGS
    config = from_mapping(TrainConfig, hpdv3.get_config())
    # A loop's body would count once; what is computed again is gathered again.
    # Grouped attention is the CPU's own; what is read here is meant for other devices.
    execution = dataclasses.replace(config.execution, layers="loop", attention="xla")
    config = dataclasses.replace(config, execution=execution)
    wanted = values.topology and topologies.get_topology_desc(values.topology, "tpu").devices
    devices = np.array(wanted or jax.devices())
    if len(devices) != 8:
        raise app.UsageError(
            f"eight devices are needed, found {len(devices)}; set "
            "XLA_FLAGS=--xla_force_host_platform_device_count=8, or name a --topology"
        )
    print(
        f"jax {jax.__version__}, {len(devices)} x {devices[0].device_kind}, {values.resolution} x {values.resolution}, "
        f"one pair a device, {execution.dtype}, remat {execution.remat}"
    )
    for sizes in MESHES:
        if values.mesh not in (None, mesh_name(sizes)):
            continue
        shape = [sizes.get(axis, 1) for axis in ("data", "fsdp", "tensor")]
        mesh = Mesh(devices.reshape(shape), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
        compiled = compile_step(config, mesh, resolution=values.resolution, pairs=1)
        print(f"\n{mesh_name(sizes)}")
        print("| collective | of | number | results, MiB | sent by a device, MiB |\n|---|---|---|---|---|")
        print(as_table(collectives(compiled.as_text(), len(devices))), flush=True)


if __name__ == "__main__":
    flags.DEFINE_string("topology", None, "A TPU slice of eight chips, as jax.experimental.topologies names it.")
    flags.DEFINE_integer("resolution", 1024, "Image side in pixels.")
    flags.DEFINE_enum("mesh", None, list(map(mesh_name, MESHES)), "One of the meshes; all if not given.")
    app.run(main)
