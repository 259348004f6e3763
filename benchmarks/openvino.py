"""A score by XLA and by OpenVINO in turn, on this CPU.

    python -m benchmarks.openvino [--blocks 6] [--side 32] [--repeats 7]

SD3.5-Medium's first blocks with the head, random weights, one row of `side` x `side` latents under 205 text tokens,
float32. Prints the medians, and how far OpenVINO's score is from XLA's in float32. At 12 blocks, a whole DiNa-LRM,
OpenVINO's conversion did not fit into 24 GiB.
"""

import time

import jax
import numpy as np
import openvino
from absl import app, flags

import dinalrm_jax as dina
from dinalrm_jax.model.config import RewardModelConfig
from dinalrm_jax.openvino import OpenVINOReward

TOKENS = 205


def main(argv: list[str]) -> None:
    values = flags.FLAGS
    taps = tuple(sorted({max(1, values.blocks * part // 3) for part in (1, 2, 3)}))
    model = dina.RewardModel.init(RewardModelConfig(num_blocks=values.blocks, visual_taps=taps, text_taps=taps))
    spec, rng = model.config.transformer.latents, np.random.default_rng(0)
    shapes = (1, values.side, values.side, spec.channels), (1, TOKENS, spec.text_width), (1, spec.pooled_width)
    latents, *prompt = (0.3 * rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    prompt = dina.PromptEmbeds(*prompt)
    noise = rng.standard_normal(latents.shape).astype(np.float32)
    reward = jax.jit(model.reward_fn(0.4))
    inputs = jax.device_put((latents, prompt, None, noise))
    ways = {"XLA, float32": lambda: np.asarray(reward(model.params, *inputs))}
    for precision in ("f32", "bf16"):
        compiled = OpenVINOReward(model, *latents.shape[:3], TOKENS, precision=precision)
        ways[f"OpenVINO, {precision}"] = lambda compiled=compiled: compiled(latents, prompt, noise)
    versions = f"jax {jax.__version__}, openvino {openvino.__version__}"
    print(f"{versions}; {values.blocks} blocks, {values.side} x {values.side}")
    exact, seconds = ways["XLA, float32"](), {name: [] for name in ways}
    for name, way in ways.items():
        print(f"{name}: score off by {np.abs(way() - exact).max():.1e} of {np.abs(exact).max():.3f}", flush=True)
    for _ in range(values.repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    for name, found in seconds.items():
        ratio = np.median(seconds["XLA, float32"]) / np.median(found)
        print(f"{name}: {np.median(found):.3f} s ({min(found):.3f} to {max(found):.3f}), {ratio:.2f} times XLA's speed")


if __name__ == "__main__":
    flags.DEFINE_integer("blocks", 6, "Of the transformer.", lower_bound=1)
    flags.DEFINE_integer("side", 32, "Of the latents.", lower_bound=2)
    flags.DEFINE_integer("repeats", 7, "In turn.", lower_bound=1)
    app.run(main)
