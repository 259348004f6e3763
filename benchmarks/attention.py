"""Attention of SD3.5-Medium's size by implementation, on this machine.

    python -m benchmarks.attention [--tokens 461,1229] [--dtype float32]

24 heads of 64, one row; forward, and forward with backward, in milliseconds: medians of calls in rotation.
"""

import statistics
import time

import jax
import jax.numpy as jnp
from absl import app, flags

from dinalrm_jax.model.backbone.attention import cudnn, grouped
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


def kernels_here(dtype: str) -> list[str]:
    """The implementations that this platform has for a dtype."""
    platform = jax.default_backend()
    own = {"gpu": ["cudnn"] * (jnp.dtype(dtype) in cudnn.DTYPES), "tpu": ["splash"], "cpu": ["grouped"]}
    return ["xla", "chunked", *own[platform]]


def random_inputs(tokens: int, dtype: str, heads: int = 24, width: int = 64, rows: int = 1) -> list[jax.Array]:
    """Queries, keys and values, (rows, tokens, heads, width)."""
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (rows, tokens, heads, width), dtype) for key in keys]


def deviations(implementation: str, inputs: list[jax.Array]) -> dict[str, float]:
    """How far an implementation is from XLA's in float32 at the highest precision, relative to the largest entry.

    Of the output, and of the gradients of its product with fixed numbers in queries, keys and values.
    """
    weights = jax.random.normal(jax.random.key(1), inputs[0].shape, jnp.float32)

    def computed(attend, qkv):
        weighted = lambda *qkv: (attend(*qkv).astype(jnp.float32) * weights).sum()  # noqa: E731
        return jax.jit(attend)(*qkv), *jax.jit(jax.grad(weighted, (0, 1, 2)))(*qkv)

    with jax.default_matmul_precision("highest"):
        exact = computed(KERNELS["xla"], [array.astype(jnp.float32) for array in inputs])
    found = computed(KERNELS[implementation], inputs)
    errors = [
        float(jnp.abs(ours.astype(jnp.float32) - theirs).max() / jnp.abs(theirs).max())
        for ours, theirs in zip(found, exact)
    ]
    return {"forward": errors[0], "gradients": max(errors[1:])}


def milliseconds(
    kinds: list[tuple[str, int | None]], inputs: list[jax.Array], repeats: int
) -> list[tuple[float, float]]:
    """Medians of the forward pass, and of forward with backward, of every (implementation, heads of a group)."""
    calls = [compiled(kind, group, inputs) for kind, group in kinds]
    seconds = [[[], []] for _ in calls]
    for number in range(repeats + 1):
        for pair, kept in zip(calls, seconds):
            for call, times in zip(pair, kept):
                started = time.perf_counter()
                jax.block_until_ready(call(*inputs))
                if number:
                    times.append(time.perf_counter() - started)
    return [tuple(1000 * statistics.median(times) for times in kept) for kept in seconds]


def main(_) -> None:
    values = flags.FLAGS
    kinds = [(kind, None) for kind in kernels_here(values.dtype) if kind != "grouped"]
    kinds += [("grouped", group) for group in (2, 4, 8)] * (jax.default_backend() == "cpu")
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {values.dtype}, 24 heads of 64, ms")
    print("| tokens | " + " | ".join(f"{kind}{f', {group} heads' * bool(group)}" for kind, group in kinds) + " |")
    print("|---" * (1 + len(kinds)) + "|")
    for tokens in map(int, values.tokens):
        found = milliseconds(kinds, random_inputs(tokens, values.dtype), values.repeats)
        cells = [f"{forward:.1f} / {both:.1f}" for forward, both in found]
        print(f"| {tokens} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    flags.DEFINE_list("tokens", ["461", "1229"], "Numbers of tokens.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of queries, keys and values.")
    flags.DEFINE_integer("repeats", 10, "Timed calls of each.", 1)
    app.run(main)
