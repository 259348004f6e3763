"""What accelerators can do, as their makers state it, and their topologies for compiling without having one."""

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Iterator
from typing import Literal

import jax
from jax.experimental import topologies

from dinalrm_jax.mapping import ConfigError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device.

    Attributes:
        kind: what JAX calls it, or what that begins with.
        peak: bfloat16 FLOP/s, dense.
        memory: bytes; of a TPU what its compiler leaves to programs, of a GPU what the device has.
        platform: of JAX.
        sides: how many dimensions a slice's topology has; 0: no topology can be had.
        megacore: two cores are one device, which the compiler has to be told.
    """

    kind: str
    peak: float
    memory: float
    platform: Literal["tpu", "gpu"]
    sides: int = 0
    megacore: bool = False

    @property
    def usable(self) -> float:
        """Bytes that a program may use: of a GPU the 92 % that launch/ lets JAX take (without that it takes 75 %)."""
        return self.memory * (0.92 if self.platform == "gpu" else 1.0)


CHIPS = {
    "v4": Chip("TPU v4", 275e12, 30.75 * GIB, "tpu", 3, megacore=True),
    "v5e": Chip("TPU v5 lite", 197e12, 15.75 * GIB, "tpu", 2),
    "v5p": Chip("TPU v5", 459e12, 95.73 * GIB, "tpu", 3),
    "v6e": Chip("TPU v6 lite", 918e12, 31.24 * GIB, "tpu", 2),
    "a100": Chip("NVIDIA A100", 312e12, 80e9, "gpu"),
    "h100": Chip("NVIDIA H100", 989e12, 79.0 * GIB, "gpu", 1),
    "h200": Chip("NVIDIA H200", 989e12, 139.0 * GIB, "gpu", 1),
    "b200": Chip("NVIDIA B200", 2250e12, 180e9, "gpu"),
}
# Hopper as XLA's compiler wants to know it: NVIDIA's tuning guide for compute capability 9.0.
HOPPER = {
    "threads_per_block_limit": 1024, "threads_per_warp": 32, "threads_per_core_limit": 2048, "core_count": 132,
    "fpus_per_core": 128, "shared_memory_per_block": 49152, "shared_memory_per_block_optin": 232448,
    "shared_memory_per_core": 233472, "registers_per_core_limit": 65536, "registers_per_block_limit": 65536,
    "block_dim_limit_x": 2**31 - 1, "block_dim_limit_y": 65535, "block_dim_limit_z": 65535,
    "l2_cache_size": 50 * 2**20, "clock_rate_ghz": 1.98,
}  # fmt: skip
BANDWIDTH = {"h100": 3_352_320_000_000, "h200": 4_800_000_000_000}  # bytes/s
# Without the device nothing can be tried out on it, which is how XLA else chooses among its kernels.
UNTRIED = "--xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0"


def peak_flops(device_kind: str) -> float | None:
    """The stated bfloat16 peak of a device, FLOP/s; None for one that is not in the table, a CPU among them."""
    # "TPU v5" begins "TPU v5 lite" too.
    exact = [chip for chip in CHIPS.values() if chip.kind == device_kind]
    within = [chip for chip in CHIPS.values() if chip.platform == "gpu" and chip.kind in device_kind]
    return next((chip.peak for chip in exact + within), None)


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for: "v5e", "v5e:8" or "v5e:2x4" as a command line has it.

    Attributes:
        name: of the chip.
        shape: of the slice.
    """

    name: str
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Raises ConfigError for a chip that is not known, or a slice that there is not."""
        name, _, size = text.partition(":")
        known = [name for name, chip in CHIPS.items() if chip.sides]
        if name not in known:
            raise ConfigError(f"{name!r} is no chip that can be compiled for; choose one of {', '.join(known)}")
        sides = CHIPS[name].sides
        if not re.fullmatch(r"(\d+(x\d+)*)?", size) or size.startswith("0"):
            raise ConfigError(f"{text!r} names no devices; write {name}:8, or their topology, {name}:{_example(sides)}")
        numbers = tuple(map(int, size.split("x"))) if size else (1,)
        shape = numbers if len(numbers) == sides and len(numbers) > 1 else _slice(math.prod(numbers), sides)
        if len(numbers) not in (1, sides) or shape is None:
            raise ConfigError(f"{text!r} is no slice of {name}; its topologies are like {name}:{_example(sides)}")
        return cls(name, shape)

    @property
    def chip(self) -> Chip:
        return CHIPS[self.name]

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.name}:{'x'.join(map(str, self.shape))}" if self.count > 1 else self.name

    def devices(self) -> list[jax.Device]:
        """Devices that are not here, to compile for.

        Raises:
            ConfigError: no compiler for them on this machine.
        """
        try:
            if self.chip.platform == "tpu":
                slice_name = f"{self.name}:{'x'.join(map(str, self.shape))}"
                options = {"chip_config_name": "megacore"} if self.chip.megacore else {}
                return topologies.get_topology_desc(slice_name, "tpu", **options).devices
            flags = os.environ.get("XLA_FLAGS", "")
            os.environ["XLA_FLAGS"] = flags if UNTRIED in flags else f"{flags} {UNTRIED}".strip()
            return topologies.get_topology_desc(
                platform="cuda", target_config=_target_config(self.name), topology=f"1x1x{self.count}"
            ).devices
        except Exception as error:  # jaxlib's own kinds, of any sort
            wheels = "libtpu" if self.chip.platform == "tpu" else "jax_cuda12_plugin jax_cuda12_pjrt"
            raise ConfigError(
                f"cannot compile for {self} here: {str(error).splitlines()[0]}; the compiler is in wheels of JAX's own "
                f"version: pip install {wheels}"
            ) from error


@contextlib.contextmanager
def unchecked_cudnn() -> Iterator[None]:
    """Lets JAX lower cuDNN's kernels where there is no cuDNN to ask for its version."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    asks = fused.check_cudnn_version
    fused.check_cudnn_version = lambda: 91000
    try:
        yield
    finally:
        fused.check_cudnn_version = asks


def _slice(count: int, sides: int) -> tuple[int, ...] | None:
    """The slice of so many chips that is most like a cube: 8 are 2x4, or 2x2x2."""
    if sides == 1:
        return (count,)
    if count & (count - 1) or count == 2:
        return None
    shape = [1] * sides
    while math.prod(shape) < count:
        shape[shape.index(min(shape))] *= 2
    return tuple(sorted(shape, reverse=sides == 3 and count == 4))


def _example(sides: int) -> str:
    return {1: "8", 2: "2x4", 3: "2x2x2"}[sides]


def _target_config(name: str) -> str:
    facts = {**HOPPER, "memory_bandwidth": BANDWIDTH[name], "device_memory_size": int(CHIPS[name].memory)}
    info = "".join(f"{key}: {value}\n" for key, value in facts.items())
    return (
        f"gpu_device_info {{ {info} cuda_compute_capability {{ major: 9 }} }}\n"
        'platform_name: "CUDA"\ndnn_version_info { major: 9 minor: 10 }\nruntime_version { major: 12 minor: 8 }\n'
        f'device_description_str: "{CHIPS[name].kind}"\n'
    )
