"""Seconds from a new process to the first score of the golden tiny model, without and with a compilation cache.

    python -m benchmarks.startup [--rounds 5]

Each round is a process of its own: import, `from_pretrained`, `score_latents`.
"""

import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile

from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
FIRST_SCORE = """
import json, sys, time
started = time.perf_counter()
import dinalrm_jax as dina
from dinalrm_jax.devices.compilation import enable_compilation_cache
imported = time.perf_counter()
enable_compilation_cache()
golden = sys.argv[1]
model = dina.RewardModel.from_pretrained(golden, golden, dtype="float32")
loaded = time.perf_counter()
import numpy as np
cases = np.load(f"{golden}/cases.npz")
prompt = dina.PromptEmbeds(cases["encoder_hidden_states"], cases["pooled_projections"])
model.score_latents(np.moveaxis(cases["latents_chosen"], 1, -1), prompt)
ended = time.perf_counter()
print(json.dumps([imported - started, loaded - imported, ended - loaded, ended - started]))
"""


def first_score(cache: str) -> list[float]:
    """Seconds to import, to load, to score, and in all."""
    command = [sys.executable, "-c", FIRST_SCORE, str(ROOT / "tests" / "golden" / "released-tiny")]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
    result = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout)


def main(_) -> None:
    rounds = flags.FLAGS.rounds
    cold, warm = [], []
    for _ in range(rounds):
        cache = tempfile.mkdtemp()
        cold.append(first_score(cache))
        warm.append(first_score(cache))
        shutil.rmtree(cache)
    print(f"golden model, {os.cpu_count()} cores, median of {rounds} (fastest to slowest)")
    for name, runs in (("no cache", cold), ("warm cache", warm)):
        parts = [statistics.median(column) for column in zip(*runs)]
        total = [run[-1] for run in runs]
        print(
            f"{name}: import {parts[0]:.2f} s, load {parts[1]:.2f} s, first score {parts[2]:.2f} s; in all "
            f"{parts[3]:.2f} s ({min(total):.2f} to {max(total):.2f})"
        )


if __name__ == "__main__":
    flags.DEFINE_integer("rounds", 5, "Processes of each kind.", 1)
    app.run(main)
