"""What anybody who can connect may try: each attack is refused, bounded and forgotten, and good requests go on."""

import errno
import gzip
import socket
import threading
import time

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import save

from dinalrm_jax.server import bodies, connections, protocol
from dinalrm_jax.server.config import ServerConfig
from dinalrm_jax.server.connections import Connections, Throttle
from dinalrm_jax.server.protocol import Limits, RowShape
from tests.conftest import TINY
from tests.server.serving import HEADERS, OTHER_SHAPE, inputs, running
from tests.server.test_protocol import torch_request

SMALL = {"warmup": ("4x4x5",), "max_batch_size": 1}


def good_body() -> bytes:
    return save(torch_request(latents=torch.zeros(1, 16, 4, 4)))


def connect(server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def head(*extra: str) -> bytes:
    lines = ["POST /v1/score HTTP/1.1", "host: x", *(f"{name}: {value}" for name, value in HEADERS.items()), *extra]
    return "\r\n".join([*lines, "", ""]).encode()


def answer(connection: socket.socket) -> httpx.Response:
    """The answer, to the end of the connection or of what the peer announces."""
    data = b""
    while b"\r\n\r\n" not in data and (part := connection.recv(4096)):
        data += part
    lines, _, body = data.partition(b"\r\n\r\n")
    status, *fields = lines.decode().split("\r\n")
    found = httpx.Headers([field.split(": ", 1) for field in fields])
    while len(body) < int(found["content-length"]) and (part := connection.recv(4096)):
        body += part
    return httpx.Response(int(status.split()[1]), headers=found, content=body)


def is_closed(connection: socket.socket, within: float) -> bool:
    connection.settimeout(within)
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True
    except TimeoutError:
        return False


def until(condition):
    for _ in range(400):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("did not happen within 4 s")


# ---------------------------------------------------------------------------------- compression


@pytest.mark.parametrize(
    "encoding",
    [
        ["content-encoding: gzip"],
        ["content-encoding: identity, gzip"],
        ["content-encoding: identity", "content-encoding: gzip"],
        ["content-encoding: gzip, identity"],
        ["content-encoding: deflate"],
    ],
)
def test_nothing_is_inflated(server, encoding, monkeypatch):
    inflated = []
    monkeypatch.setattr(
        "aiohttp.compression_utils.ZLibDecompressor.decompress_sync", lambda *_, **__: inflated.append(1) or b""
    )
    bomb = gzip.compress(bytes(2**24))
    with connect(server) as client:
        client.sendall(head(*encoding, f"content-length: {len(bomb)}") + bomb)
        found = answer(client)
    assert (found.status_code, found.json()["error"]["code"]) == (400, "bad_protocol")
    assert inflated == []


@pytest.mark.parametrize("name", ["x-drm-protocol-version: 1", "content-type: application/octet-stream"])
def test_headers_that_stand_twice_are_refused(server, name):
    body = save(torch_request())
    with connect(server) as client:
        client.sendall(head(name, f"content-length: {len(body)}") + body)
        found = answer(client)
    assert found.status_code == 400


# ----------------------------------------------------------------------------------- connections


def test_a_head_must_come_in_time(tiny_model, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 1.0)
    with running(tiny_model, **SMALL) as server:
        with connect(server) as silent, connect(server) as slow:
            before = time.monotonic()
            for byte in b"POST /v1":  # more bytes do not buy more time
                slow.sendall(bytes([byte]))
                time.sleep(0.1)
            assert is_closed(silent, 3)
            assert is_closed(slow, 3)
            assert time.monotonic() - before < 1.6
        body = good_body()
        with connect(server) as used:
            for _ in range(2):
                used.sendall(head(f"content-length: {len(body)}") + body)
                assert answer(used).status_code == 200
            assert not is_closed(used, 1.3)  # idle is not slow
            used.sendall(b"POST")
            assert is_closed(used, 3)
        with connect(server) as uploading:  # a body has more time
            uploading.sendall(head(f"content-length: {len(body)}") + body[:100])
            time.sleep(1.3)
            uploading.sendall(body[100:])
            assert answer(uploading).status_code == 200


def test_connections_are_bounded_and_those_that_wait_make_room(tiny_model):
    with running(tiny_model, **SMALL, max_connections=4) as server:
        everyone, body = server.server._connections, good_body()
        with connect(server) as faithful:
            faithful.sendall(head(f"content-length: {len(body)}") + body)
            assert answer(faithful).status_code == 200
            half_open = []
            for _ in range(30):
                half_open.append(connect(server))
                half_open[-1].sendall(b"POST /v1/score HTTP/1.1\r\nx-slow: ")
                time.sleep(0.005)
                assert len(everyone.open) <= 4
            assert is_closed(half_open[0], 2)
            assert not is_closed(half_open[-1], 0.05)
            assert server.request("/healthz")[0] == 200
            faithful.sendall(head(f"content-length: {len(body)}") + body)  # it had sent whole requests
            assert answer(faithful).status_code == 200
            for connection in half_open:
                connection.close()
        uploads = [connect(server) for _ in range(4)]
        for upload in uploads:
            upload.sendall(head(f"content-length: {len(body)}") + body[:-1])
        until(lambda: server.server.batcher.reading == 4)
        with connect(server) as fifth:
            found = answer(fifth)
        assert (found.status_code, found.json()["error"]["code"]) == (503, "too_many_connections")
        assert found.headers["retry-after"] == "1"
        for upload in uploads:
            upload.sendall(body[-1:])
            assert answer(upload).status_code == 200
            upload.close()


def test_what_anybody_can_cause_is_logged_a_few_times_a_second(caplog):
    """asyncio reports a hundred failed accepts a second where files have run out."""
    everyone, told = Connections(1), []

    class Loop:
        def default_exception_handler(self, context):
            told.append(context)

    for _ in range(1000):
        everyone._on_loop_error(Loop(), {"exception": OSError(errno.EMFILE, "Too many open files")})
    assert told == []
    lines = [line for line in caplog.messages if "no connection can be accepted: [Errno 24]" in line]
    assert len(lines) == 5
    everyone._on_loop_error(Loop(), {"message": "something else", "exception": ValueError()})
    everyone._on_loop_error(Loop(), {"message": "something else"})
    assert len(told) == 2


def test_a_throttle_says_what_it_left_out(caplog, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(connections.time, "monotonic", lambda: now[0])
    throttle = Throttle(lines=2)
    assert [throttle.admits("a") for _ in range(5)] == [True, True, False, False, False]
    assert throttle.admits("b")
    now[0] = 101.5
    assert throttle.admits("a")
    assert caplog.messages == ["a: 3 more like these"]


def test_bytes_that_are_no_http_are_logged_a_few_times(server, caplog):
    for _ in range(60):
        with connect(server) as client:
            client.sendall(b"POST /v1/score HTTP/1.1\r\nbad header\r\n\r\n")
            assert answer(client).status_code == 400
    assert len([record for record in caplog.records if record.name == "aiohttp.server"]) <= 15
    assert server.request("/healthz")[0] == 200


def test_names_of_clients_are_one_line_of_a_log(server, caplog):
    name = "lat\nents\x1b[31m\u202e"
    tensors = torch_request() | {name: torch.zeros(1)}
    strange = {**HEADERS, "x-request-id": b"id\x85\xa0".decode("latin-1")}
    status, found = server.request("/v1/score", save(tensors), strange)
    assert status == 400
    for header in (b'{"a\\nb": 1, "a\\nb": 2}', b'{"latents": {"dtype": "F\\n\\u001b[31m", "shape": []}}'):
        assert server.request("/v1/score", len(header).to_bytes(8, "little") + header)[0] == 400
    assert found["error"]["request_id"] == r"id\udc85\udca0"
    records = [record for record in caplog.records if record.name == "dinalrm_jax.server.app"]
    assert len(records) == 3
    assert all(record.getMessage().isprintable() for record in records)
    assert "stands twice in the header" in records[1].getMessage()


# ----------------------------------------------------------------------------------------- bodies


def test_bodies_are_bounded_in_bytes(tiny_model):
    """Of what is free one body may have half, before it is read; so large ones do not lock out the small."""
    with running(tiny_model, **SMALL, max_body_mb=1, max_held_mb=2) as server:
        held = server.server._bodies
        with connect(server) as first, connect(server) as second, connect(server) as chunked:
            first.sendall(head("content-length: 1000000") + bytes(10))
            until(lambda: held.held == 1_000_000)
            assert server.metric("dinalrm_held_bytes") == 1_000_000
            assert server.metric("dinalrm_requests_reading") == 1
            second.sendall(head("content-length: 600000"))
            found = answer(second)
            assert (found.status_code, found.json()["error"]["code"]) == (429, "memory_full")
            assert found.headers["retry-after"] == "1"
            server.score(good_body())
            chunked.sendall(head("transfer-encoding: chunked"))
            for _ in range(5):
                chunked.sendall(b"20000\r\n" + bytes(2**17) + b"\r\n")
            until(lambda: held.held == 1_000_000 + 5 * 2**17)
        until(lambda: held.held == 0)
        with connect(server) as chunked:
            chunked.sendall(head("transfer-encoding: chunked"))
            for _ in range(9):
                chunked.sendall(b"20000\r\n" + bytes(2**17) + b"\r\n")
            assert answer(chunked).status_code == 413
        until(lambda: held.held == 0)
        assert server.metric('dinalrm_errors_total{code="memory_full"}') == 1
        assert server.metric('dinalrm_errors_total{code="too_large"}') == 1


@pytest.mark.parametrize(("announced", "read"), [(2**23, True), (2**23 + 1, False)])
def test_of_refused_bodies_the_small_are_read_and_the_large_cut(server, announced, read):
    """So that who sends a row or some sees the answer when it is all sent, and a flood costs nothing."""
    with connect(server) as client:
        client.sendall(head(f"content-length: {announced}"))
        found = answer(client)
        assert (found.status_code, found.json()["error"]["code"]) == (413, "too_large")
        assert found.headers["connection"] == "close"
        sent = 0
        try:
            for _ in range(announced // 2**16):
                sent += client.send(bytes(2**16))
        except ConnectionError:
            pass
        assert (sent >= 2**23) == read


def test_chunks_beyond_what_is_free_are_refused(tiny_model):
    with running(tiny_model, **SMALL, max_body_mb=1, max_held_mb=2) as server:
        with connect(server) as first, connect(server) as second, connect(server) as chunked:
            first.sendall(head("content-length: 1000000"))
            second.sendall(head("content-length: 500000"))
            until(lambda: server.server._bodies.held == 1_500_000)
            chunked.sendall(head("transfer-encoding: chunked"))
            for _ in range(6):
                chunked.sendall(b"20000\r\n" + bytes(2**17) + b"\r\n")
            assert answer(chunked).status_code == 429
        until(lambda: server.server._bodies.held == 0)


def test_bytes_are_held_until_the_rows_are_scored(tiny_model):
    with running(tiny_model, **SMALL) as server:
        engine, held, body = server.server.batcher.engine, server.server._bodies, good_body()
        plain, may_end = engine.start, threading.Event()
        engine.start = lambda rows: lambda: may_end.wait(10) and plain(rows)()
        with connect(server) as leaving, connect(server) as staying:
            leaving.sendall(head(f"content-length: {len(body)}") + body)
            until(lambda: server.server.batcher.busy)
            staying.sendall(head(f"content-length: {len(body)}") + body)
            until(lambda: held.held == 2 * len(body))
            leaving.close()
            time.sleep(0.1)
            assert held.held == 2 * len(body)  # it is on the device
            may_end.set()
            assert answer(staying).status_code == 200
        until(lambda: held.held == 0)


def test_slow_bodies_do_not_hold_bytes_for_long(tiny_model, monkeypatch):
    monkeypatch.setattr(bodies, "PATIENCE", 0.3)
    with running(tiny_model, **SMALL) as server, connect(server) as slow, connect(server) as steady:
        body = good_body()
        slow.sendall(head(f"content-length: {len(body)}") + body[:10])
        found = answer(slow)
        assert (found.status_code, found.json()["error"]["code"]) == (408, "slow_upload")
        monkeypatch.setattr(bodies, "SLOWEST", 1000)
        steady.sendall(head(f"content-length: {len(body)}") + body[:-10])  # enough for seconds
        time.sleep(0.6)
        steady.sendall(body[-10:])
        assert answer(steady).status_code == 200


def test_how_large_a_body_may_be():
    limits, shapes = Limits.of(TINY, 64), [RowShape(4, 4, 5), RowShape(8, 12, 5)]
    body = len(save(torch_request(64)))
    largest, held = ServerConfig(max_queue=512).bytes_of_bodies(limits, shapes)
    assert body <= largest <= body + 2**14
    row = (largest - 2**14 - 8) // 64
    assert held == 512 * row
    assert ServerConfig(max_queue=16).bytes_of_bodies(limits, shapes)[1] == 2 * largest
    assert ServerConfig(max_body_mb=3, max_held_mb=5).bytes_of_bodies(limits, shapes) == (3 * 2**20, 5 * 2**20)
    anything = ServerConfig(allow_new_shapes=True).bytes_of_bodies(limits, shapes)[0]
    assert anything >= len(save(torch_request(64, latents=torch.zeros(64, 16, 24, 24)))) + 64 * 4 * 24 * 1019


# ------------------------------------------------------------------------------------------ batches


def test_a_rare_shape_waits_for_two_batches_at_most(tiny_model):
    """While requests of another shape keep the device busy with full batches."""
    seconds, max_wait = 0.25, 0.02
    with running(tiny_model, max_batch_size=2, max_wait_ms=1000 * max_wait, deadline_s=3.0) as server:
        engine, stop = server.server.batcher.engine, threading.Event()
        plain, full = engine.start, save(torch_request())

        def slow(rows):
            finish = plain(rows)
            return lambda: (time.sleep(seconds), finish())[1]

        engine.start = slow

        def flood():
            with httpx.Client(trust_env=False) as client:
                while not stop.is_set():
                    assert client.post(f"{server.url}/v1/score", content=full, headers=HEADERS).status_code == 200

        threads = [threading.Thread(target=flood) for _ in range(8)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        latents, prompt = inputs(1, OTHER_SHAPE)
        waits, statuses = [], []
        body = protocol.serialize(latents, prompt, np.array([0.4]), None)
        for _ in range(2):
            before = time.monotonic()
            statuses.append(server.request("/v1/score", body)[0])
            waits.append(time.monotonic() - before)
        stop.set()
        for thread in threads:
            thread.join()
    assert statuses == [200, 200]
    assert max(waits) < max_wait + 3 * seconds + 0.22, waits  # two batches, and its own
