"""What a train step of the full model would take on many accelerators: a model on paper, nothing here was run on one.

    python -m benchmarks.scaling

Compute is the cost model's FLOPs over `--utilisation` of the stated peak; gradients are summed as a ring within a
node or slice and, on GPUs, as a second one between nodes, at `--link-share` of the stated bandwidth, and nothing is
taken to overlap. docs/scaling.md holds the tables and the assumptions.
"""

import dataclasses

from absl import app, flags

from dinalrm_jax.model.config import RewardModelConfig
from dinalrm_jax.model.execution import ExecutionConfig
from dinalrm_jax.model.reward import is_trainable, reward_functional
from dinalrm_jax.timing.programs import model_flops

PAIRS = 800_000  # HPDv3 after filtering (docs/method.md, Training)
SIDE, TOKENS = 128, 205  # latents of 1024 x 1024 pixels; 77 of CLIP and 128 of T5
IMAGE_BYTES, PROMPT_BYTES = 2 * SIDE**2 * 16, 2 * (TOKENS * 4096 + 2048)  # float16


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One device as its maker states it.

    Attributes:
        peak: bfloat16 FLOP/s, dense.
        link: bytes/s that it sends to its ring neighbours in a slice or node.
        group: devices with such links.
        network: bytes/s a device has between groups; None where a slice spans the whole job.
        host: devices of one host.
    """

    name: str
    peak: float
    link: float
    group: int
    network: float | None
    host: int


V5P = Accelerator("TPU v5p", 459e12, 600e9, 8960, None, 4)
H100 = Accelerator("H100 SXM", 989e12, 450e9, 8, 50e9, 8)
# (devices, pairs on each)
JOBS = [
    (V5P, 8, 4), (V5P, 32, 1), (V5P, 256, 1), (V5P, 256, 4),
    (H100, 8, 4), (H100, 32, 1), (H100, 64, 1), (H100, 64, 4),
]  # fmt: skip


def pair_flops() -> float:
    """Of a pair as configs/hpdv3.py computes it: forward, forward again (rematerialised), backward, of two images.

    A backward pass costs as much as a forward: only activations and LoRA have gradients.
    """
    config = RewardModelConfig()
    forward = model_flops(config, "score", 2, SIDE, TOKENS)
    return model_flops(config, "train", 1, SIDE, TOKENS) + forward


def gradient_bytes() -> int:
    """What data parallelism sums: the trainable gradients in float32, as tests/devices/test_collectives.py counts."""
    shapes = reward_functional(RewardModelConfig(), ExecutionConfig()).shapes
    return sum(4 * shape.size for name, shape in shapes.items() if is_trainable(name))


def reduce_seconds(device: Accelerator, count: int, size: float, link_share: float) -> float:
    """An all-reduce of `size` bytes: a ring within the group; between groups, rings of each device's share."""
    inside = min(count, device.group)
    seconds = 2 * size * (inside - 1) / inside / (device.link * link_share)
    groups = count // inside
    if groups > 1:
        seconds += 2 * size / inside * (groups - 1) / groups / (device.network * link_share)
    return seconds


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    values = flags.FLAGS
    flops, size = pair_flops(), gradient_bytes()
    print(
        f"{flops / 1e12:.1f} TFLOP a pair, {size / 2**20:.0f} MiB of gradients, {values.utilisation:.0%} of the stated "
        f"peak, {values['link-share'].value:.0%} of the stated links\n"
    )
    names = ("devices", "pairs on each, in all", "compute, ms", "sum of gradients, ms", "efficiency", "pairs/s",
             "hours an epoch", "pairs/s a host", "MB/s a host")  # fmt: skip
    print(f"| {' | '.join(names)} |\n|{len(names) * '---|'}")
    for device, count, pairs in JOBS:
        compute = pairs * flops / (device.peak * values.utilisation)
        exchange = reduce_seconds(device, count, size, values["link-share"].value)
        rate = count * pairs / (compute + exchange)
        a_host = rate / (count / device.host)
        cells = [
            f"{count} {device.name}",
            f"{pairs}, {count * pairs}",
            f"{1000 * compute:.0f}",
            f"{1000 * exchange:.1f}",
            f"{compute / (compute + exchange):.1%}",
            f"{rate:,.0f}",
            f"{PAIRS / rate / 3600:.2f}",
            f"{a_host:.1f}",
            f"{a_host * (2 * IMAGE_BYTES + PROMPT_BYTES) / 1e6:.0f}",
        ]
        print("| " + " | ".join(cells) + " |")
    least, most = (2 * PAIRS * IMAGE_BYTES + prompts * PROMPT_BYTES for prompts in (PAIRS / 8, PAIRS))
    print(
        f"\nrecords of {PAIRS:,} pairs: {IMAGE_BYTES / 1e6:.2f} MB an image, {PROMPT_BYTES / 1e6:.2f} MB a prompt; "
        f"{least / 1e12:.2f} to {most / 1e12:.2f} TB with two images a pair of its own and 8 pairs, or 1, a prompt"
    )


if __name__ == "__main__":
    flags.DEFINE_float("utilisation", 0.4, "Share of the stated peak that compute reaches.", 0.01, 1)
    flags.DEFINE_float("link-share", 0.5, "Share of the stated bandwidth that collectives reach.", 0.01, 1)
    app.run(main)
