"""The reward server under load, over real sockets.

    python -m benchmarks.server [--mode load] [--verl PATH]     concurrent requests, round after round
    python -m benchmarks.server --mode restart [--verl PATH]    kill -9 and a new server in the middle of a round
    python -m benchmarks.server --mode overhead                 full-size model: HTTP beside the bare reward function

`load` and `restart` start `python -m dinalrm_jax.serve` on a random model of SD3.5-M's input widths and
next to no computation, and send --requests requests of full size from --loops processes with an event loop
each, all at once: by our client, or by verl-omni's own (PATH is a checkout of verl-project/verl-omni; needs
torch and aiohttp). Every score is compared with `RewardModel.score_latents`.
"""

import asyncio
import contextlib
import importlib.util
import multiprocessing
import os
import pathlib
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import IO

import jax
import numpy as np
import psutil
from absl import app, flags, logging

import dinalrm_jax as dina
from dinalrm_jax.client import AsyncRewardClient, ClientConfig, RewardClient
from dinalrm_jax.model.backbone.sd3.config import SD3Config
from dinalrm_jax.model.config import LoRAConfig, RewardModelConfig
from dinalrm_jax.noise import nearest_schedule_sigma
from dinalrm_jax.server.app import RewardServer
from dinalrm_jax.server.config import ServerConfig
from dinalrm_jax.server.protocol import RowShape

SMALL = RewardModelConfig(
    SD3Config(num_layers=2, num_attention_heads=1, attention_head_dim=8, caption_projection_dim=8,
              dual_attention_layers=(), pos_embed_max_size=96),
    num_blocks=1, visual_taps=(1,), text_taps=(1,), lora=LoRAConfig(2, 4.0),
)  # fmt: skip
PROMPTS = 16
SIGMA = 0.4


