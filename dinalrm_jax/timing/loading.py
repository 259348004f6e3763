"""How long a checkpoint takes from disk to device, beside reading its bytes."""

import pathlib
import time

import jax
import numpy as np

from dinalrm_jax.model.config import RewardModelConfig
from dinalrm_jax.model.execution import Dtype, ExecutionConfig
from dinalrm_jax.model.reward import stored_shapes
from dinalrm_jax.reward_model import RewardModel
from dinalrm_jax.timing.memory import forget_peak, peak_bytes

CHUNK = 64 * 2**20


def write_checkpoint(directory: pathlib.Path, config: RewardModelConfig) -> None:
    """A native float32 checkpoint of this model, its numbers drawn fast."""
    numbers = np.random.default_rng(0).standard_normal(1 << 22, np.float32)
    shapes = stored_shapes(config, ExecutionConfig())
    params = {name: np.resize(numbers, shape.shape) for name, shape in shapes.items()}
    RewardModel(config, params).save(directory)  # type: ignore[arg-type]  # a view of few numbers, of any size


def read(directory: pathlib.Path) -> tuple[float, int]:
    """Seconds to read all tensors' bytes once through one buffer, and their number."""
    buffer = memoryview(bytearray(CHUNK))
    total, start = 0, time.perf_counter()
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return time.perf_counter() - start, total


def load(directory: pathlib.Path, dtype: Dtype) -> tuple[float, int]:
    """Seconds of `from_pretrained` until all is on the device, and the peak of resident memory meanwhile."""
    forget_peak()
    start = time.perf_counter()
    model = RewardModel.from_pretrained(directory, dtype=dtype)
    jax.block_until_ready(model.params)
    return time.perf_counter() - start, peak_bytes()
