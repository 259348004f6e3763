"""Seconds from a new process to its first score, or its first training step, without and with a compilation cache.

    python -m benchmarks.startup [--rounds 5] [--train] [--draw]

Each round is two processes: import, `from_pretrained`, `score_latents` of the golden tiny model; or, with --train, a
run of `configs/hpdv3.py:smoke`, whose data are there, up to its first step. With --draw: what drawing the full-size
model's parameters takes, all of them and those that train.
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
FIRST_STEP = """
import collections, json, os, sys, time
started = time.perf_counter()
import jax
seen, spent = collections.Counter(), collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: seen.update([event.rpartition("/")[2]]))
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: spent.update({event.rpartition("/")[2]: seconds})
)
from dinalrm_jax import train
from dinalrm_jax.cli.options import TrainOptions
from dinalrm_jax.training.metrics import MetricsLog
def first(log):
    programs = seen["compile_requests_use_cache"], seen["cache_hits"]
    tracing = spent["jaxpr_trace_duration"] + spent["jaxpr_to_mlir_module_duration"]
    seconds = time.perf_counter() - started, time.process_time(), tracing, spent["backend_compile_duration"]
    print("\\n" + json.dumps([*seconds, *programs]), flush=True)
    os._exit(0)
MetricsLog.start = first
train.main(TrainOptions(config="configs/hpdv3.py:smoke", workdir=sys.argv[1]))
"""

DRAW = """
import json, resource, sys, time
from dinalrm_jax.model.config import RewardModelConfig
from dinalrm_jax.model.execution import ExecutionConfig
from dinalrm_jax.model.parameters import draw
from dinalrm_jax.model.reward import is_trainable, reward_functional
module = reward_functional(RewardModelConfig(), ExecutionConfig())
started, cores = time.perf_counter(), time.process_time()
first = draw(module, 0, is_trainable if sys.argv[1] == "what trains" else lambda name: True)
seconds = time.perf_counter() - started, time.process_time() - cores
sizes = sum(array.nbytes for array in first.values()), 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([*seconds, *(size / 2**30 for size in sizes)]))
"""


def in_process(script: str, argument: str, cache: str) -> list[float]:
    """What a script's last line says."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
    command = [sys.executable, "-c", script, argument]
    result = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def first_score(cache: str) -> list[float]:
    """Seconds to import, to load, to score, and in all."""
    return in_process(FIRST_SCORE, str(ROOT / "tests" / "golden" / "released-tiny"), cache)


def first_steps(rounds: int) -> None:
    """Prints seconds to the first step."""
    with tempfile.TemporaryDirectory() as workdir:
        in_process(FIRST_STEP, workdir, f"{workdir}/cache")  # makes the data
        for number in range(rounds):
            for name in ("no cache", "warm cache"):
                found = in_process(FIRST_STEP, workdir, f"{workdir}/cache of round {number}")
                wall, cores, tracing, compiling, programs, hits = found
                print(
                    f"{name}: first step after {wall:.1f} s ({cores:.1f} s of all cores); traced and lowered "
                    f"{tracing:.1f} s, compiled or loaded {compiling:.1f} s, several at a time; of {programs:.0f} "
                    f"programs {hits:.0f} were there"
                )


def main(_) -> None:
    rounds = flags.FLAGS.rounds
    if flags.FLAGS.train:
        first_steps(rounds)
        return
    if flags.FLAGS.draw:
        for name in ("everything", "what trains"):
            wall, cores, drawn, peak = in_process(DRAW, name, "")
            print(f"{name}, {drawn:.2f} GiB: {wall:.1f} s ({cores:.1f} s of all cores), peak memory {peak:.2f} GiB")
        return
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
    flags.DEFINE_bool("train", False, "Up to the first training step.")
    flags.DEFINE_bool("draw", False, "Draw the full-size model.")
    app.run(main)
