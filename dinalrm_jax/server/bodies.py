"""The bodies of requests in memory: read, and bounded in bytes from their first to the score of their last row."""

import asyncio
import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
from aiohttp import web

from dinalrm_jax.server.protocol import RequestError

PATIENCE = 10.0  # seconds that a body may take whatever its size
SLOWEST = 2**18  # bytes a second, beyond that
SMALL = 2**23  # bytes of a body that is read at once: some rows
PAUSE = 0.05  # seconds between two parts of a larger one while small ones are under way,
RECENT = 0.1  # or were so many seconds ago: who sends one often sends another


def is_small(request: web.Request) -> bool:
    """Whether a request announces a body that is read at once."""
    return 0 < (request.content_length or 0) <= SMALL


class Bodies:
    """Counts the bytes of all bodies that are being read, wait or are scored.

    Large bodies do not get in the way of small ones: one may have half of what is free at most, and is read in
    parts of some 256 KiB with pauses while small ones are under way, from their head to their last score.

    Args:
        largest: bytes of one body.
        limit: bytes of all together.
    """

    def __init__(self, largest: int, limit: int):
        self.largest, self.limit = min(largest, limit // 2), limit
        self.held = 0
        self._small = 0  # requests with a small body
        self._small_at = -math.inf  # when there was one
        self._lock = threading.Lock()  # rows are done in other threads

    async def read(self, request: web.Request, hold: "Hold", deadline: float) -> memoryview | bytearray:
        """A request's body, whose bytes `hold` takes before they are read: as announced, or as they come.

        Args:
            deadline: of the whole request, on the event loop's clock.

        Raises:
            RequestError: 413 too large, 429 no room, 408 too slow, 400 cut off.
        """
        announced = request.content_length or 0
        if announced > self.largest:
            raise RequestError(413, "too_large", f"the body has {announced} bytes, {self.largest} are taken")
        hold.take(announced)
        if is_small(request):
            hold.hurry()
        # Memory without zeros in it is there at once, and is used as the bytes come.
        body = np.empty(announced, np.uint8).data if announced else bytearray()
        position = 0
        started = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout_at(min(deadline, started + PATIENCE)) as clock:
                async for chunk in request.content.iter_any():
                    end = position + len(chunk)
                    if end > self.largest:
                        raise RequestError(413, "too_large", f"the body has more than the {self.largest} bytes taken")
                    if end > announced:
                        hold.take(end - max(position, announced))
                    body[position:end] = chunk
                    position = end
                    clock.reschedule(min(deadline, started + PATIENCE + position / SLOWEST))
                    if max(announced, position) > SMALL and self._hurried():
                        await asyncio.sleep(PAUSE)
        except TimeoutError:
            seconds = asyncio.get_running_loop().time() - started
            raise RequestError(
                408,
                "slow_upload",
                f"{position} bytes of the body came within {seconds:.0f} s, and then no more in time",
            ) from None
        except web.RequestPayloadError as error:
            raise RequestError(400, "bad_request", f"the body cannot be read: {error}") from None
        return body

    def count(self, held: int, small: int) -> None:
        """Adds to the bytes and requests that are counted; raises RequestError 429 where there is no room."""
        with self._lock:
            if held > (self.limit - self.held) / 2:
                raise RequestError(
                    429, "memory_full", f"{self.held} of {self.limit} bytes for requests are in use; try again later"
                )
            self.held += held
            self._small += small
            if small:
                self._small_at = time.monotonic()

    def _hurried(self) -> bool:
        return self._small > 0 or time.monotonic() - self._small_at < RECENT


class Hold:
    """What one request has of `bodies`."""

    def __init__(self, bodies: Bodies):
        self._bodies, self._bytes, self._small = bodies, 0, 0

    def take(self, count: int) -> None:
        """More bytes; raises RequestError 429 where there is no room."""
        self._bodies.count(count, 0)
        self._bytes += count

    def hurry(self) -> None:
        """Lets large bodies wait for this one."""
        self._bodies.count(0, 1)
        self._small = 1

    def release(self) -> None:
        """Gives everything back."""
        self._bodies.count(-self._bytes, -self._small)
        self._bytes = self._small = 0

    def release_after(self, rows: Sequence[Future]) -> None:
        """Gives them back when the last row is scored, failed or cancelled; until then its arrays are views."""
        lock, left = threading.Lock(), len(rows)

        def done(_: Future) -> None:
            nonlocal left
            with lock:
                left -= 1
                last = left == 0
            if last:
                self.release()

        for row in rows:
            row.add_done_callback(done)
