"""The server over real sockets."""

import asyncio
import contextlib
import http.server
import importlib.util
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time

import httpx
import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save

from dinalrm_jax.client import AsyncRewardClient, ClientConfig, RewardClient, RewardServerError
from dinalrm_jax.noise import nearest_schedule_sigma
from dinalrm_jax.server import protocol
from dinalrm_jax.server.engine import Engine
from dinalrm_jax.server.protocol import RequestError
from tests.server.serving import HEADERS, OTHER_SHAPE, inputs, running, take
from tests.server.test_protocol import torch_request

SIGMA = float(nearest_schedule_sigma(0.4))


@pytest.fixture(scope="module")
def client(server):
    with RewardClient(ClientConfig(server.url, max_retries=0, rows_per_request=4)) as client:
        yield client


# --------------------------------------------------------------------------------- scores


def test_scores_are_the_models(server, client, tiny_model):
    latents, prompt = inputs(7)
    seeds = [0, 7, -5, 2**40, -(2**63), 2**63 - 1, 7]
    expected = tiny_model.score_latents(latents, prompt, SIGMA, seed=seeds)
    np.testing.assert_allclose(client.score_latents(latents, prompt, 0.4, seeds), expected, atol=1e-5)
    assert len(set(expected)) == 7
    levels = np.array([0.0, 0.1, 0.4, 0.7, 0.9, 1.0, 0.5])
    given = client.score_latents(latents, prompt, levels, 3)
    with pytest.raises(ValueError, match=r"single levels, not the ensemble \(0.2, 0.5\)"):
        client.score_latents(latents, prompt, (0.2, 0.5))
    for row, sigma in enumerate(np.asarray(nearest_schedule_sigma(levels))):
        one = tiny_model.score_latents(latents[row : row + 1], take(prompt, slice(row, row + 1)), float(sigma), seed=3)
        np.testing.assert_allclose(given[row], one[0], atol=1e-5)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_requests(client, tiny_model, dtype):
    latents, prompt = inputs(2, dtype=dtype)
    widened = jax.tree.map(lambda array: array.astype(np.float32), (latents, prompt))
    expected = tiny_model.score_latents(*widened, SIGMA, seed=1)
    np.testing.assert_allclose(client.score_latents(latents, prompt, seed=1), expected, atol=1e-5)


def test_a_request_of_pytorch(server, tiny_model):
    tensors = torch_request(2)
    answer = server.score(save(tensors))
    latents, prompt = inputs(2)
    expected = tiny_model.score_latents(latents, prompt, SIGMA, seed=[-5, -4])
    np.testing.assert_allclose(answer["raw_scores"], expected, atol=1e-5)
    assert answer["protocol_version"] == "1"
    assert answer["seeds_used"] == [-5, -4]
    assert answer["sigma"] == [0.400293, 0.400293]
    assert answer["timing_ms"].keys() == {"queue", "compute"}


def test_seeds_decide_and_nothing_else(server):
    body = save(torch_request())
    assert server.score(body)["raw_scores"] == server.score(body)["raw_scores"]
    unseeded = save(torch_request(seeds=None))
    first, second = server.score(unseeded), server.score(unseeded)
    assert first["raw_scores"] != second["raw_scores"]
    (seed,) = first["seeds_used"]
    again = server.score(save(torch_request(seeds=torch.tensor([seed]))))
    assert again["raw_scores"] == first["raw_scores"]


def test_seeds_that_nobody_gave_are_of_sixty_four_bits(server):
    before = server.metric("dinalrm_rows_total")
    seeds = [seed for _ in range(8) for seed in server.score(save(torch_request(4, seeds=None)))["seeds_used"]]
    assert len(set(seeds)) == 32
    assert max(seeds) > 2**55
    assert server.metric("dinalrm_rows_total") == before + 32
    assert server.metric("dinalrm_ready") == 1


def test_a_score_does_not_depend_on_its_batch(server, client):
    """Rows at every place of every bucket, beside other rows, against the row alone."""
    latents, prompt = inputs(4)
    alone = [client.score_latents(latents[i : i + 1], take(prompt, slice(i, i + 1)), seed=9)[0] for i in range(4)]
    for order in ([0, 1, 2], [3, 0], [2, 1, 0, 3]):
        together = client.score_latents(latents[order], take(prompt, order), seed=9)
        np.testing.assert_allclose(together, np.array(alone)[order], atol=1e-5)  # float32 across program sizes


