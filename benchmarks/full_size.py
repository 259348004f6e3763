"""One real forward pass of the full-size reward model (SD3.5-M, 12 blocks), random weights, on this machine.

    python -m benchmarks.full_size [--resolution 256] [--dtype float32] [--layers loop|scan]

Prints parameter counts, the time to trace and to compile (no cache), seconds per score, and memory.
Full-size float32 weights take 5.6 GB.
"""

import os
import resource
import statistics
import time

import jax
import jax.numpy as jnp
from absl import app, flags

import dinalrm_jax as dina
from dinalrm_jax.config import ExecutionConfig, RewardModelConfig
from dinalrm_jax.reward_model import reward_functional, store

TEXT_TOKENS = 205  # 77 CLIP + 128 T5


def main(_) -> None:
    values = flags.FLAGS
    execution = ExecutionConfig(dtype=values.dtype, layers=values.layers)
    config = RewardModelConfig()
    side, transformer = values.resolution // 8, config.transformer
    print(
        f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {os.cpu_count()} cores, {values.dtype}, "
        f"{values.layers}, {values.resolution} x {values.resolution} pixels, batch 1, {TEXT_TOKENS} text tokens"
    )
    module = reward_functional(config, execution)
    parts = {"LoRA": 0, "head": 0, "frozen backbone": 0}
    for name, shape in module.shapes.items():
        if name.endswith("pos_embed.pos_embed"):
            continue  # a fixed table, not a parameter
        part = "LoRA" if ".lora_" in name else "head" if name.startswith("head.") else "frozen backbone"
        parts[part] += shape.size
    print("parameters: " + ", ".join(f"{name} {count / 1e6:.1f}M" for name, count in parts.items()))

    params = store(module.init(0), execution)
    latents = jax.random.normal(jax.random.key(1), (1, side, side, transformer.in_channels))
    prompt = dina.PromptEmbeds(
        jax.random.normal(jax.random.key(2), (1, TEXT_TOKENS, transformer.joint_attention_dim)),
        jax.random.normal(jax.random.key(3), (1, transformer.pooled_projection_dim)),
    )
    reward = jax.jit(dina.RewardModel(config, params, execution).reward_fn(0.4))
    start = time.perf_counter()
    lowered = reward.lower(params, latents, prompt, jax.random.key(0))
    traced = time.perf_counter()
    compiled = lowered.compile()
    print(f"trace {traced - start:.1f} s, compile {time.perf_counter() - traced:.1f} s")
    seconds = []
    for _ in range(values.repeats + 1):
        start = time.perf_counter()
        score = jax.block_until_ready(compiled(params, latents, prompt, jax.random.key(0)))
        seconds.append(time.perf_counter() - start)
    warm = seconds[1:]
    print(
        f"score {float(score[0]):+.3f}, finite: {bool(jnp.isfinite(score).all())}; seconds a call after warm-up: "
        f"median {statistics.median(warm):.2f}, min {min(warm):.2f}, max {max(warm):.2f} of {len(warm)}"
    )
    print(f"peak memory of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


if __name__ == "__main__":
    flags.DEFINE_integer("resolution", 256, "Image side in pixels.")
    flags.DEFINE_integer("repeats", 3, "Timed calls after one warm-up.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute dtype.")
    flags.DEFINE_enum("layers", "loop", ["loop", "scan"], "How the blocks are run.")
    app.run(main)
