"""Attention of SD3.5-Medium's size by implementation, on this machine.

    python -m benchmarks.attention [--tokens 461,1229] [--dtype float32]

24 heads of 64, one row; forward, and forward with backward, in milliseconds: medians of calls in rotation.
"""

import statistics
import time

import jax
import jax.numpy as jnp
from absl import app, flags

from dinalrm_jax.model.backbone.attention import grouped
from dinalrm_jax.model.backbone.attention.attend import KERNELS


def compiled(implementation: str, group: int | None, inputs):
    """The forward pass and the gradient of its sum, as calls."""
    attend = KERNELS[implementation]
    gradient = jax.grad(lambda *qkv: attend(*qkv).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    default, grouped.GROUP = grouped.GROUP, group or grouped.GROUP
    try:
        return [jax.jit(function).lower(*inputs).compile() for function in (attend, gradient)]
    finally:
        grouped.GROUP = default


def main(_) -> None:
    values = flags.FLAGS
    kinds = [("xla", None), ("chunked", None), *(("grouped", group) for group in (2, 4, 8))]
    if jax.default_backend() == "gpu":
        kinds = [("xla", None), ("chunked", None), *[("cudnn", None)] * (values.dtype == "bfloat16")]
    if jax.default_backend() == "tpu":
        kinds = [("xla", None), ("chunked", None), ("splash", None)]
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {values.dtype}, 24 heads of 64, ms")
    print("| tokens | " + " | ".join(f"{kind}{f', {group} heads' * bool(group)}" for kind, group in kinds) + " |")
    print("|---" * (1 + len(kinds)) + "|")
    for tokens in map(int, values.tokens):
        keys = jax.random.split(jax.random.key(0), 3)
        inputs = [jax.random.normal(key, (1, tokens, 24, 64), values.dtype) for key in keys]
        calls = [compiled(kind, group, inputs) for kind, group in kinds]
        seconds = [[[], []] for _ in calls]
        for number in range(values.repeats + 1):
            for pair, kept in zip(calls, seconds):
                for call, times in zip(pair, kept):
                    started = time.perf_counter()
                    jax.block_until_ready(call(*inputs))
                    if number:
                        times.append(time.perf_counter() - started)
        cells = [" / ".join(f"{1000 * statistics.median(times):.1f}" for times in kept) for kept in seconds]
        print(f"| {tokens} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    flags.DEFINE_list("tokens", ["461", "1229"], "Numbers of tokens.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of queries, keys and values.")
    flags.DEFINE_integer("repeats", 10, "Timed calls of each.", 1)
    app.run(main)