# --------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"content-type": protocol.CONTENT_TYPE}, "protocol version '1' .*; the request does not say"),
        ({**HEADERS, protocol.VERSION_HEADER: "2"}, "protocol version '1' .*; the request says '2'"),
        ({**HEADERS, protocol.VERSION_HEADER: "1.0"}, "the request says '1.0'"),
        ({**HEADERS, "content-type": "application/json"}, "content-type must be application/octet-stream"),
        ({**HEADERS, "content-encoding": "gzip"}, "content-encoding 'gzip' is not taken"),
        ({**HEADERS, "content-encoding": "identity, gzip"}, "content-encoding 'identity, gzip' is not taken"),
    ],
)
def test_bad_headers(server, headers, message):
    status, answer = server.request("/v1/score", save(torch_request()), headers)
    assert (status, answer["error"]["code"], answer["protocol_version"]) == (400, "bad_protocol", "1")
    assert re.search(message, answer["error"]["message"])


def test_what_is_wrong_is_answered_and_leaves_the_server_well(server):
    good = save(torch_request())
    before = server.score(good)["raw_scores"]
    bad = torch_request(2)
    bad["latents"][1, 0, 0, 0] = float("nan")
    for body, status, code in (
        (b"", 400, "bad_request"),
        (good[:-7], 400, "bad_request"),
        (save(torch_request(u=torch.tensor([1.5]))), 400, "bad_request"),
        (save(torch_request(latents=torch.zeros(1, 16, 6, 6))), 400, "unknown_shape"),
        (save(bad), 422, "non_finite"),
    ):
        found, answer = server.request("/v1/score", body)
        assert (found, answer["error"]["code"]) == (status, code)
        assert answer["error"]["request_id"]
        assert len(answer["error"]["message"]) < 1000
    assert server.request("/v1/score")[0] == 405
    assert server.request("/v2/score", b"")[0] == 404
    named = server.request("/v1/score", b"", {**HEADERS, "x-request-id": "step-7"})
    assert named[1]["error"]["request_id"] == "step-7"
    assert server.request("/healthz")[0] == 200
    assert server.score(good)["raw_scores"] == before


def test_a_bad_request_among_good_ones(server, client):
    latents, prompt = inputs(9)
    expected = [client.score_latents(latents[i : i + 1], take(prompt, slice(i, i + 1)))[0] for i in range(9)]
    latents = latents.copy()
    latents[4, 0, 0, 0] = np.inf

    async def all_at_once():
        async with AsyncRewardClient(ClientConfig(server.url)) as many:
            one = lambda i: many.score_latents(latents[i : i + 1], take(prompt, slice(i, i + 1)))  # noqa: E731
            return await asyncio.gather(*map(one, range(9)), return_exceptions=True)

    results = asyncio.run(all_at_once())
    assert isinstance(results[4], RewardServerError)
    assert "HTTP 422: latents holds NaN or infinity" in str(results[4])
    good = [i for i in range(9) if i != 4]
    np.testing.assert_allclose([results[i][0] for i in good], np.array(expected)[good], atol=1e-5)


def test_large_and_slow_bodies(tiny_model):
    with running(tiny_model, warmup=("4x4x5",), max_batch_size=1, max_body_mb=1, deadline_s=1.0) as server:
        status, answer = server.request("/v1/score", bytes(2**20 + 1))
        assert (status, answer["error"]["code"]) == (413, "too_large")
        host, port = server.url.removeprefix("http://").split(":")
        head = "".join(f"{name}: {value}\r\n" for name, value in HEADERS.items())
        with socket.create_connection((host, int(port))) as chunked:
            chunked.sendall(f"POST /v1/score HTTP/1.1\r\nhost: x\r\n{head}transfer-encoding: chunked\r\n\r\n".encode())
            for _ in range(20):  # 2 MiB announced by nobody
                chunked.sendall(b"20000\r\n" + bytes(2**17) + b"\r\n")
                time.sleep(0.005)
            assert b" 413 " in chunked.recv(200)
        with socket.create_connection((host, int(port))) as slow:
            slow.sendall(f"POST /v1/score HTTP/1.1\r\nhost: x\r\n{head}content-length: 100\r\n\r\nabc".encode())
            assert b" 408 " in slow.recv(200)
        with socket.create_connection((host, int(port))) as trickling:
            trickling.settimeout(0.2)
            trickling.sendall(f"POST /v1/score HTTP/1.1\r\nhost: x\r\n{head}content-length: 100\r\n\r\n".encode())
            answer = b""
            for _ in range(15):  # a byte every fifth of a second, three times as long as the deadline
                trickling.sendall(b"x")
                with contextlib.suppress(TimeoutError):
                    answer = trickling.recv(200)
                    break
            assert b" 408 " in answer
        server.score(save(torch_request(latents=torch.zeros(1, 16, 4, 4))))


