"""The reward server's HTTP side."""

import asyncio
import contextlib
import dataclasses
import hmac
import json
import logging
import os
import secrets
import signal
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import jax
import numpy as np
from aiohttp import web

from dinalrm_jax import __version__
from dinalrm_jax.model.quantization import holds_int8
from dinalrm_jax.noise import schedule_sigmas
from dinalrm_jax.reward_model import RewardModel
from dinalrm_jax.server import protocol
from dinalrm_jax.server.batcher import DEAD, READY, Batcher
from dinalrm_jax.server.bodies import Bodies, Hold, is_small
from dinalrm_jax.server.config import MAX_ROWS, ServerConfig
from dinalrm_jax.server.connections import Connection, Connections, raise_open_files_limit
from dinalrm_jax.server.engine import Engine, Row
from dinalrm_jax.server.metrics import Metrics
from dinalrm_jax.server.protocol import Limits, RequestError, ScoreRequest, printable
from dinalrm_jax.server.shapes import MAX_NEW_SHAPES, warmup_shapes
from dinalrm_jax.weights.pretrained import PretrainedModel

log = logging.getLogger(__name__)
SIGMA_RULE = "u is moved to the nearest of FlowMatchEuler's 1000 sigmas, shift 3, as in the released code"
WEIGHTS_HEADER = "x-drm-weights"  # of every answer to a request for scores: the digest of what scores
DEVICE_FAILED = 70  # exit status, EX_SOFTWARE
RETRIES = (429, 503)  # what may be answered otherwise a moment later
RETRY_AFTER = "1"  # second


