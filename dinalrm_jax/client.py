"""Clients of the reward server, for threads and for asyncio.

    python -m dinalrm_jax.client [--url http://127.0.0.1:8000]

says whether a server is ready, and times a score.
"""

from dinalrm_jax.cli.command import answer_help, run_command
from dinalrm_jax.cli.options import ClientOptions

answer_help(__name__, __doc__, ClientOptions)  # before the imports that take a second

import asyncio
import dataclasses
import ipaddress
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import numpy as np

from dinalrm_jax.model.batch import PromptEmbeds
from dinalrm_jax.server import protocol
from dinalrm_jax.server.config import URL
from dinalrm_jax.server.protocol import RowShape, read_api_key

RETRIED = (408, 429, 500, 502, 503, 504)
LONGEST_PAUSE = 10.0  # seconds between two tries


class RewardServerError(RuntimeError):
    """No score: the server's refusal, or the failure of the last try."""


@dataclasses.dataclass(frozen=True)
class ClientConfig:
    """Where the server is and how long to try. Proxies of the environment are used, but not to this machine.

    url: of the server, without a path.
    api_key: sent as `Authorization: Bearer KEY`.
    timeout: seconds that one try may be without progress.
    max_retries: tries after the first: without a connection or a proper answer, and on 408, 429, 500, 502, 503
        and 504. A refused request (400, 401, 413, 422) is not tried again.
    backoff: seconds before the second try, doubled for every further one up to 10, and varied at random.
    rows_per_request: larger batches go in several requests.
    """

    url: str = URL
    api_key: str | None = None
    timeout: float = 120.0
    max_retries: int = 8
    backoff: float = 0.5
    rows_per_request: int = 8

    def __post_init__(self):
        url = httpx.URL(self.url)
        if url.scheme not in ("http", "https") or not url.host or url.path not in ("", "/"):
            raise ValueError(
                f"url must be a server's, without a path, for instance http://127.0.0.1:8000; got {self.url!r}"
            )

    @property
    def headers(self) -> dict[str, str]:
        headers = {"content-type": protocol.CONTENT_TYPE, protocol.VERSION_HEADER: protocol.VERSION}
        return headers | ({"authorization": f"Bearer {self.api_key}"} if self.api_key else {})

    @property
    def http(self) -> dict[str, Any]:
        """What httpx's clients are made with."""
        host = httpx.URL(self.url).host
        try:
            local = ipaddress.ip_address(host).is_loopback
        except ValueError:
            local = host == "localhost"
        return {"base_url": self.url, "headers": self.headers, "timeout": self.timeout, "trust_env": not local}

    def pauses(self) -> Iterator[float]:
        """Seconds to wait before each further try."""
        for attempt in range(self.max_retries):
            yield min(LONGEST_PAUSE, self.backoff * 2**attempt) * random.uniform(0.75, 1.25)


