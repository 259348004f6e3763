"""Everything for the first hour with a GPU, in nine minutes.

    python -m benchmarks.gpu [--reference PATH]     PATH: a checkout of HKUST-C4G/diffusion-rm
    python -m benchmarks.gpu --rehearse             the same at tiny size on the CPU, in a minute

Each part runs in a process of its own, so that its peak of memory is its own and its failure no other's: parity with
the golden values, attention kernels against each other, scores, gradients, train and ReFL steps, the server, the
PyTorch original. A part that fails, that there is no time for or that cannot run here says so in the results,
`benchmarks/results/gpu_CARD.json`, which are written after every part. `python -m benchmarks.measured` shows them.

Needs jax with CUDA, flax, optax, aiohttp, httpx, psutil; of PyTorch's side torch with CUDA, diffusers, peft and what
the released code imports.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from absl import app, flags

from benchmarks.gpu.tables import slug
from dinalrm_jax.disk import write_json

ROOT = pathlib.Path(__file__).parent.parent.parent
# Seconds that a part may take, in the order in which they run; "ahead" runs beside the others, on the processors.
LIMITS = {
    "device": 45, "golden": 60, "kernels": 70, "score_large_batch": 75, "train_large": 100, "gradient_large": 75,
    "score_small_batch": 60, "refl": 120, "server": 120, "original_score": 90, "score_large": 60, "score_small": 60,
    "ensemble_large": 75, "original_score_compiled": 120, "original_train": 90,
}  # fmt: skip
BESIDE = ("ahead",)
LEAST = 15.0  # seconds that are left for a part to be begun


def run_part(name: str, seconds: float, environment: dict[str, str]) -> dict:
    """A part in its own process: its values, or why there are none."""
    values, started = flags.FLAGS, time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        answer = pathlib.Path(directory) / "answer.json"
        command = [sys.executable, "-m", "benchmarks.gpu", f"--part={name}", f"--answer={answer}"]
        command += [f"--target={values.target}"]
        command += ["--rehearse"] * values.rehearse
        command += [f"--reference={values.reference}"] * (values.reference is not None)
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environment}, stderr=subprocess.PIPE, start_new_session=True
        )
        try:
            _, stderr = process.communicate(timeout=seconds)
            last = (stderr.decode(errors="replace").strip().splitlines() or [""])[-1]
            found = (
                json.loads(answer.read_text())
                if answer.exists()
                else {"not_measured": f"exit {process.returncode}: {last}"}
            )
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            found = {"not_measured": f"it took longer than its {seconds:.0f} s"}
    return {**found, "wall_seconds": round(time.monotonic() - started, 1)}


def answer_part(name: str) -> None:
    """This process is a part."""
    from benchmarks.gpu.parts import (
        FULL,
        REHEARSAL,
        NotMeasured,
        parts,
    )  # takes seconds, which the parent need not wait
    from dinalrm_jax.devices.compilation import enable_compilation_cache
    from dinalrm_jax.mapping import ConfigError

    values = flags.FLAGS
    enable_compilation_cache()
    part = parts(REHEARSAL if values.rehearse else FULL, values.reference, values.target)[name]
    try:
        found = part()
    except (NotMeasured, ConfigError) as error:
        found = {"not_measured": str(error)}
    except Exception as error:  # a part's failure is a result
        found = {"not_measured": f"{type(error).__name__}: {error}".splitlines()[0]}
    write_json(pathlib.Path(values.answer), found, indent=1)


def main(argv: list[str]) -> None:
    values = flags.FLAGS
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    if values.part is not None:
        answer_part(values.part)
        return
    known = [*LIMITS, *BESIDE][1:]
    wanted = values.only or known
    if unknown := set(wanted) - set(known):
        raise app.UsageError(
            f"there are no parts {', '.join(sorted(unknown))}; --only takes some of {', '.join(known)}"
        )
    end = time.monotonic() + 60 * values.minutes
    # One process at a time has the device, and nearly all of its memory, as launch/ gives it.
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".92"} | ({"JAX_PLATFORMS": "cpu"} if values.rehearse else {})
    first = run_part("device", LIMITS["device"], environment)
    if first.get("platform") not in ("gpu", "cpu" if values.rehearse else "gpu"):
        sys.exit(f"no GPU here ({first.get('not_measured') or first['platform']}); --rehearse runs it on the CPU")
    if "H200" in first["device"]:
        values.target = "h200"
    path = pathlib.Path(values.output) / f"gpu_{slug(first['device'])}.json"
    date = time.strftime("%Y-%m-%d", time.gmtime())
    kept = json.loads(path.read_text())["parts"] if values.only and path.exists() else {}
    result = {
        "command": "python -m benchmarks.gpu" + " --rehearse" * values.rehearse,
        "parts": {**kept, "device": {**first, "date": date}},
    }
    lock = threading.Lock()

    def keep(name: str, found: dict) -> None:
        with lock:
            result["parts"][name] = {**found, "date": date}
            write_json(path, result, indent=1)
            said = found.get("not_measured")
            print(f"{name}: {'not measured: ' + said if said else 'measured'}, {found['wall_seconds']} s", flush=True)

    def left() -> float:
        return end - time.monotonic()

    with ThreadPoolExecutor(len(BESIDE)) as pool:
        for name in filter(wanted.__contains__, BESIDE):
            pool.submit(lambda name=name: keep(name, run_part(name, left(), {**environment, "JAX_PLATFORMS": "cpu"})))
        for name, limit in LIMITS.items():
            if name not in wanted:
                continue
            if left() < LEAST:
                spent = f"the {values.minutes:g} minutes were spent"
                keep(name, {"not_measured": spent, "wall_seconds": 0.0})
                continue
            keep(name, run_part(name, min(limit, left()), environment))
    print(path)


if __name__ == "__main__":
    flags.DEFINE_string("reference", None, "A checkout of HKUST-C4G/diffusion-rm.")
    flags.DEFINE_float("minutes", 9.0, "All parts together.")
    flags.DEFINE_string("output", str(ROOT / "benchmarks" / "results"), "Folder of the results.")
    flags.DEFINE_list("only", [], "Parts to measure; the others stay as the file has them.")
    flags.DEFINE_bool("rehearse", False, "At tiny size on the CPU.")
    flags.DEFINE_string("target", "h100", "What is compiled ahead for.")
    flags.DEFINE_string("part", None, "Of this program's own processes: the part to measure.")
    flags.DEFINE_string("answer", None, "Likewise: the file for its values.")
    app.run(main)
