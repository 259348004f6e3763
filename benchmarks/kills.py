"""Commands killed with SIGKILL at random moments, each followed by the same command, until they are through.

    python -m benchmarks.kills [--kills 50] [--only preprocess] [--seed 0]

A run begins in an empty directory and is killed and started again until it gets to its end; then its output must
be that of an undisturbed run, byte for byte, and nothing else may lie beside it. Runs follow each other until the
kills of a part are spent. The exit status is 1 where one differs.
"""

import dataclasses
import json
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable

import numpy as np
from absl import app, flags
from PIL import Image
from tqdm import tqdm

from benchmarks.rehearsal import same


@dataclasses.dataclass(frozen=True)
class Part:
    """A command to kill.

    Attributes:
        command: its arguments, for the output it is to write; it holds that one's lock while it works.
        stage: how far an output is, in words, for the report.
    """

    command: Callable[[pathlib.Path], list[str]]
    stage: Callable[[pathlib.Path], str]


def preprocess(inputs: pathlib.Path) -> Part:
    """200 small pictures with the built-in encoders, in 25 shards of images and 10 of prompts."""
    (inputs / "images").mkdir(parents=True)
    rng, rows = np.random.default_rng(0), []
    for number in range(100):
        names = [f"images/{number:03}{side}.png" for side in "ab"]
        for name in names:
            pixels = rng.integers(0, 256, (4, 4, 3), np.uint8)
            Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC).save(inputs / name)
        rows.append({"prompt": f"prompt {number % 40}", "chosen": names[0], "rejected": names[1]})
    (inputs / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def command(output: pathlib.Path) -> list[str]:
        return [
            "dinalrm_jax.preprocess", "--dataset=jsonl", f"--source={inputs}", f"--output={output}", "--encoders=tiny",
            "--buckets=64x64", "--min-area=0", "--images-per-shard=8", "--prompts-per-shard=4",
        ]  # fmt: skip

    def stage(output: pathlib.Path) -> str:
        work = output.with_name(f"{output.name}.unfinished")
        if output.exists():
            return "published, its work not removed" if work.exists() else "published"
        for kind in ("prompts", "images", "sizes"):
            if list(work.glob(f"parts/{kind}-*.json")):
                return f"with {kind}"
        return "begun"

    return Part(command, stage)


PARTS = {"preprocess": preprocess}


def start(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def works(process: subprocess.Popen, output: pathlib.Path) -> bool:
    """Whether the process holds its output's lock."""
    try:
        return json.loads(output.with_name(f".{output.name}.lock").read_text())["pid"] == process.pid
    except (FileNotFoundError, ValueError):  # nobody's, or just being written
        return False


def wait_until(working: bool, process: subprocess.Popen, output: pathlib.Path) -> None:
    """Returns once the process works or does no more, or has ended."""
    while process.poll() is None and works(process, output) != working:
        time.sleep(0.001)


def through(process: subprocess.Popen, output: pathlib.Path) -> bool:
    """Whether the process has ended with a whole output; raises for any other end than that and our kill."""
    stderr = process.communicate()[1]
    if process.returncode == -signal.SIGKILL:
        return False
    if process.returncode == 0 or (process.returncode == 2 and f"{output} exists already" in stderr):
        return True
    raise RuntimeError(f"{' '.join(process.args)} ended with {process.returncode}:\n{stderr[-3000:]}")


def kill_part(name: str, part: Part, root: pathlib.Path, kills: int, rng: random.Random) -> bool:
    """Spends the kills of a part; whether all its runs came to the same end as the undisturbed one."""
    whole = root / "undisturbed" / "out"
    process = start(part.command(whole))
    wait_until(True, process, whole)
    began = time.perf_counter()
    wait_until(False, process, whole)
    seconds = time.perf_counter() - began
    assert through(process, whole)
    print(f"{name}: {seconds:.1f} s of work undisturbed")
    stages, results, left = Counter(), Counter(), kills
    bar = tqdm(total=kills, desc=name, unit="kill")
    while left:
        output = root / f"run-{results.total():03}" / "out"
        finished = False
        while not finished:
            process = start(part.command(output))
            wait_until(True, process, output)
            if left:
                time.sleep(rng.uniform(0, seconds))
                if works(process, output):
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    stages[part.stage(output)] += 1
                    left -= 1
                    bar.update()
            finished = through(process, output)
        beside = sorted(path.name for path in output.parent.iterdir() if path != output)
        found = same(whole, output)
        results[f"{found}, {f'beside it: {beside}' if beside else 'nothing beside it'}"] += 1
    bar.close()
    print(f"{name}: {kills} kills in {results.total()} runs; killed {dict(stages)}")
    for result, count in results.items():
        print(f"{name}: {count} runs: {result}")
    return all(result.startswith("identical") and result.endswith("nothing beside it") for result in results)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    values, rng = flags.FLAGS, random.Random(flags.FLAGS.seed)
    names = values.only or list(PARTS)
    shares = [values.kills // len(names) + (number < values.kills % len(names)) for number in range(len(names))]
    with tempfile.TemporaryDirectory(prefix="kills-") as directory:
        root = pathlib.Path(directory)
        passed = [
            kill_part(name, PARTS[name](root / name / "inputs"), root / name, share, rng)
            for name, share in zip(names, shares)
        ]
    sys.exit(not all(passed))


if __name__ == "__main__":
    flags.DEFINE_integer("kills", 50, "Spread evenly over the parts.", 1)
    flags.DEFINE_list("only", [], f"Parts: {', '.join(PARTS)}; all if not given.")
    flags.DEFINE_integer("seed", 0, "Of the moments.")
    app.run(main)