def test_deadline_drops_rows_and_a_stuck_device_is_unhealthy(tiny_model):
    with running(tiny_model, warmup=("8x12x5",), max_batch_size=1, deadline_s=0.5) as server:
        engine, stuck, started = server.server.batcher.engine, threading.Event(), []
        plain = engine.start

        def hang(rows):
            started.append([row.seed for row in rows])
            return lambda: (stuck.wait(20), plain(rows)())[1]

        engine.start = hang
        late = [threading.Thread(target=server.request, args=("/v1/score", save(torch_request())), daemon=True)]
        late += [threading.Thread(target=server.request, args=("/v1/score", save(torch_request())), daemon=True)]
        for thread in late:
            thread.start()
        while len(started) < 2:  # one on the device, one lined up behind it
            time.sleep(0.01)
        status, answer = server.request("/v1/score", save(torch_request(seeds=torch.tensor([77]))))
        assert (status, answer["error"]["code"]) == (504, "deadline")
        server.wait(status=503)
        engine.start = plain
        stuck.set()
        server.wait(status=200)
        server.score(save(torch_request()))
        assert [77] not in started


def test_api_key(tiny_model):
    latents, prompt = inputs(1, OTHER_SHAPE)
    with running(tiny_model, warmup=("4x4x5",), max_batch_size=1, api_key="s3cret") as server:
        body = save(torch_request(latents=torch.zeros(1, 16, 4, 4)))
        odd = b"Bearer \xff".decode("latin-1")
        for given in (odd, "s3cret", "Basic s3cret", "Bearers3cret", "Bearer", "Bearer s3cret2", "Bearer s3cre"):
            assert server.request("/v1/score", body, {**HEADERS, "authorization": given})[0] == 401
        for given in ("Bearer s3cret", "bearer s3cret", "BEARER  s3cret"):
            assert server.request("/v1/score", body, {**HEADERS, "authorization": given})[0] == 200
        assert httpx.post(f"{server.url}/v1/score", content=body).headers["www-authenticate"] == "Bearer"
        for key in (None, "wrong"):
            with (
                RewardClient(ClientConfig(server.url, key)) as client,
                pytest.raises(RewardServerError, match="HTTP 401: this server wants its API key"),
            ):
                client.score_latents(latents, prompt)
        with RewardClient(ClientConfig(server.url, "s3cret")) as client:
            assert np.isfinite(client.score_latents(latents, prompt)).all()


def test_two_servers_give_the_same_seeded_scores(server, tiny_model):
    latents, prompt = inputs(2, OTHER_SHAPE)
    with (
        running(tiny_model, warmup=("4x4x5",), max_batch_size=2) as other,
        RewardClient(ClientConfig(server.url)) as one,
        RewardClient(ClientConfig(other.url)) as two,
    ):
        scores = [client.score_latents(latents, prompt, seed=[1, 2]) for client in (one, two)]
        np.testing.assert_allclose(*scores, atol=1e-6)


def test_the_answer_says_whose_scores_these_are(server, tiny_model):
    for body, status in ((save(torch_request()), 200), (b"", 400)):
        answer = httpx.post(f"{server.url}/v1/score", content=body, headers=HEADERS)
        assert (answer.status_code, answer.headers["x-drm-weights"]) == (status, tiny_model.digest)
    assert server.request("/v1/info")[1]["weights"] == tiny_model.digest


