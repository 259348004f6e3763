"""A good client's times while others attack the reward server, over loopback.

    python -m benchmarks.server_attacks [--seconds 10] [--shape 32x32x77]

Starts `python -m dinalrm_jax.serve` on a random model of SD3.5-M's input widths and next to no computation. A good
client sends one request of one row after another, first alone, then beside each attack, which comes from one
process of this machine and ends with its turn:

    slow heads      180 connections that send a byte of a head every second
    gzip bombs      4 connections, request after request: 1 MiB that would be 1 GiB, as gzip and as "identity, gzip"
    body flood      12 connections, request after request: bodies of the largest size taken, of zeros
    endless bodies  4 connections that send chunk after chunk, without an end
    stalled bodies  12 connections that announce the largest body and send a byte of it every second

The attackers' own work takes cores, so each attack is bounded in bytes and requests a second, and one that is refused
waits a moment, as clients do.
"""

import asyncio
import contextlib
import gzip
import multiprocessing
import os
import pathlib
import signal
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable

import httpx
import jax
import numpy as np
import psutil
from absl import app, flags, logging

import dinalrm_jax as dina
from benchmarks.server import SMALL, metric, row, start_server
from dinalrm_jax.client import ClientConfig, RewardClient
from dinalrm_jax.server import protocol
from dinalrm_jax.server.protocol import RowShape

HEAD = (
    "POST /v1/score HTTP/1.1\r\nhost: x\r\n"
    f"{protocol.VERSION_HEADER}: {protocol.VERSION}\r\ncontent-type: {protocol.CONTENT_TYPE}\r\n"
)
PAUSE = 0.1  # seconds of an attacker between two requests
CHUNK = bytes(2**16)