class RewardServer:
    """One model behind HTTP.

    Args:
        model: what scores; a checkpoint that is only open is read while programs are compiled.
        config: how.
        name: of the model, for /v1/info.
        api_key: what clients must send as `Authorization: Bearer KEY`; None: nothing.
    """

    def __init__(
        self, model: RewardModel | PretrainedModel, config: ServerConfig, name: str, api_key: str | None = None
    ):
        self.config, self._name, self._api_key = config, name, api_key
        rounded = isinstance(model, RewardModel) and holds_int8(model.params)
        self._model_dtype = "int8" if rounded else model.execution.dtype
        self._drained = True
        self._limits = Limits.of(model.config, min(MAX_ROWS, config.max_queue))
        shapes = warmup_shapes(config, model, self._limits)
        self.batcher = Batcher(
            Engine(model, config.max_batch_size),
            shapes,
            max_wait=config.max_wait_ms / 1000,
            max_queue=config.max_queue,
            max_new_shapes=MAX_NEW_SHAPES if config.allow_new_shapes else 0,
            observe=self._observe,
        )
        self._connections = Connections(config.max_connections)
        self._bodies = Bodies(*config.bytes_of_bodies(self._limits, shapes))
        self._metrics = Metrics(self.batcher, self._bodies, self._connections)
        self._parsers = ThreadPoolExecutor(4, "parse")
        self._sigmas = np.asarray(schedule_sigmas())
        self.app = web.Application(middlewares=[self._answer_errors])
        self.app.add_routes(
            [
                web.post("/v1/score", self._score),
                web.get("/v1/info", self._info),
                web.get("/healthz", self._healthz),
                web.get("/livez", self._livez),
                web.get("/metrics", self._prometheus),
            ]
        )

    # --------------------------------------------------------------------------------- life

    async def serve(self) -> None:
        """Serves until SIGTERM or SIGINT, then finishes what waits; ends the process where the device hangs."""
        raise_open_files_limit()
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        async with self.listening() as port:
            log.info("listening on http://%s:%d; compiling, /healthz says when ready", self.config.host, port)
            await self._until(stop)
        if not self._drained or self.batcher.compiling:
            # A thread that hangs on the device, or compiles, cannot be joined.
            _end(0 if self._drained else DEVICE_FAILED)

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[int]:
        """Listens while the context is open, and drains at its end; the port."""
        runner = web.AppRunner(self.app, handler_cancellation=True, shutdown_timeout=5)
        await runner.setup()
        try:
            async with self._connections.listening(runner, self.config.host, self.config.port) as port:
                self.batcher.start()
                yield port
                self.batcher.drain()
                self._drained = await asyncio.to_thread(self.batcher.join, self.config.drain_s)
                if self._drained:
                    log.info("stopped; every row that waited is answered")
                else:
                    log.error("stopped, but the device was not done after %g s", self.config.drain_s)
        finally:
            await runner.cleanup()
            self._parsers.shutdown(wait=False)

    async def _until(self, stop: asyncio.Event) -> None:
        """Waits for the signal; ends the process where the device is dead or hangs."""
        ready = False
        while not stop.is_set():
            if not ready and self.batcher.state == READY:
                ready = True
                log.info("ready for %s", ", ".join(map(str, self.batcher.engine.shapes)))
            hangs = self.batcher.busy > 2 * self.config.deadline_s
            if hangs or self.batcher.state == DEAD:
                log.critical("the device %s; ending this process", "hangs" if hangs else "failed")
                await asyncio.sleep(0.5)  # for the answers under way
                _end(DEVICE_FAILED)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), 0.2)

    # ----------------------------------------------------------------------------- handlers

    async def _score(self, request: web.Request) -> web.Response:
        started = time.monotonic()
        self._authorize(request)
        protocol.check_headers(request.headers)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.config.deadline_s
        hold = Hold(self._bodies)
        try:
            with self.batcher.announced(soon=is_small(request)):
                body = await self._bodies.read(request, hold, deadline)
                rows = self._rows(await loop.run_in_executor(self._parsers, protocol.parse, body, self._limits))
                futures = self.batcher.submit(rows)
        except BaseException:
            hold.release()
            raise
        hold.release_after(futures)
        try:
            async with asyncio.timeout_at(deadline):
                scored = await asyncio.gather(*map(asyncio.wrap_future, futures))
        except TimeoutError:
            raise RequestError(
                504, "deadline", f"no score within {self.config.deadline_s:g} s; the rows were dropped"
            ) from None
        self._metrics.rows.inc(len(rows))
        for row in scored:
            self._metrics.queued.observe(row.queued)
        self._metrics.seconds.observe(time.monotonic() - started)
        return _json(
            {
                "raw_scores": [row.score for row in scored],
                "seeds_used": [row.seed for row in rows],
                "sigma": [round(row.sigma, 6) for row in rows],
                "model": self._name,
                "batch_size": [row.batch_size for row in scored],
                "timing_ms": {
                    "queue": round(1000 * max(row.queued for row in scored), 3),
                    "compute": round(1000 * max(row.computed for row in scored), 3),
                },
            }
        )

    def _rows(self, parsed: ScoreRequest) -> list[Row]:
        sigmas = self._sigmas[np.argmin(np.abs(self._sigmas - parsed.u[:, None]), axis=1)]
        seeds = [secrets.randbits(63) for _ in sigmas] if parsed.seeds is None else parsed.seeds.tolist()
        return [
            Row(latents, embeds, pooled, float(sigma), seed)
            for latents, embeds, pooled, sigma, seed in zip(
                parsed.latents, parsed.prompt.prompt_embeds, parsed.prompt.pooled_prompt_embeds, sigmas, seeds
            )
        ]

    def _authorize(self, request: web.Request) -> None:
        if self._api_key is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(key.strip().encode("utf-8", "surrogateescape"), self._api_key.encode())
        if scheme.lower() != "bearer" or not right:
            raise RequestError(401, "unauthorized", "this server wants its API key: Authorization: Bearer KEY")

    async def _healthz(self, request: web.Request) -> web.Response:
        self.batcher.check_ready()
        if self.batcher.busy > self.config.deadline_s:
            raise RequestError(503, "stuck", f"a batch has been on the device for {self.batcher.busy:.0f} s")
        return _json({"status": "ready"})

    async def _livez(self, request: web.Request) -> web.Response:
        return _json({"status": self.batcher.state})

    async def _info(self, request: web.Request) -> web.Response:
        device = jax.devices()[0]
        return _json(
            {
                "model": self._name,
                "version": __version__,
                "jax": jax.__version__,
                "device": f"{device.platform} {device.device_kind}",
                "dtype": self._model_dtype,
                "weights": self.batcher.engine.digest,
                "state": self.batcher.state,
                "shapes": [str(shape) for shape in self.batcher.engine.shapes],
                "max_batch_size": self.config.max_batch_size,
                "limits": dataclasses.asdict(self._limits) | {"max_body_bytes": self._bodies.largest},
                "sigma_rule": SIGMA_RULE,
                "score": "raw; (raw + 10) / 10 is what the published model's users show",
            }
        )

    async def _prometheus(self, request: web.Request) -> web.Response:
        return web.Response(body=self._metrics.text(), headers={"content-type": "text/plain; version=0.0.4"})

    @web.middleware
    async def _answer_errors(self, request: web.Request, handler) -> web.StreamResponse:
        identity = printable(request.headers.get("x-request-id", "")[:64]) or uuid.uuid4().hex[:16]
        headers = {}
        connection = cast(Connection, request.protocol)
        with connection.at_work():
            try:
                response = await handler(request)
            except RequestError as error:
                status, code, message = error.status, error.code, str(error)
            except web.HTTPException as error:
                status, code, message = error.status, error.reason.lower().replace(" ", "_"), error.reason
                headers = {name: value for name, value in error.headers.items() if name == "Allow"}
            except Exception as error:
                log.exception("request %s failed", identity)
                message = printable(f"{type(error).__name__}: {error}"[: protocol.MAX_MESSAGE])
                status, code = 500, "internal"
            else:
                status = response.status
        if status != 200:
            response = _json({"error": {"code": code, "message": message, "request_id": identity}}, status, headers)
            if status in RETRIES:
                response.headers["retry-after"] = RETRY_AFTER
            if status == 401:
                response.headers["www-authenticate"] = "Bearer"
            if not request.content.is_eof():
                response.force_close()  # what is left of the body is no request
                connection.refuse(request.content_length or 0)
        if request.path == "/v1/score":
            self._metrics.requests.labels(status).inc()
            if self.batcher.engine.digest is not None:
                response.headers[WEIGHTS_HEADER] = self.batcher.engine.digest
            extra = {"request_id": identity, "status": status, "peer": request.remote}
            if status == 200:
                log.debug("scored", extra=extra)
            else:
                self._metrics.errors.labels(code).inc()
                if self._connections.throttle.admits(code):
                    log.warning("%d %s: %s", status, code, message, extra=extra)
        return response

    def _observe(self, size: int, seconds: float) -> None:
        self._metrics.batch_size.observe(size)
        self._metrics.computed.observe(seconds)


def _json(values: dict, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    text = json.dumps({"protocol_version": protocol.VERSION, **values}, allow_nan=False)
    return web.Response(text=text, status=status, content_type="application/json", headers=headers)


def _end(status: int) -> None:
    """Ends the process whatever its threads do."""
    logging.shutdown()
    os._exit(status)
