"""How many pairs a second the loader delivers, beside what eight accelerators take.

    python -m benchmarks.loader [--directory /tmp/loader_records] [--seconds 20]

Writes records of the full size once (1024 x 1024 pixels: latents (128, 128, 16), prompts of 205
tokens; random numbers), then reads batches of 32 pairs in the training order. The demand is that of a
train step at `--utilisation` of eight devices' stated peak, by the cost model (`benchmarks.scaling.pair_flops`).
"""

import os
import pathlib
import shutil
import time

import numpy as np
from absl import app, flags
from dinalrm_jax.devices.peaks import PEAK_FLOPS

from benchmarks.scaling import SIDE, TOKENS, pair_flops
from dinalrm_jax.data import records
from dinalrm_jax.data.loader import TrainingBatches
from dinalrm_jax.data.records import ImageRecord, PairRecord, PromptRecord, Records
from dinalrm_jax.model.encoding import EncodersConfig

IMAGES, PROMPTS, PAIRS, BATCH = 256, 128, 512, 32
LATENTS, WIDTH, POOLED = (SIDE, SIDE, 16), 4096, 2048


def write(directory: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    images = (ImageRecord(rng.standard_normal(LATENTS, np.float32), str(i)) for i in range(IMAGES))
    prompts = [
        PromptRecord(str(i), rng.standard_normal((TOKENS, WIDTH), np.float32), rng.standard_normal(POOLED, np.float32))
        for i in range(PROMPTS)
    ]
    pairs = [PairRecord(*map(int, rng.integers(0, IMAGES, 2)), int(rng.integers(PROMPTS)), "") for _ in range(PAIRS)]
    records.write(
        directory, images=images, prompts=prompts, pairs={"train": pairs}, encoders=EncodersConfig(), downsampling=8,
        source={},
    )  # fmt: skip


def main(_) -> None:
    values = flags.FLAGS
    directory = pathlib.Path(values.directory)
    if not (directory / "manifest.json").exists():
        shutil.rmtree(directory, ignore_errors=True)
        write(directory)
    batches = TrainingBatches(Records(directory), BATCH, seed=0)
    batch = next(batches)
    pair_bytes = (batch.chosen.nbytes + batch.rejected.nbytes + batch.prompt.prompt_embeds.nbytes) / BATCH
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < values.seconds:
        next(batches)
        count += BATCH
    rate = count / (time.perf_counter() - start)
    gigabytes = rate * pair_bytes / 1e9
    print(f"loader: {rate:.0f} pairs a second, {gigabytes:.2f} GB/s, {os.cpu_count()} cores, page cache warm")
    print("| eight of | pairs a second they take | headroom |\n|---|---|---|")
    for device in ("TPU v5 lite", "TPU v5", "NVIDIA H100"):
        demand = 8 * PEAK_FLOPS[device] * values.utilisation / pair_flops()
        print(f"| {device}, {values.utilisation:.0%} of peak | {demand:.1f} | {rate / demand:.1f}x |")


if __name__ == "__main__":
    flags.DEFINE_string("directory", "/tmp/loader_records", "Records to read; written (0.4 GB) if not there.")
    flags.DEFINE_float("seconds", 20.0, "How long to read.")
    flags.DEFINE_float("utilisation", 0.4, "Share of the stated peak that the train step is taken to reach.")
    app.run(main)