class RewardClient:
    """Scores latents on a reward server. Use it as a context manager, from any number of threads."""

    def __init__(self, config: ClientConfig = ClientConfig()):
        self._config = config
        self._http = httpx.Client(**config.http)

    def score_latents(
        self,
        latents: np.ndarray,
        prompt: PromptEmbeds,
        sigma: float | np.ndarray = 0.4,
        seed: int | Sequence[int] | None = 0,
    ) -> np.ndarray:
        """Raw scores at single noise levels; the server has no ensemble.

        Args:
            latents: (B, H/8, W/8, 16), channels last, clean and scaled.
            prompt: B prompts; they and the latents travel in the dtype they have (float32, float16, bfloat16).
            sigma: one level, or an array (B,) of one a row; the server moves it to the nearest of its schedule.
            seed: of the noise; one for all rows or one a row; None: new noise.

        Returns:
            (B,) float32.

        Raises:
            ValueError: numbers of rows that differ, or a tuple of levels.
            RewardServerError: the request was refused, or every try failed.
        """
        return _join(self._send(*body) for body in _bodies(self._config, latents, prompt, sigma, seed))

    def info(self) -> dict:
        """What the server says about itself; raises RewardServerError without an answer."""
        try:
            return _answer(self._http.get("/v1/info"))
        except httpx.HTTPError as error:
            raise RewardServerError(f"{self._config.url} does not answer: {error}") from error

    def wait_until_ready(self, seconds: float = 600.0) -> None:
        """Returns once the server scores; raises RewardServerError if it does not in time."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                _answer(self._http.get("/healthz", timeout=5.0))
                return
            except (httpx.HTTPError, RewardServerError) as error:
                if time.monotonic() > deadline:
                    raise RewardServerError(f"{self._config.url} is not ready after {seconds:g} s: {error}") from error
            time.sleep(0.2)

    def _send(self, body: bytes, rows: int) -> list[float]:
        pauses = self._config.pauses()
        while True:
            try:
                return _scores(self._http.post("/v1/score", content=body), rows)
            except (httpx.HTTPError, _Retry) as error:
                time.sleep(_next_pause(pauses, error, self._config))

    def __enter__(self) -> "RewardClient":
        return self

    def __exit__(self, *exception) -> None:
        self._http.close()


class AsyncRewardClient:
    """`RewardClient.score_latents` for asyncio; the requests of a batch go at once."""

    def __init__(self, config: ClientConfig = ClientConfig()):
        self._config = config
        self._http = httpx.AsyncClient(**config.http)

    async def score_latents(
        self,
        latents: np.ndarray,
        prompt: PromptEmbeds,
        sigma: float | np.ndarray = 0.4,
        seed: int | Sequence[int] | None = 0,
    ) -> np.ndarray:
        """See `RewardClient.score_latents`."""
        bodies = _bodies(self._config, latents, prompt, sigma, seed)
        failed: Exception | None = None
        try:
            async with asyncio.TaskGroup() as group:  # one that fails for good ends the others
                tasks = [group.create_task(self._send(*body)) for body in bodies]
        except* RewardServerError as errors:
            failed = errors.exceptions[0]
        if failed is not None:  # raised in there, Python 3.11.2 wraps it once more
            raise failed
        return _join(task.result() for task in tasks)

    async def _send(self, body: bytes, rows: int) -> list[float]:
        pauses = self._config.pauses()
        while True:
            try:
                return _scores(await self._http.post("/v1/score", content=body), rows)
            except (httpx.HTTPError, _Retry) as error:
                await asyncio.sleep(_next_pause(pauses, error, self._config))

    async def __aenter__(self) -> "AsyncRewardClient":
        return self

    async def __aexit__(self, *exception) -> None:
        await self._http.aclose()


class _Retry(Exception):
    """An answer after which the same request may do better."""


def _bodies(config: ClientConfig, latents, prompt: PromptEmbeds, sigma, seed) -> list[tuple[bytes, int]]:
    """Bodies, and how many rows each has."""
    rows = len(latents)
    found = (len(prompt.prompt_embeds), len(prompt.pooled_prompt_embeds))
    if found != (rows, rows):
        raise ValueError(f"{rows} latents but {found[0]} rows of prompt_embeds and {found[1]} of pooled_prompt_embeds")
    if isinstance(sigma, (tuple, list)):
        raise ValueError(
            f"the server scores single levels, not the ensemble {sigma}; for one level a row give an array"
        )
    u = np.broadcast_to(np.asarray(sigma, np.float32), rows)
    seeds = None if seed is None else np.broadcast_to(np.asarray(seed, np.int64), rows)
    bodies = []
    for start in range(0, rows, config.rows_per_request):
        part = slice(start, start + config.rows_per_request)
        body = protocol.serialize(latents[part], prompt[part], u[part], None if seeds is None else seeds[part])
        bodies.append((body, len(u[part])))
    return bodies


def _scores(response: httpx.Response, rows: int) -> list[float]:
    if response.status_code in RETRIED:
        raise _Retry(f"HTTP {response.status_code}: {_message(response)}")
    if response.status_code != 200:
        raise RewardServerError(f"{response.url} answers HTTP {response.status_code}: {_message(response)}")
    try:
        answer = response.json()
        scores = [float(score) for score in answer["raw_scores"]]
        right = answer["protocol_version"] == protocol.VERSION and len(scores) == rows and np.isfinite(scores).all()
    except (ValueError, KeyError, TypeError):
        right = False
    if not right:
        raise _Retry(f"the answer is not that of a reward server: {response.text[:200]!r}")
    return scores


def _answer(response: httpx.Response) -> dict:
    if response.status_code != 200:
        raise RewardServerError(f"{response.url} answers HTTP {response.status_code}: {_message(response)}")
    return response.json()


def _message(response: httpx.Response) -> str:
    try:
        return response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return response.text[: protocol.MAX_MESSAGE]


def _next_pause(pauses: Iterator[float], error: Exception, config: ClientConfig) -> float:
    pause = next(pauses, None)
    if pause is None:
        raise RewardServerError(
            f"no score from {config.url} after {config.max_retries + 1} tries; the last: "
            f"{type(error).__name__ if not str(error) else error}"
        ) from error
    return pause


def _join(parts) -> np.ndarray:
    return np.array([score for part in parts for score in part], np.float32)


def main(options: ClientOptions) -> None:
    """Times a random row of the server's first shape."""
    with RewardClient(ClientConfig(options.url, read_api_key(options.api_key_env))) as client:
        client.wait_until_ready(options.wait)
        info = client.info()
        shape, limits = RowShape.parse(info["shapes"][0]), info["limits"]
        rng = np.random.default_rng(0)
        latents = rng.standard_normal((1, shape.height, shape.width, limits["channels"]), np.float32)
        prompt = PromptEmbeds(
            rng.standard_normal((1, shape.tokens, limits["width"]), np.float32),
            rng.standard_normal((1, limits["pooled_width"]), np.float32),
        )
        seconds = []
        for _ in range(options.repeat):
            started = time.perf_counter()
            score = client.score_latents(latents, prompt)[0]
            seconds.append(time.perf_counter() - started)
    print(f"{options.url} is ready: {info['model']} in {info['dtype']} on {info['device']}")
    median = 1000 * np.median(seconds)
    print(
        f"a random row of {shape} scores {score:+.4f}; {median:.1f} ms from request to answer, median of {len(seconds)}"
    )


if __name__ == "__main__":
    run_command(
        main,
        ClientOptions,
        errors=(RewardServerError, ValueError, httpx.InvalidURL, OSError),
        interrupted="the server goes on",
    )
