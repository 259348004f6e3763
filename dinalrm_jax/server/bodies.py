"""The bodies of requests in memory: read, and bounded in bytes from their first to the score of their last row."""

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import Future

from aiohttp import web

from dinalrm_jax.server.protocol import RequestError

PATIENCE = 10.0  # seconds that a body may take whatever its size
SLOWEST = 2**18  # bytes a second, beyond that


class Bodies:
    """Counts the bytes of all bodies that are being read, wait or are scored.

    A body may have half of what is free at most, so a few large ones do not lock out the small ones.

    Args:
        largest: bytes of one body.
        limit: bytes of all together.
    """

    def __init__(self, largest: int, limit: int):
        self.largest, self.limit = min(largest, limit // 2), limit
        self.held = 0
        self._lock = threading.Lock()  # rows are done in other threads

    async def read(self, request: web.Request, hold: "Hold", deadline: float) -> bytearray:
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
        body, position = bytearray(announced), 0
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

    def _take(self, count: int) -> None:
        with self._lock:
            if count > (self.limit - self.held) / 2:
                raise RequestError(
                    429, "memory_full", f"{self.held} of {self.limit} bytes for requests are in use; try again later"
                )
            self.held += count

    def _give(self, count: int) -> None:
        with self._lock:
            self.held -= count


class Hold:
    """The bytes that one request has of `bodies`."""

    def __init__(self, bodies: Bodies):
        self._bodies, self._bytes = bodies, 0

    def take(self, count: int) -> None:
        """More of them; raises RequestError 429 where there is no room."""
        self._bodies._take(count)
        self._bytes += count

    def release(self) -> None:
        """Gives them back."""
        self._bodies._give(self._bytes)
        self._bytes = 0

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
