"""The serve command as a process: its flags, kill -9 under load, and SIGTERM."""

import json
import resource
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import numpy as np
import pytest

from dinalrm_jax.client import ClientConfig, RewardClient
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.noise import nearest_schedule_sigma
from dinalrm_jax.server.app import RewardServer
from dinalrm_jax.server.config import ServerConfig
from tests.conftest import ROOT
from tests.server.serving import inputs, take


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("served") / "model"
    tiny_model.save(directory)
    return directory


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def serve(*flags, log=None, before="") -> subprocess.Popen:
    """The command; `before`: what its shell does first."""
    command = [sys.executable, "-m", "dinalrm_jax.serve", "--dtype=float32", "--warmup=8x12x5", *flags]
    shell = ["sh", "-c", f'{before} exec "$@"', "sh"]
    return subprocess.Popen([*shell, *command], cwd=ROOT, stderr=log or subprocess.DEVNULL)


@pytest.mark.heavy
def test_killed_and_started_again_under_load_then_ended(checkpoint, tiny_model, tmp_path):
    """A retrying client loses nothing to kill -9; SIGTERM answers what waits and exits with 0."""
    port = free_port()
    # The names that verl-omni's documentation uses.
    flags = (f"--model-path={checkpoint}", f"--port={port}", "--max-batch-size=2", "--max-wait-ms=5", "--log-json")
    latents, prompt = inputs(80)
    expected = tiny_model.score_latents(latents, prompt, float(nearest_schedule_sigma(0.4)), seed=range(80))
    scores, answered = np.full(80, np.nan), threading.Event()
    config = ClientConfig(f"http://127.0.0.1:{port}", max_retries=200, backoff=0.1)

    def score(rows):
        with RewardClient(config) as client:
            for row in rows:
                one = slice(row, row + 1)
                scores[row] = client.score_latents(latents[one], take(prompt, one), seed=row)[0]
                if row % 10 == 1:
                    answered.set()

    files = sorted(checkpoint.parent.rglob("*"))
    with (tmp_path / "log").open("w") as log:
        server = serve(*flags, log=log)
        threads = [threading.Thread(target=score, args=(range(part, 80, 4),)) for part in range(4)]
        try:
            for thread in threads:
                thread.start()
            assert answered.wait(60)
            server.kill()
            assert server.wait(10) == -signal.SIGKILL
            assert sorted(checkpoint.parent.rglob("*")) == files  # nothing is left behind
            assert np.isnan(scores).any()
            server = serve(*flags, log=log)
            for thread in threads:
                thread.join(90)
            np.testing.assert_allclose(scores, expected, atol=1e-5)
            server.send_signal(signal.SIGTERM)
            assert server.wait(30) == 0
        finally:
            server.kill()
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines() if line.startswith("{")]
    assert lines[-1]["message"] == "stopped; every row that waited is answered"


