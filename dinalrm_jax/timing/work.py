"""The work that `dinalrm_jax.benchmark` times: one call of each mode, at any size, with random weights."""

import dataclasses
import time
from collections.abc import Callable

import jax
import numpy as np

from dinalrm_jax.devices.host_memory import return_freed_memory
from dinalrm_jax.devices.mesh import MeshConfig, make_mesh
from dinalrm_jax.devices.placement import place
from dinalrm_jax.model.config import RewardModelConfig
from dinalrm_jax.timing.programs import Program, encoder_program, encoder_shapes, model_of, program_of, shapes_of
from dinalrm_jax.timing.setting import PASSES, Setting


@dataclasses.dataclass(frozen=True)
class Work:
    """A compiled call and what is known of it before it runs.

    Attributes:
        call: does the work once and waits for it.
        trace_seconds, compile_seconds: what making it took.
        flops, bytes_accessed: XLA's counts; the first before optimisation, and of a scan's body one pass.
        argument_bytes, temporary_bytes: what the program takes and needs beside it, by XLA's plan.
    """

    call: Callable[[], object]
    trace_seconds: float
    compile_seconds: float
    flops: float
    bytes_accessed: float
    argument_bytes: int
    temporary_bytes: int


def make_work(setting: Setting, config: RewardModelConfig | None = None) -> Work:
    """Builds and compiles one mode; `config` stands in for the full-size model.

    Raises:
        ConfigError: a mesh or a batch that does not fit.
    """
    mesh = make_mesh(MeshConfig(setting.data, setting.fsdp, setting.tensor))
    if setting.mode not in PASSES:
        return _compiled(encoder_program(setting, mesh, _drawn(*encoder_shapes(setting, mesh))))
    config = config or model_of(setting)
    with jax.set_mesh(mesh):
        return _compiled(program_of(setting, config, mesh, _drawn(*shapes_of(setting, config, mesh))))


def _drawn(params, *data):
    """Arrays in the place of shapes; norms' vectors are ones, and other weights keep a token's size."""
    numbers = np.random.default_rng(0).standard_normal(1 << 22, np.float32)

    def draw(shape: jax.ShapeDtypeStruct, weight: bool) -> jax.Array:
        if np.issubdtype(shape.dtype, np.integer):
            array = np.arange(shape.size, dtype=shape.dtype).reshape(shape.shape) % 32000
        elif len(shape.shape) < 2:
            array = np.ones(shape.shape)
        else:
            scale = np.prod(shape.shape[1:]) ** -0.5 if weight else 1.0
            array = np.resize(numbers, shape.shape) * np.float32(scale)
        return place({"": array}, shape.dtype, {"": shape.sharding})[""]

    return jax.tree.map(lambda shape: draw(shape, True), params), *jax.tree.map(lambda shape: draw(shape, False), data)


def _compiled(program: Program) -> Work:
    started = time.perf_counter()
    lowered = program.lower()
    traced = time.perf_counter()
    compiled = lowered.compile()
    ended = time.perf_counter()
    return_freed_memory()
    first, *rest = program.arguments
    holder = [first]
    carries, mesh = program.carries, program.mesh
    del program, first

    def call():
        with jax.set_mesh(mesh):
            result = jax.block_until_ready(compiled(holder[0], *rest))
        if carries:  # the old one is donated
            holder[0] = result[0]
        return result

    memory = compiled.memory_analysis()
    return Work(
        call,
        trace_seconds=traced - started,
        compile_seconds=ended - traced,
        flops=float((lowered.cost_analysis() or {}).get("flops", 0.0)),
        bytes_accessed=float((compiled.cost_analysis() or {}).get("bytes accessed", 0.0)),
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
    )


def gemm_peak(dtype: str, rows: int, width: int, repeats: int = 5) -> float:
    """FLOP/s of the model's own largest products, (rows, D) x (4D, D) and back, every weight read from memory once.

    The best of `repeats` calls over four distinct pairs of weights, 75 MB each in float32.
    """
    key = jax.random.key(0)
    x = jax.random.normal(key, (rows, width), dtype)
    up = [jax.random.normal(key, (4 * width, width), dtype) for _ in range(4)]
    down = [jax.random.normal(key, (width, 4 * width), dtype) for _ in range(4)]

    @jax.jit
    def chain(x, up, down):
        contract = (((1,), (1,)), ((), ()))
        for a, b in zip(up, down):
            x = jax.lax.dot_general(jax.lax.dot_general(x, a, contract), b, contract) * width**-1.5
        return x

    jax.block_until_ready(chain(x, up, down))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(chain(x, up, down))
        seconds.append(time.perf_counter() - start)
    return 4 * 2 * 2 * rows * 4 * width**2 / min(seconds)