def row(number: int, shape: RowShape, widths: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Latents (h, w, 16), embeddings and pooled embeddings of a request."""
    latents = np.random.default_rng(number).standard_normal((shape.height, shape.width, 16), np.float32)
    rng = np.random.default_rng(number % PROMPTS)
    embeds = rng.standard_normal((shape.tokens, widths[0]), np.float32)
    return latents, embeds, rng.standard_normal(widths[1], np.float32)


def client_process(verl, port, shape, numbers, retries, connection) -> None:
    """One event loop; for every "go" sends its requests at once and returns (score, seconds) of each."""
    rows = [row(number, shape, (4096, 2048)) for number in numbers]
    if verl is None:
        compute = _ours(f"http://127.0.0.1:{port}", retries)
    else:
        compute = _verl(verl, f"http://127.0.0.1:{port}/v1/score", retries)

    async def timed(index):
        started = time.perf_counter()
        try:
            score = await compute(*rows[index])
        except Exception as error:
            score = f"{type(error).__name__}: {error}"
        return score, time.perf_counter() - started

    async def run():
        connection.send("ready")
        while await asyncio.to_thread(connection.recv) == "go":
            connection.send(await asyncio.gather(*map(timed, range(len(rows)))))
        os._exit(0)  # verl-omni's client leaves its session open, and says so at length

    asyncio.run(run())


@contextlib.contextmanager
def clients(verl: str | None, port: int, shape: RowShape, requests: int, loops: int, retries: int) -> Iterator[list]:
    """A pipe to each of `loops` processes that share the requests; see `client_process`."""
    context = multiprocessing.get_context("spawn")
    pipes = []
    for numbers in np.array_split(np.arange(requests), loops):
        ours, theirs = context.Pipe()
        arguments = (verl, port, shape, numbers.tolist(), retries, theirs)
        context.Process(target=client_process, args=arguments, daemon=True).start()
        pipes.append(ours)
    try:
        for pipe in pipes:
            pipe.recv()
        yield pipes
    finally:
        for pipe in pipes:
            pipe.send("stop")


@contextlib.contextmanager
def serving(model: dina.RewardModel, config: ServerConfig) -> Iterator[int]:
    """A server in this process, ready; its port."""
    server, loop, stop = RewardServer(model, config, "random"), asyncio.new_event_loop(), asyncio.Event()
    started: queue.SimpleQueue = queue.SimpleQueue()

    async def serve():
        async with server.listening() as port:
            started.put(port)
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    port = started.get()
    try:
        with RewardClient(ClientConfig(f"http://127.0.0.1:{port}")) as client:
            client.wait_until_ready(600)
        yield port
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()


def _ours(url, retries):
    client = None

    async def compute(latents, embeds, pooled):
        nonlocal client
        if client is None:
            client = AsyncRewardClient(ClientConfig(url, max_retries=retries))
        return float(
            (await client.score_latents(latents[None], dina.PromptEmbeds(embeds[None], pooled[None]), SIGMA))[0]
        )

    return compute


def _verl(checkout, url, retries):
    import torch

    path = pathlib.Path(checkout) / "verl_omni/utils/reward_score/latent_http_scorer_client.py"
    spec = importlib.util.spec_from_file_location("latent_http_scorer_client", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    async def compute(latents, embeds, pooled):
        image = torch.from_numpy(latents.transpose(2, 0, 1).copy())
        info = {"prompt_embeds": torch.from_numpy(embeds), "pooled_prompt_embeds": torch.from_numpy(pooled)}
        result = await module.compute_score(image, "", info, url, SIGMA, 0, 0.1, 1.0, max_retries=retries)
        assert result["score"] == 0.1 * result["drm_raw_score"] + 1
        return result["drm_raw_score"]

    return compute


def start_server(checkpoint: pathlib.Path, port: int, shape: RowShape, log: IO[str] | None = None) -> subprocess.Popen:
    command = [sys.executable, "-m", "dinalrm_jax.serve", f"--checkpoint={checkpoint}", "--dtype=float32"]
    return subprocess.Popen([*command, f"--port={port}", f"--warmup={shape}"], stderr=log)


def metric(port: int, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        return float(re.search(rf"^{name} (\S+)$", response.read().decode(), re.MULTILINE)[1])


def cpu_seconds(server: subprocess.Popen) -> float:
    times = psutil.Process(server.pid).cpu_times()
    return times.user + times.system


def expected_scores(model: dina.RewardModel, count: int, shape: RowShape) -> np.ndarray:
    sigma = float(nearest_schedule_sigma(SIGMA))
    scores = []
    for start in range(0, count, 8):
        latents, embeds, pooled = map(np.stack, zip(*(row(n, shape, (4096, 2048)) for n in range(start, start + 8))))
        scores.append(model.score_latents(latents, dina.PromptEmbeds(embeds, pooled), sigma))
    return np.concatenate(scores)[:count]


def load(values, restart: bool) -> None:
    shape = RowShape.parse(values.shape)
    model = dina.RewardModel.init(SMALL)
    expected = expected_scores(model, values.requests, shape)
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = pathlib.Path(directory) / "model"
        model.save(checkpoint)
        server = start_server(checkpoint, values.port, shape)
        try:
            with (
                clients(values.verl, values.port, shape, values.requests, values.loops, values.retries) as pipes,
                RewardClient(ClientConfig(f"http://127.0.0.1:{values.port}")) as client,
            ):
                client.wait_until_ready(120)
                body = (16 * shape.height * shape.width + 4096 * shape.tokens + 2048) * 4
                print(
                    f"jax {jax.__version__}, {os.cpu_count()} cores for server and clients, {values.requests} requests "
                    f"of {body / 1e6:.1f} MB ({shape}) at once from {values.loops} event loops by "
                    f"{'our client' if values.verl is None else 'verl-omni client'}, {values.retries} retries"
                )
                compiled = metric(values.port, "dinalrm_xla_compilations")
                for number in range(1, values.rounds + 1):
                    started, worked = time.perf_counter(), cpu_seconds(server)
                    for pipe in pipes:
                        pipe.send("go")
                    if restart:
                        time.sleep(values.kill_after)
                        server.kill()
                        server.wait()
                        killed = time.perf_counter()
                        server = start_server(checkpoint, values.port, shape)
                        client.wait_until_ready(120)
                        away = time.perf_counter() - killed
                        print(f"killed with SIGKILL after {values.kill_after:g} s, ready again {away:.1f} s later")
                    report_round(number, [result for pipe in pipes for result in pipe.recv()], expected, started)
                    memory = psutil.Process(server.pid).memory_info().rss / 2**20
                    worked = 1000 * (cpu_seconds(server) - (0 if restart else worked)) / values.requests
                    print(f"  server: {memory:.0f} MiB resident, {worked:.1f} ms of CPU a request", flush=True)
                if not restart:
                    new = metric(values.port, "dinalrm_xla_compilations") - compiled
                    print(f"programs compiled after the start: {new:.0f}")
        finally:
            server.send_signal(signal.SIGTERM)
            print(f"server's exit status after SIGTERM: {server.wait(60)}")


def report_round(number, results, expected, started) -> None:
    seconds = time.perf_counter() - started
    lost = [score for score, _ in results if isinstance(score, str)]
    answered = [(score, want) for (score, _), want in zip(results, expected) if not isinstance(score, str)]
    error = np.abs(np.subtract(*zip(*answered))) if answered else np.array([np.nan])
    p50, p99 = np.percentile([latency for _, latency in results], [50, 99])
    print(
        f"round {number}: {len(results) / seconds:.0f} requests/s, p50 {p50:.2f} s, p99 {p99:.2f} s, lost {len(lost)}, "
        f"wrong by more than 1e-4: {(~(error <= 1e-4)).sum()} (largest error {error.max():.1e})"
    )
    for text in lost[:3]:
        print(f"  {text}")


def overhead(values) -> None:
    """Batches of 8 through HTTP beside the same batches through `reward_fn`, in rotation."""
    shape = RowShape.parse(values.shape)
    model = dina.RewardModel.init(RewardModelConfig())
    latents, embeds, pooled = map(np.stack, zip(*(row(n, shape, (4096, 2048)) for n in range(8))))
    prompt = dina.PromptEmbeds(embeds, pooled)
    sigma = float(nearest_schedule_sigma(SIGMA))
    bare = jax.jit(model.reward_fn(sigma))
    device = jax.device_put((latents, prompt))

    async def over_http(port):
        config = ClientConfig(f"http://127.0.0.1:{port}", rows_per_request=1)
        async with AsyncRewardClient(config) as client:
            return await client.score_latents(latents, prompt, SIGMA)

    def direct():
        return np.asarray(bare(model.params, *device, jax.random.key(0)))

    seconds = {"bare": [], "http": []}
    with serving(model, ServerConfig(port=values.port, warmup=(str(shape),))) as port:
        for number in range(values.rounds + 1):
            for name, function in (("bare", direct), ("http", lambda: asyncio.run(over_http(port)))):
                started = time.perf_counter()
                scores = function()
                if number:  # the first is a warm-up
                    seconds[name].append(time.perf_counter() - started)
                print(f"{name}: {time.perf_counter() - started:.2f} s, first score {scores[0]:+.5f}", flush=True)
    medians = {name: float(np.median(times)) for name, times in seconds.items()}
    print(
        f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {os.cpu_count()} cores, full size, float32, {shape}, "
        f"8 requests of one row at once, client in this process: reward_fn {medians['bare']:.2f} s, over HTTP "
        f"{medians['http']:.2f} s, {100 * (medians['http'] / medians['bare'] - 1):+.1f} % (medians of {values.rounds})"
    )


def main(_) -> None:
    values = flags.FLAGS
    logging.set_verbosity(logging.WARNING)  # httpx tells every request
    if values.mode == "overhead":
        overhead(values)
    else:
        load(values, restart=values.mode == "restart")


if __name__ == "__main__":
    flags.DEFINE_enum("mode", "load", ["load", "restart", "overhead"], "What to measure.")
    flags.DEFINE_string("verl", None, "A checkout of verl-omni, whose client is used instead of ours.")
    flags.DEFINE_string("shape", "64x64x333", "Latent height and width and tokens of every request.")
    flags.DEFINE_integer("requests", 1000, "At once.")
    flags.DEFINE_integer("loops", 4, "Processes with an event loop each.")
    flags.DEFINE_integer("rounds", 1, "How often.")
    flags.DEFINE_integer("retries", 2, "Of the client.")
    flags.DEFINE_float("kill_after", 3.0, "Seconds into the round.")
    flags.DEFINE_integer("port", 8765, "Port of the server.")
    app.run(main)