def test_proxies_are_for_other_machines(server, client, monkeypatch):
    heard = []

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            heard.append(self.path)
            self.send_error(418)

        def log_message(self, *_):
            pass

    latents, prompt = inputs(1)
    expected = client.score_latents(latents, prompt)
    with http.server.HTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.server_port}")
        monkeypatch.delenv("no_proxy", raising=False)
        for url in (server.url, server.url.replace("127.0.0.1", "localhost")):
            with RewardClient(ClientConfig(url)) as here:
                np.testing.assert_array_equal(here.score_latents(latents, prompt), expected)
        assert heard == []
        with (
            RewardClient(ClientConfig("http://reward.example:8000")) as there,
            pytest.raises(RewardServerError, match="HTTP 418"),
        ):
            there.info()
        proxy.shutdown()
    assert heard == ["http://reward.example:8000/v1/info"]


# ------------------------------------------------------------------------------ life


def test_ready_means_compiled_and_tried(tiny_model, monkeypatch):
    may_compile, plain = threading.Event(), Engine.compile
    monkeypatch.setattr(Engine, "compile", lambda engine, shape: may_compile.wait(30) and plain(engine, shape))
    with running(tiny_model, ready=False, warmup=("4x4x5",), max_batch_size=2) as server:
        assert server.request("/livez") == (200, {"protocol_version": "1", "status": "loading"})
        answer = httpx.get(f"{server.url}/healthz")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "loading")
        assert answer.headers["retry-after"] == "1"
        assert server.request("/v1/score", save(torch_request()))[0] == 503
        may_compile.set()
        server.wait()
        body = save(torch_request(latents=torch.zeros(1, 16, 4, 4)))
        compiled = server.metric("dinalrm_xla_compilations")
        server.score(body)
        assert server.metric("dinalrm_xla_compilations") == compiled
        info = server.request("/v1/info")[1]
        assert (info["shapes"], info["max_batch_size"], info["dtype"]) == (["4x4x5"], 2, "float32")


def test_a_model_that_scores_nan_is_never_ready(tiny_model):
    broken = {**tiny_model.params, "head.head.weight": tiny_model.params["head.head.weight"] * np.nan}
    model = type(tiny_model)(tiny_model.config, broken, tiny_model.execution)
    with running(model, ready=False, warmup=("4x4x5",), max_batch_size=1) as server:
        for _ in range(600):
            if server.request("/livez")[1]["status"] != "loading":
                break
            time.sleep(0.05)
        status, answer = server.request("/healthz")
        assert (status, answer["error"]["code"]) == (503, "dead")


def test_out_of_memory_is_tried_in_halves(tiny_model):
    with running(tiny_model, warmup=("8x12x5",)) as server:
        engine = server.server.batcher.engine
        latents, prompt = inputs(4)
        with RewardClient(ClientConfig(server.url, max_retries=0, rows_per_request=4)) as client:
            expected = client.score_latents(latents, prompt)

            def exhausted(*_):
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

            for key in [key for key in engine._programs if key[0] == 4]:
                engine._programs[key] = exhausted
            np.testing.assert_allclose(client.score_latents(latents, prompt), expected, atol=1e-5)
            for key in [key for key in engine._programs if key[0] > 1]:
                engine._programs[key] = exhausted
            with pytest.raises(RewardServerError, match="HTTP 500: .*RESOURCE_EXHAUSTED"):
                client.score_latents(latents, prompt)
            np.testing.assert_allclose(
                client.score_latents(latents[:1], take(prompt, slice(1))), expected[:1], atol=1e-5
            )


def test_clients_that_leave_cost_nothing(server):
    body = save(torch_request())
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in HEADERS.items()) + "\r\n"
    for part in (head.encode(), head.encode() + body[:1000], head.encode() + body):
        for _ in range(20):
            with socket.create_connection((host, int(port))) as leaving:
                leaving.sendall(part)
    server.score(body)
    batcher, bodies = server.server.batcher, server.server._bodies
    for _ in range(100):
        if (batcher.waiting, batcher.reading, bodies.held) == (0, 0, 0):
            break
        time.sleep(0.05)
    assert (batcher.waiting, batcher.reading, bodies.held) == (0, 0, 0)


