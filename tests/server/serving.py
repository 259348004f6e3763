"""A server of the tiny model on a real socket, in a thread of the test's process."""

import asyncio
import contextlib
import json
import threading
import urllib.error
import urllib.request

import jax
import numpy as np

import dinalrm_jax as dina
from dinalrm_jax.server import protocol
from dinalrm_jax.server.app import RewardServer
from dinalrm_jax.server.config import ServerConfig
from tests.conftest import TINY_SD3

HEADERS = {"content-type": protocol.CONTENT_TYPE, protocol.VERSION_HEADER: protocol.VERSION}
SHAPE, OTHER_SHAPE = (8, 12, 5), (4, 4, 5)


class Running:
    """A server that listens, with what a test asks of it."""

    def __init__(self, server: RewardServer, port: int):
        self.server, self.url = server, f"http://127.0.0.1:{port}"

    def request(self, path: str, body: bytes | None = None, headers=HEADERS) -> tuple[int, dict]:
        request = urllib.request.Request(self.url + path, body, headers if body is not None else {})
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def score(self, body: bytes) -> dict:
        status, answer = self.request("/v1/score", body)
        assert status == 200, answer
        return answer

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(self.url + "/metrics") as response:
            lines = response.read().decode().splitlines()
        (value,) = [line.split()[1] for line in lines if line.split()[0] == name]
        return float(value)

    def wait(self, path: str = "/healthz", status: int = 200) -> None:
        for _ in range(600):
            if self.request(path)[0] == status:
                return
            threading.Event().wait(0.05)
        raise AssertionError(f"{path} did not answer {status} within 30 s")


@contextlib.contextmanager
def running(model: dina.RewardModel, *, ready: bool = True, api_key: str | None = None, **options):
    """Serves `model` while the context is open."""
    config = ServerConfig(port=0, **{"warmup": ("8x12x5", "4x4x5"), "max_batch_size": 4, **options})
    server = RewardServer(model, config, "tiny", api_key)
    ports, stop, loop = [], asyncio.Event(), asyncio.new_event_loop()
    listening = threading.Event()

    async def serve():
        async with server.listening() as port:
            ports.append(port)
            listening.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    assert listening.wait(10)
    try:
        found = Running(server, ports[0])
        if ready:
            found.wait()
        yield found
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        assert not thread.is_alive()
        loop.close()


def inputs(rows: int = 1, shape=SHAPE, seed: int = 1, dtype=np.float32):
    """(latents channels last, prompt) of random rows, in NumPy."""
    height, width, tokens = shape
    rng = np.random.default_rng(seed)
    latents = rng.standard_normal((rows, height, width, TINY_SD3.in_channels)).astype(dtype)
    prompt = dina.PromptEmbeds(
        rng.standard_normal((rows, tokens, TINY_SD3.joint_attention_dim)).astype(dtype),
        rng.standard_normal((rows, TINY_SD3.pooled_projection_dim)).astype(dtype),
    )
    return latents, prompt


def take(prompt: dina.PromptEmbeds, rows) -> dina.PromptEmbeds:
    return jax.tree.map(lambda array: array[rows], prompt)