async def slow_head(port: int, _: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for byte in f"{HEAD}x-slow: {'x' * 1000}".encode():
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(1)
    finally:
        writer.close()


async def gzip_bomb(port: int, number: int) -> None:
    encoding = ("gzip", "identity, gzip")[number % 2]
    await send(port, f"content-encoding: {encoding}\r\ncontent-length: {len(BOMB)}", BOMB)


async def largest_body(port: int, _: int) -> None:
    await send(port, f"content-length: {LARGEST}", *(LARGEST // len(CHUNK)) * [CHUNK], bytes(LARGEST % len(CHUNK)))


async def endless_body(port: int, _: int) -> None:
    await send(port, "transfer-encoding: chunked", *10**5 * [b"10000\r\n" + CHUNK + b"\r\n"])


async def stalled_body(port: int, _: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"{HEAD}content-length: {LARGEST}\r\n\r\n".encode())
        while not reader.at_eof():
            writer.write(b"x")
            await writer.drain()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reader.read(1000), 1)
                return
    finally:
        writer.close()


async def send(port: int, header: str, *parts: bytes) -> None:
    """A request, to its answer or the end of the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"{HEAD}{header}\r\n\r\n".encode())
        for part in parts:
            writer.write(part)
            await writer.drain()
        await reader.read(1000)
    finally:
        writer.close()


ATTACKS: dict[str, tuple[int, Callable[[int, int], Awaitable[None]]]] = {
    "slow heads": (180, slow_head),
    "gzip bombs": (4, gzip_bomb),
    "body flood": (12, largest_body),
    "endless bodies": (4, endless_body),
    "stalled bodies": (12, stalled_body),
}
BOMB, LARGEST = b"", 0  # set in the attackers' process


def attack(name: str, port: int, seconds: float, largest: int, done) -> None:
    """A process: the attack's connections, each opened again when it ends, for so many seconds."""
    global BOMB, LARGEST
    BOMB, LARGEST = gzip.compress(bytes(2**30), 1)[: 2**20] if name == "gzip bombs" else b"", largest
    os.nice(5)  # the attackers stand for other machines
    count, one = ATTACKS[name]
    sent = 0

    async def again(number: int) -> None:
        nonlocal sent
        while True:
            with contextlib.suppress(OSError):
                await one(port, number)
            sent += 1
            await asyncio.sleep(PAUSE)

    async def run() -> None:
        tasks = [asyncio.create_task(again(number)) for number in range(count)]
        await asyncio.sleep(seconds)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    done.send("go")
    asyncio.run(run())
    done.send(sent)


def good_requests(port: int, body: bytes, seconds: float) -> tuple[list[float], list[int]]:
    """Seconds and statuses of one request after another, on one connection."""
    headers = {"content-type": protocol.CONTENT_TYPE, protocol.VERSION_HEADER: protocol.VERSION}
    until, times, statuses = time.monotonic() + seconds, [], []
    with httpx.Client(trust_env=False, timeout=60, headers=headers) as client:
        while time.monotonic() < until:
            started = time.perf_counter()
            statuses.append(client.post(f"http://127.0.0.1:{port}/v1/score", content=body).status_code)
            times.append(time.perf_counter() - started)
    return times, statuses


def main(_) -> None:
    values = flags.FLAGS
    logging.set_verbosity(logging.WARNING)
    shape = RowShape.parse(values.shape)
    latents, embeds, pooled = (array[None] for array in row(0, shape, (4096, 2048)))
    body = protocol.serialize(latents, dina.PromptEmbeds(embeds, pooled), np.array([0.4]), np.array([0]))
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = pathlib.Path(directory) / "model"
        dina.RewardModel.init(SMALL).save(checkpoint)
        with (pathlib.Path(directory) / "log").open("w") as log:
            server = start_server(checkpoint, values.port, shape, log)
            try:
                with RewardClient(ClientConfig(f"http://127.0.0.1:{values.port}")) as client:
                    client.wait_until_ready(120)
                    largest = client.info()["limits"]["max_body_bytes"]
                print(
                    f"jax {jax.__version__}, {os.cpu_count()} cores for server, attackers and the good client, "
                    f"{values.seconds:g} s an attack; a good request is one row of {shape}, {len(body) / 1e6:.2f} MB; "
                    f"the largest body {largest / 1e6:.1f} MB"
                )
                good_requests(values.port, body, 2.0)  # a warm-up
                base = report("undisturbed", values.port, *good_requests(values.port, body, values.seconds), server)
                for name in values.attacks:
                    ours, theirs = context.Pipe()
                    arguments = (name, values.port, values.seconds + 2, largest, theirs)
                    attacker = context.Process(target=attack, args=arguments, daemon=True)
                    attacker.start()
                    ours.recv()
                    time.sleep(1)
                    found = good_requests(values.port, body, values.seconds)
                    p99 = report(name, values.port, *found, server)
                    print(f"    p99 is {p99 / base:.2f} times the undisturbed; {ours.recv()} attacks ended", flush=True)
                    attacker.join()
                    time.sleep(1)
                report("undisturbed, after", values.port, *good_requests(values.port, body, values.seconds), server)
            finally:
                server.send_signal(signal.SIGTERM)
                print(f"server's exit status after SIGTERM: {server.wait(60)}; its log has {log.tell()} bytes")


def report(name: str, port: int, times: list[float], statuses: list[int], server) -> float:
    """Prints a line; the p99 in seconds."""
    p50, p99 = np.percentile(times, [50, 99])
    refused = len(statuses) - statuses.count(200)
    memory = psutil.Process(server.pid).memory_info().rss / 2**20
    print(
        f"{name:>20}: {len(times)} good requests, {refused} refused, p50 {1000 * p50:.1f} ms, p99 {1000 * p99:.1f} ms, "
        f"mean {1000 * statistics.fmean(times):.1f} ms; server {memory:.0f} MiB resident, "
        f"{metric(port, 'dinalrm_held_bytes') / 2**20:.0f} MiB of bodies",
        flush=True,
    )
    return float(p99)


if __name__ == "__main__":
    flags.DEFINE_list("attacks", list(ATTACKS), "Which of them.")
    flags.DEFINE_float("seconds", 10.0, "Of good requests, alone and beside each attack.", 1.0)
    flags.DEFINE_string("shape", "32x32x77", "Latent height and width and tokens of every good request.")
    flags.DEFINE_integer("port", 8766, "Port of the server.")
    app.run(main)
