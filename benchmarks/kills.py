"""Commands killed with SIGKILL at random moments, each followed by the same command, until they are through.

    python -m benchmarks.kills [--kills 50] [--only preprocess,train] [--seed 0]

A run begins in an empty directory and is killed and started again until it gets to its end; then its output must
be that of an undisturbed run, byte for byte, and nothing else may lie beside it. Runs follow each other until the
kills of a part are spent. A server is killed while a client scores, and started again on its port: the client, which
tries again, must get every score, and the right one. The exit status is 1 where anything differs.
"""

import dataclasses
import json
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from absl import app, flags, logging
from PIL import Image
from tqdm import tqdm

import dinalrm_jax as dina
from benchmarks.rehearsal import same
from dinalrm_jax.client import ClientConfig, RewardClient
from dinalrm_jax.model.backbone.sd3.config import SD3Config
from dinalrm_jax.model.config import LoRAConfig, RewardModelConfig
from dinalrm_jax.model.encoding import EncodersConfig
from dinalrm_jax.scenes.config import ScenesConfig
from dinalrm_jax.scenes.records import write_scene_records


@dataclasses.dataclass(frozen=True)
class Part:
    """A command to kill.

    Attributes:
        command: its arguments, for the output it is to write; it holds that one's lock while it works.
        stage: how far an output is, in words, for the report.
        results: what of the output is compared; all of it where nothing is named. A run's times are its own.
    """

    command: Callable[[pathlib.Path], list[str]]
    stage: Callable[[pathlib.Path], str]
    results: tuple[str, ...] = (".",)


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


def train(inputs: pathlib.Path) -> Part:
    """A run of seconds: the generator's 40 steps, the reward's 150, evaluated and saved every few."""

    def command(output: pathlib.Path) -> list[str]:
        return ["dinalrm_jax.train", "--config=tests/tiny_run.py", f"--workdir={output}"]

    def stage(output: pathlib.Path) -> str:
        for name, words in (
            ("report/results.json", "reported"), ("model", "model saved"), ("reward/best", "evaluated"),
            ("reward", "in the reward stage"), ("generator/checkpoints", "in the generator"), ("data", "data drawn"),
        ):  # fmt: skip
            if (output / name).exists():
                return words
        return "begun"

    return Part(command, stage, ("model", "generator/backbone", "report/results.json", "data"))


def evaluate(inputs: pathlib.Path) -> Part:
    """A small model on 400 drawn pairs, at two levels and their ensemble."""
    encoders = EncodersConfig("tiny", 16)
    transformer = SD3Config(
        sample_size=16, num_layers=2, num_attention_heads=2, attention_head_dim=8, joint_attention_dim=64,
        caption_projection_dim=16, pooled_projection_dim=64, pos_embed_max_size=12, dual_attention_layers=(0,),
    )  # fmt: skip
    config = RewardModelConfig(
        transformer, num_blocks=1, visual_taps=(1,), text_taps=(1,), lora=LoRAConfig(2, 4.0), encoders=encoders
    )
    dina.RewardModel.init(config).save(inputs / "model")
    write_scene_records(inputs / "data", ScenesConfig(train_pairs=1, eval_pairs=400, image_size=32), encoders)

    def command(output: pathlib.Path) -> list[str]:
        return [
            "dinalrm_jax.evaluate", f"--checkpoint={inputs / 'model'}", "--benchmark=records",
            f"--data={inputs / 'data'}", f"--output={output}", "--dtype=float32", "--sigma=0.2,0.6",
            "--ensemble=0.2,0.6",
        ]  # fmt: skip

    return Part(command, lambda output: "written" if output.exists() else "at work")


PARTS = {"preprocess": preprocess, "train": train, "evaluate": evaluate}


