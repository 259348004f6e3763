"""The reward server's parser under mutated bodies: by itself, and behind a real socket.

    python -m benchmarks.fuzz [--bodies 1000000] [--sent 20000]
    python -m benchmarks.fuzz --mode images [--images 100000] [--files 3000]

Mutates a good request of a tiny model (bytes changed, removed, inserted; mostly in the header), parses
--bodies of them in this process and sends --sent to a running server. Anything but a request or a refusal
with 400 or 422 ends the program with an error; prints how many of each, the slowest, and the memory. The
second is of the images that are preprocessed: `benchmarks.fuzz_images`.
"""

import asyncio
import threading
import time
from collections import Counter

import httpx
import numpy as np
import psutil
from absl import app, flags, logging
from tqdm import tqdm

import dinalrm_jax as dina
from benchmarks import fuzz_images
from dinalrm_jax.model.backbone.sd3.config import SD3Config
from dinalrm_jax.model.config import LoRAConfig, RewardModelConfig
from dinalrm_jax.server import protocol
from dinalrm_jax.server.app import RewardServer
from dinalrm_jax.server.config import ServerConfig
from dinalrm_jax.server.protocol import Limits, RequestError

TINY = RewardModelConfig(
    SD3Config(num_layers=2, num_attention_heads=1, attention_head_dim=8, caption_projection_dim=8,
              joint_attention_dim=8, pooled_projection_dim=8, dual_attention_layers=(), pos_embed_max_size=8),
    num_blocks=1, visual_taps=(1,), text_taps=(1,), lora=LoRAConfig(2, 4.0),
)  # fmt: skip


def good_body(config: RewardModelConfig) -> bytes:
    """A request for one image of 4 x 4 latents and 5 tokens."""
    geometry, rng = config.transformer, np.random.default_rng(0)
    latents = rng.standard_normal((1, 4, 4, geometry.in_channels), np.float32)
    embeds = rng.standard_normal((1, 5, geometry.joint_attention_dim), np.float32)
    pooled = rng.standard_normal((1, geometry.pooled_projection_dim), np.float32)
    return protocol.serialize(latents, dina.PromptEmbeds(embeds, pooled), [0.4], [7])


def mutated(good: bytes, rng: np.random.Generator) -> bytes:
    """`good` with one to three changes, four in five of them in its header."""
    header, body = 8 + int.from_bytes(good[:8], "little"), bytearray(good)
    for _ in range(rng.integers(1, 4)):
        place = rng.integers(header if rng.random() < 0.8 else len(body))
        match rng.integers(3):
            case 0:
                body[place] = rng.integers(256)
            case 1:
                del body[place : place + rng.integers(1, 9)]
            case 2:
                body[place:place] = bytes(rng.integers(32, 127, rng.integers(1, 9), np.uint8))
    return bytes(body)


def parse_many(good: bytes, limits: Limits, count: int) -> None:
    rng, found, slowest = np.random.default_rng(0), Counter(), 0.0
    memory = psutil.Process().memory_info().rss
    for _ in tqdm(range(count), desc="parsing", unit="body", mininterval=1):
        body = mutated(good, rng)
        started = time.perf_counter()
        try:
            parsed = protocol.parse(body, limits)
            assert np.isfinite(parsed.latents).all()
            assert len(parsed.latents) == len(parsed.prompt.prompt_embeds) == len(parsed.u)
            found["taken"] += 1
        except RequestError as error:
            found[error.status] += 1
        slowest = max(slowest, time.perf_counter() - started)
    assert found.keys() <= {"taken", 400, 422}, found
    grown = (psutil.Process().memory_info().rss - memory) / 2**20
    print(f"parsed {count}: {dict(found)}; slowest {1000 * slowest:.1f} ms, memory grew by {grown:.1f} MiB")


def send_many(good: bytes, count: int) -> None:
    server = RewardServer(dina.RewardModel.init(TINY), ServerConfig(port=0, warmup=("4x4x5",)), "tiny")
    loop, stop, ports = asyncio.new_event_loop(), asyncio.Event(), []

    async def serve():
        async with server.listening() as port:
            ports.append(port)
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    headers = {"content-type": protocol.CONTENT_TYPE, protocol.VERSION_HEADER: protocol.VERSION}
    while server.batcher.state != "ready":
        time.sleep(0.1)
    rng, found = np.random.default_rng(1), Counter()
    with httpx.Client(base_url=f"http://127.0.0.1:{ports[0]}", headers=headers, timeout=30) as client:
        expected = client.post("/v1/score", content=good).json()["raw_scores"]
        memory = psutil.Process().memory_info().rss
        for _ in tqdm(range(count), desc="sending", unit="body", mininterval=1):
            status = client.post("/v1/score", content=mutated(good, rng)).status_code
            assert status in (200, 400, 422), status
            found[status] += 1
        grown = (psutil.Process().memory_info().rss - memory) / 2**20
        healthy = client.get("/healthz").status_code == 200
        same = client.post("/v1/score", content=good).json()["raw_scores"] == expected
    print(
        f"sent {count}: {dict(found)}; memory grew by {grown:.1f} MiB; healthy: {healthy}; same score as before: {same}"
    )
    loop.call_soon_threadsafe(stop.set)
    thread.join()


def main(_) -> None:
    logging.set_verbosity(logging.ERROR)
    values, good = flags.FLAGS, good_body(TINY)
    if values.mode == "images":
        fuzz_images.decode_many(values.images)
        fuzz_images.preprocess_many(values.files)
        return
    parse_many(good, Limits.of(TINY, max_rows=4), values.bodies)
    send_many(good, values.sent)


if __name__ == "__main__":
    flags.DEFINE_enum("mode", "bodies", ["bodies", "images"], "What is mutated.")
    flags.DEFINE_integer("bodies", 1_000_000, "Parsed in this process.")
    flags.DEFINE_integer("sent", 20_000, "Sent to a server.")
    flags.DEFINE_integer("images", 100_000, "Images decoded in processes of this program.")
    flags.DEFINE_integer("files", 3_000, "Images preprocessed as files.")
    app.run(main)