def test_many_at_once_of_mixed_shapes(server, tiny_model):
    """Four event loops, 252 requests (a recipe's step): every score right, nothing compiled."""
    kinds = [inputs(63), inputs(63, OTHER_SHAPE)]
    expected = [tiny_model.score_latents(*kind, SIGMA, seed=range(63)) for kind in kinds]
    compiled = server.metric("dinalrm_xla_compilations")
    found = {}

    def loop(number):
        latents, prompt = kinds[number % 2]

        async def run():
            async with AsyncRewardClient(ClientConfig(server.url, rows_per_request=1)) as client:
                found[number] = await client.score_latents(latents, prompt, seed=range(63))

        asyncio.run(run())

    threads = [threading.Thread(target=loop, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        np.testing.assert_allclose(found[number], expected[number % 2], atol=1e-5)
    assert server.metric("dinalrm_xla_compilations") == compiled


def test_unready_servers_are_retried_until_the_tries_are_used_up(server, monkeypatch):
    latents, prompt = inputs(1)
    refusals = iter(5 * [RequestError(503, "loading", "not yet")])

    def refuse():
        if (error := next(refusals, None)) is not None:
            raise error

    monkeypatch.setattr(server.server.batcher, "check_ready", refuse)
    with RewardClient(ClientConfig(server.url, max_retries=20, backoff=0.01)) as client:
        assert np.isfinite(client.score_latents(latents, prompt)).all()
    assert next(refusals, None) is None
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (
        RewardClient(ClientConfig(f"http://127.0.0.1:{port}", max_retries=2, backoff=0.01)) as client,
        pytest.raises(RewardServerError, match="after 3 tries; the last: .*refused"),
    ):
        client.score_latents(latents, prompt)


@pytest.mark.parametrize(
    "answer",
    [
        b'{"protocol_version": "1", "raw_scores": [null, 1.0]}',
        b'{"protocol_version": "1", "raw_scores": [NaN, 1.0]}',
        b'{"protocol_version": "1", "raw_scores": [1.0]}',
        b'{"protocol_version": 1, "raw_scores": [1.0, 2.0]}',
        b"{}",
        b"<html>a proxy's page</html>",
    ],
)
def test_answers_that_are_no_scores_are_never_rewards(answer):
    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    latents, prompt = inputs(2)
    with http.server.HTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        config = ClientConfig(f"http://127.0.0.1:{proxy.server_port}", max_retries=1, backoff=0.01)
        with RewardClient(config) as client, pytest.raises(RewardServerError, match="not that of a reward server"):
            client.score_latents(latents, prompt)
        proxy.shutdown()
    for url in ("127.0.0.1:8000", "http://127.0.0.1:8000/v1/score"):
        with pytest.raises(ValueError, match="url must be a server's, without a path"):
            ClientConfig(url)
    with RewardClient() as client, pytest.raises(ValueError, match="2 latents but 1 rows of prompt_embeds"):
        client.score_latents(latents, take(prompt, slice(1)))


# ---------------------------------------------------------------- the public verl-omni client


@pytest.fixture(scope="module")
def verl_omni():
    if "VERL_OMNI" not in os.environ:
        pytest.skip("VERL_OMNI is not set to a checkout of verl-project/verl-omni")
    return pathlib.Path(os.environ["VERL_OMNI"])


def test_verl_omni_client(server, tiny_model, verl_omni):
    path = verl_omni / "verl_omni/utils/reward_score/latent_http_scorer_client.py"
    spec = importlib.util.spec_from_file_location("latent_http_scorer_client", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    latents, prompt = inputs(1)
    expected = tiny_model.score_latents(latents, prompt, SIGMA, seed=-5)[0]
    image = torch.from_numpy(latents[0].transpose(2, 0, 1).copy())
    info = {
        "prompt_embeds": torch.from_numpy(prompt.prompt_embeds[0]),
        "pooled_prompt_embeds": torch.from_numpy(prompt.pooled_prompt_embeds[0]),
    }

    async def run(seed, noise_level=0.4):
        return await module.compute_score(image, "", info, f"{server.url}/v1/score", noise_level, seed, 0.1, 1.0)

    async def all_runs():
        results = [await run(-5), await run(None), await run(None), await run(0, 1.0)]
        await module.compute_score._session.close()
        return results

    seeded, first, second, _ = asyncio.run(all_runs())
    assert seeded["drm_raw_score"] == pytest.approx(expected, abs=1e-5)
    assert seeded["score"] == 0.1 * seeded["drm_raw_score"] + 1.0
    assert first != second


def test_verl_omnis_own_client_tests(verl_omni):
    tests = verl_omni / "tests/utils/reward_score/test_latent_http_scorer_client_on_cpu.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", str(tests)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=verl_omni)
    assert result.returncode == 0, result.stdout