def kill_server(root: pathlib.Path, kills: int, rng: random.Random) -> bool:
    """Kills a server while it scores, starts it again, and so on; whether no score was lost or wrong."""
    evaluate(root / "inputs")
    model = dina.RewardModel.from_pretrained(root / "inputs" / "model", dtype="float32")
    transformer = model.config.transformer
    latents = np.random.default_rng(0).standard_normal((64, 8, 8, transformer.in_channels), np.float32)
    prompt = model.encode_prompt([f"prompt {number}" for number in range(64)])
    prompt = dina.PromptEmbeds(np.asarray(prompt.prompt_embeds), np.asarray(prompt.pooled_prompt_embeds))
    sigma = float(dina.noise.nearest_schedule_sigma(0.4))
    expected = model.score_latents(latents, prompt, sigma, seed=0)
    before = sorted(root.rglob("*"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        "dinalrm_jax.serve", f"--checkpoint={root / 'inputs' / 'model'}", "--dtype=float32", f"--port={port}",
        "--warmup=8x8x8", "--max-batch-size=4",
    ]  # fmt: skip
    wrong, done, stop = [], 0, threading.Event()

    def score() -> None:
        nonlocal done
        with RewardClient(ClientConfig(f"http://127.0.0.1:{port}", max_retries=60, rows_per_request=4)) as client:
            while not stop.is_set():
                found = client.score_latents(latents, prompt, 0.4)
                wrong.extend(np.flatnonzero(np.abs(found - expected) > 1e-5).tolist())
                done += 1

    with ThreadPoolExecutor(1) as pool, tqdm(total=kills, desc="serve", unit="kill") as bar:
        scoring, server = pool.submit(score), start(command)
        for _ in range(kills):
            with RewardClient(ClientConfig(f"http://127.0.0.1:{port}")) as client:
                client.wait_until_ready(120)
            time.sleep(rng.uniform(0, 2))
            server.send_signal(signal.SIGKILL)
            server.communicate()
            server = start(command)
            bar.update()
        stop.set()
        scoring.result()  # raises where a score was lost for good
        server.terminate()
        server.communicate()
    left = sorted(set(root.rglob("*")) - set(before))
    print(
        f"serve: {kills} kills; {done} batches of 64 scored, {len(wrong)} scores wrong, left behind: "
        f"{left or 'nothing'}; the last server ended with {server.returncode} at SIGTERM"
    )
    return not wrong and not left and server.returncode == 0


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
        found = compared(part, whole, output)
        halves = [path.name for pattern in LEFTOVERS for path in output.rglob(pattern)]
        beside += halves
        results[f"{found}, {f'beside it: {beside}' if beside else 'nothing beside it'}"] += 1
    bar.close()
    print(f"{name}: {kills} kills in {results.total()} runs; killed {dict(stages)}")
    for result, count in results.items():
        print(f"{name}: {count} runs: {result}")
    return all(result.startswith("identical") and result.endswith("nothing beside it") for result in results)


LEFTOVERS = (".*.partial-*", ".*.lock", "*.orbax-checkpoint-tmp", "damaged-*")


def compared(part: Part, whole: pathlib.Path, output: pathlib.Path) -> str:
    """How what two runs left compares."""
    for name in part.results:
        left, right = whole / name, output / name
        if left.is_file():
            found = "identical" if right.is_file() and left.read_bytes() == right.read_bytes() else f"DIFFERENT: {name}"
        else:
            found = same(left, right)
        if not found.startswith("identical"):
            return f"{name}: {found}"
    return "identical"


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    logging.set_verbosity(logging.WARNING)  # httpx tells every request
    values, rng = flags.FLAGS, random.Random(flags.FLAGS.seed)
    names = values.only or [*PARTS, "serve"]
    shares = [values.kills // len(names) + (number < values.kills % len(names)) for number in range(len(names))]
    with tempfile.TemporaryDirectory(prefix="kills-") as directory:
        root = pathlib.Path(directory)
        passed = [
            kill_server(root / name, share, rng)
            if name == "serve"
            else kill_part(name, PARTS[name](root / name / "inputs"), root / name, share, rng)
            for name, share in zip(names, shares)
        ]
    sys.exit(not all(passed))


if __name__ == "__main__":
    flags.DEFINE_integer("kills", 50, "Spread evenly over the parts.", 1)
    flags.DEFINE_list("only", [], f"Parts: {', '.join(PARTS)}, serve; all if not given.")
    flags.DEFINE_integer("seed", 0, "Of the moments.")
    app.run(main)