@pytest.mark.parametrize(
    ("deadline", "ask", "message"),
    [(0.5, "pass", "the device hangs"), (100, "os.kill(os.getpid(), signal.SIGTERM)", "not done after 0.5 s")],
)
def test_a_hanging_device_ends_the_process(checkpoint, deadline, ask, message):
    """A batch that never ends is the end of the process, by itself or at SIGTERM, for its supervisor to restart it."""
    program = f"""
import asyncio, os, signal, time
import dinalrm_jax as dina
from dinalrm_jax.server.app import RewardServer
from dinalrm_jax.server.config import ServerConfig
model = dina.RewardModel.from_pretrained({str(checkpoint)!r}, dtype="float32")
config = ServerConfig(port=0, warmup=("4x4x5",), max_batch_size=1, deadline_s={deadline}, drain_s=0.5)
server = RewardServer(model, config, "tiny")
engine, plain = server.batcher.engine, server.batcher.engine.start
engine.start = lambda rows: plain(rows) if server.batcher.state == "loading" else lambda: time.sleep(100)
async def main():
    task = asyncio.ensure_future(server.serve())
    while server.batcher.state != "ready":
        await asyncio.sleep(0.05)
    server.batcher.submit([engine.probe(server.batcher.engine.shapes[0])])
    await asyncio.sleep(0.2)
    {ask}
    await task
asyncio.run(main())
"""
    started = time.monotonic()
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 70, result.stderr
    assert message in result.stderr
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("when", ["start", "later"])
def test_sigterm_while_compiling_ends_at_once(checkpoint, when):
    """A compilation cannot be interrupted; nobody waits for it."""
    program = f"""
import asyncio, os, signal, time
import dinalrm_jax as dina
from dinalrm_jax.server.app import RewardServer
from dinalrm_jax.server.config import ServerConfig
from dinalrm_jax.server.protocol import RowShape
model = dina.RewardModel.from_pretrained({str(checkpoint)!r}, dtype="float32")
server = RewardServer(model, ServerConfig(port=0, warmup=("4x4x5",), max_batch_size=1, allow_new_shapes=True), "tiny")
engine, plain, begun = server.batcher.engine, server.batcher.engine.compile, []
engine.compile = lambda shape: begun.append(shape) or time.sleep(100)
async def main():
    task = asyncio.ensure_future(server.serve())
    if {when!r} == "later":
        engine.compile = plain
        while server.batcher.state != "ready":
            await asyncio.sleep(0.05)
        engine.compile = lambda shape: begun.append(shape) or time.sleep(100)
        waiting = server.batcher.submit([engine.probe(RowShape(6, 6, 5))])
    while not begun:
        await asyncio.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)
    print(time.time(), flush=True)
    await task
asyncio.run(main())
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert time.time() - float(result.stdout) < 5


def test_half_open_heads_where_few_files_may_be_open(checkpoint, tmp_path):
    """More connections than the process may open files: it goes on, and its log stays short."""
    port, allowed = free_port(), 160
    with (tmp_path / "log").open("w") as log:
        limit = f"ulimit -S -n {allowed // 2}; ulimit -H -n {allowed};"
        flags = (f"--checkpoint={checkpoint}", f"--port={port}", "--max-batch-size=1")
        server = serve(*flags, log=log, before=limit)
        try:
            with RewardClient(ClientConfig(f"http://127.0.0.1:{port}")) as client:
                client.wait_until_ready(60)
                assert resource.prlimit(server.pid, resource.RLIMIT_NOFILE) == (allowed, allowed)
                half_open = []
                for _ in range(2 * allowed):
                    half_open.append(socket.create_connection(("127.0.0.1", port), timeout=10))
                    half_open[-1].sendall(b"GET /healthz HTTP/1.1\r\nhost: ")
                    time.sleep(0.001)
                for _ in range(10):
                    with httpx.Client(trust_env=False, timeout=2.0) as new:
                        assert new.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
                latents, prompt = inputs(1)
                assert np.isfinite(client.score_latents(latents, prompt)).all()
                for connection in half_open:
                    connection.close()
            server.send_signal(signal.SIGTERM)
            assert server.wait(30) == 0
        finally:
            server.kill()
    text = (tmp_path / "log").read_text()
    assert len(text) < 20_000
    assert "closed the one that waited longest" in text


@pytest.mark.parametrize(
    ("warmup", "message"),
    [
        ("64x64", "LATENT_HEIGHTxLATENT_WIDTHxTOKENS, for instance 64x64x333"),
        ("23x8x5", "latents' h is 23, expected a multiple of 2 up to 24"),
    ],
)
def test_shapes_that_cannot_be_served(tiny_model, warmup, message):
    with pytest.raises(ConfigError, match=message):
        RewardServer(tiny_model, ServerConfig(warmup=(warmup,)), "tiny")


def test_what_the_command_refuses(checkpoint):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for flags, message in (
            ((f"--checkpoint={checkpoint}", f"--port={port}"), f"error: cannot listen on 127.0.0.1:{port}: "),
            (
                ("--checkpoint=/nowhere", "--api-key-env=NO_SUCH_KEY"),
                "error: --api-key-env names NO_SUCH_KEY, which is",
            ),
        ):
            command = [sys.executable, "-m", "dinalrm_jax.serve", *flags, "--warmup=4x4x5"]
            result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
            assert result.returncode == 2, result.stderr
            assert message in result.stderr


def test_a_client_without_its_key_says_so():
    command = [sys.executable, "-m", "dinalrm_jax.client", "--api-key-env=NO_SUCH_KEY"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert "error: --api-key-env names NO_SUCH_KEY, which is empty or not set" in result.stderr
