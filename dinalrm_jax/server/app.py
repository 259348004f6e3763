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

import jax
import numpy as np
from aiohttp import web

from dinalrm_jax.config import ConfigError
from dinalrm_jax.noise import schedule_sigmas
from dinalrm_jax.reward_model import RewardModel
from dinalrm_jax.server import protocol
from dinalrm_jax.server.batcher import DEAD, READY, Batcher
from dinalrm_jax.server.engine import Engine, Row
from dinalrm_jax.server.metrics import Metrics
from dinalrm_jax.server.protocol import Limits, RequestError, RowShape, ScoreRequest
from dinalrm_jax.version import __version__
from dinalrm_jax.weights.pretrained import PretrainedModel

log = logging.getLogger(__name__)
SIGMA_RULE = "u is moved to the nearest of FlowMatchEuler's 1000 sigmas, shift 3, as in the released code"
MAX_ROWS = 64  # of one request; they are batched like those of many
DEVICE_FAILED = 70  # exit status, EX_SOFTWARE


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """How a server runs.

    max_batch_size: rows in one program.
    max_wait_ms: how long the first row of a batch waits for others while the device is free.
    max_queue: rows that may wait; a request beyond is answered with 429.
    max_body_mb: MiB of one request.
    warmup: shapes compiled at start, LATENT_HEIGHTxLATENT_WIDTHxTOKENS; none: 512 pixels of the recipe, or
        as large as the model goes.
    deadline_s: seconds from a request's first byte to its answer, else 408 (upload) or 504.
    drain_s: seconds that waiting rows have at SIGTERM.
    allow_new_shapes: compile shapes that come; else they are refused.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    max_batch_size: int = 8
    max_wait_ms: float = 10.0
    max_queue: int = 512
    max_body_mb: int = 64
    warmup: tuple[str, ...] = ()
    deadline_s: float = 100.0
    drain_s: float = 30.0
    allow_new_shapes: bool = False


def default_shapes(model: RewardModel | PretrainedModel) -> list[RowShape]:
    """What is compiled where nothing is said: 512 x 512 pixels, and 77 CLIP and 256 T5 tokens as the recipe has."""
    geometry, encoders = model.config.transformer, model.config.encoders
    side = min(64, geometry.pos_embed_max_size * geometry.patch_size)
    tokens = encoders.text_length if encoders.kind == "tiny" else 77 + 256
    return [RowShape(side, side, tokens)]


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
        self._model_dtype = model.execution.dtype
        self._drained = True
        shapes = [RowShape.parse(text) for text in config.warmup] or default_shapes(model)
        self._limits = Limits.of(model.config, min(MAX_ROWS, config.max_queue))
        for shape in shapes:
            if problems := self._limits.problems(*dataclasses.astuple(shape)):
                raise ConfigError(f"--warmup {shape}: {'; '.join(problems)}")
        self.batcher = Batcher(
            Engine(model, config.max_batch_size),
            shapes,
            max_wait=config.max_wait_ms / 1000,
            max_queue=config.max_queue,
            allow_new_shapes=config.allow_new_shapes,
            observe=self._observe,
        )
        self._metrics = Metrics(self.batcher)
        self._parsers = ThreadPoolExecutor(4, "parse")
        self._sigmas = np.asarray(schedule_sigmas())
        self.app = web.Application(client_max_size=config.max_body_mb * 2**20, middlewares=[self._answer_errors])
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
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        async with self.listening() as port:
            log.info("listening on http://%s:%d; compiling, /healthz says when ready", self.config.host, port)
            await self._until(stop)
        if not self._drained:
            os._exit(DEVICE_FAILED)  # a thread that hangs on the device cannot be joined

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[int]:
        """Listens while the context is open, and drains at its end; the port."""
        runner = web.AppRunner(self.app, handler_cancellation=True, access_log=None, shutdown_timeout=5)
        await runner.setup()
        site = web.TCPSite(runner, self.config.host, self.config.port, backlog=1024)
        try:
            try:
                await site.start()
            except OSError as error:
                raise OSError(f"cannot listen on {self.config.host}:{self.config.port}: {error}") from error
            self.batcher.start()
            yield runner.addresses[0][1]
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
                os._exit(DEVICE_FAILED)  # a hanging thread cannot be joined
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), 0.2)

    # ----------------------------------------------------------------------------- handlers

    async def _score(self, request: web.Request) -> web.Response:
        started = time.monotonic()
        self._authorize(request)
        protocol.check_headers(request.headers)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.config.deadline_s
        with self.batcher.announced():
            body = await self._read(request, deadline)
            rows = self._rows(await loop.run_in_executor(self._parsers, protocol.parse, body, self._limits))
            futures = self.batcher.submit(rows)
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

    async def _read(self, request: web.Request, deadline: float) -> bytes:
        """The body, if it is not too large and comes in time."""
        limit = self.config.max_body_mb
        if (request.content_length or 0) > limit * 2**20:
            raise RequestError(413, "too_large", f"the body has {request.content_length} bytes, {limit} MiB are taken")
        try:
            async with asyncio.timeout_at(deadline):
                return await request.read()
        except TimeoutError:
            raise RequestError(
                408, "slow_upload", f"the body did not arrive within {self.config.deadline_s:g} s"
            ) from None
        except web.RequestPayloadError as error:
            raise RequestError(400, "bad_request", f"the body cannot be read: {error}") from None
        except web.HTTPRequestEntityTooLarge:
            raise RequestError(
                413, "too_large", f"the body is larger than {limit} MiB, which is what is taken"
            ) from None

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
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), self._api_key.encode()):
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
                "state": self.batcher.state,
                "shapes": [str(shape) for shape in self.batcher.engine.shapes],
                "max_batch_size": self.config.max_batch_size,
                "limits": dataclasses.asdict(self._limits),
                "sigma_rule": SIGMA_RULE,
                "score": "raw; (raw + 10) / 10 is what the published model's users show",
            }
        )

    async def _prometheus(self, request: web.Request) -> web.Response:
        return web.Response(body=self._metrics.text(), headers={"content-type": "text/plain; version=0.0.4"})

    @web.middleware
    async def _answer_errors(self, request: web.Request, handler) -> web.StreamResponse:
        identity = request.headers.get("x-request-id", "")[:64] or uuid.uuid4().hex[:16]
        headers = {}
        try:
            response = await handler(request)
        except RequestError as error:
            status, code, message = error.status, error.code, str(error)
        except web.HTTPException as error:
            status, code, message = error.status, error.reason.lower().replace(" ", "_"), error.reason
            headers = {name: value for name, value in error.headers.items() if name == "Allow"}
        except Exception as error:
            log.exception("request %s failed", identity)
            status, code, message = 500, "internal", f"{type(error).__name__}: {error}"[: protocol.MAX_MESSAGE]
        else:
            status = response.status
        if request.path == "/v1/score":
            self._metrics.requests.labels(status).inc()
            extra = {"request_id": identity, "status": status, "peer": request.remote}
            if status == 200:
                log.debug("scored", extra=extra)
            else:
                log.warning("%d %s: %s", status, code, message, extra=extra)
        if status == 200:
            return response
        return _json({"error": {"code": code, "message": message, "request_id": identity}}, status, headers)

    def _observe(self, size: int, seconds: float) -> None:
        self._metrics.batch_size.observe(size)
        self._metrics.computed.observe(seconds)


def _json(values: dict, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    text = json.dumps({"protocol_version": protocol.VERSION, **values}, allow_nan=False)
    return web.Response(text=text, status=status, content_type="application/json", headers=headers)
