"""Connections that cannot hurt the server: a bounded number, each with a bounded time for a request's head.

aiohttp bounds neither; it would also inflate compressed bodies before anything has looked at them.
"""

import asyncio
import contextlib
import errno
import json
import logging
import resource
import socket
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import psutil
from aiohttp import web

from dinalrm_jax.server import protocol

log = logging.getLogger(__name__)
HEAD_SECONDS = 10.0  # from a head's first byte, or the connection's begin, to the head's end
IDLE_SECONDS = 75.0  # between two requests; longer than clients keep a connection
LINGER_SECONDS = 5.0  # in which what is left of a refused body is read, so that its sender sees the answer,
LINGER_BYTES = 2**23  # if it is no more than this
RECEIVE_BUFFER = 2**19  # bytes of a connection that the system takes before we read them; it would take 6 MiB
BACKLOG = 128  # connections that the system accepts ahead of us
OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def raise_open_files_limit() -> None:
    """To what the system allows this process; a connection takes an open file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # macOS has another bound, which it does not tell
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Throttle:
    """Lines of a log that anybody outside can cause: of each kind, a few in a second."""

    def __init__(self, lines: int = 5):
        self._lines = lines
        self._seen: dict[str, tuple[float, int]] = {}  # kind: second, lines in it

    def admits(self, kind: str) -> bool:
        """Whether one more is written; says once a second where lines are left out."""
        now = time.monotonic()
        since, count = self._seen.get(kind, (now, 0))
        if now - since >= 1:
            if count > self._lines:
                log.warning("%s: %d more like these", kind, count - self._lines)
            since, count = now, 0
        self._seen[kind] = since, count + 1
        return count < self._lines


class Connections:
    """Those that are open: `limit` at most, fewer where the process may not open as many files.

    Beyond that the connection closes that has waited longest for a request's head: of those that never sent
    a whole one, else of those that idle. Where all are at work, the new one is answered with 503.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.throttle = Throttle()
        self.open: set[Connection] = set()
        self.unproven: dict[Connection, None] = {}  # without a whole head so far, the oldest first
        self.idle: dict[Connection, None] = {}  # between two requests, the oldest first

    @contextlib.asynccontextmanager
    async def listening(self, runner: web.AppRunner, host: str, port: int) -> AsyncIterator[int]:
        """Accepts connections for a runner's application while the context is open; the port.

        Raises:
            OSError: the address cannot be listened on.
        """
        loop = asyncio.get_running_loop()
        # Some are accepted before the first of them is looked at, and files are opened too.
        spare = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - psutil.Process().num_fds()
        self.limit = max(1, min(self.limit, spare // 2))
        loop.set_exception_handler(self._on_loop_error)
        try:
            server = await loop.create_server(
                lambda: Connection(self, runner.server, loop), host, port, backlog=max(1, min(BACKLOG, spare // 4))
            )
        except OSError as error:
            raise OSError(f"cannot listen on {host}:{port}: {error}") from error
        for listener in server.sockets:  # connections have it from them
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()

    def admit(self, new: "Connection") -> bool:
        """Whether there is a place for one more, if need be by closing another."""
        if len(self.open) >= self.limit:
            found = next(iter(self.unproven), None) or next(iter(self.idle), None)
            if found is None:
                return False
            self.leave(found)
            found.drop()
            if self.throttle.admits("closed"):
                log.warning("%d connections are open; closed the one that waited longest", self.limit)
        self.open.add(new)
        self.unproven[new] = None
        return True

    def leave(self, connection: "Connection") -> None:
        """Of one that is closed."""
        self.open.discard(connection)
        self.unproven.pop(connection, None)
        self.idle.pop(connection, None)

    def _on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """asyncio reports an accept that failed, a hundred times a second where files have run out."""
        if getattr(context.get("exception"), "errno", None) not in OUT_OF_RESOURCES:
            loop.default_exception_handler(context)
        elif self.throttle.admits("accept"):
            log.error("no connection can be accepted: %s", context["exception"])


class Connection(web.RequestHandler):
    """One connection, whose heads must come in time; handlers say when they begin and end a request."""

    __slots__ = ("_all", "_head_timer", "_at_work", "_between")

    def __init__(self, all_of_them: Connections, server: web.Server, loop: asyncio.AbstractEventLoop):
        super().__init__(
            server,
            loop=loop,
            access_log=None,
            auto_decompress=False,
            keepalive_timeout=IDLE_SECONDS,
            lingering_time=LINGER_SECONDS,
        )
        self._all = all_of_them
        self._head_timer: asyncio.TimerHandle | None = None
        self._at_work, self._between = False, 0  # bytes since a request was answered: a body's rest, a next head

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # of TCP, which is one
        if self._all.admit(self):
            super().connection_made(transport)
            self._expect_head()
            return
        error = {"code": "too_many_connections", "message": f"{self._all.limit} connections are at work; try again"}
        body = json.dumps({"protocol_version": protocol.VERSION, "error": error}).encode()
        transport.write(
            b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nConnection: close\r\n"
            b"Retry-After: 1\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        self.force_close()
        transport.close()

    def refuse(self, rest: int) -> None:
        """Of a request whose body is not wanted: `rest` bytes of it at most, 0 where nobody knows, are to come."""
        if rest > LINGER_BYTES:
            self._between = rest  # what comes next closes the connection

    def drop(self) -> None:
        """Closes it at once, whatever its peer has not read."""
        transport = self.transport
        self.force_close()
        if transport is not None:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        if data and not self._at_work:
            self._between += len(data)
            if self._between > LINGER_BYTES:
                self.drop()
            elif self._head_timer is None:
                self._expect_head()
        super().data_received(data)

    def connection_lost(self, error: BaseException | None) -> None:
        self._all.leave(self)
        self._head_is_here()
        super().connection_lost(error)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """While a request is handled, whose head is whole."""
        self._at_work, self._between = True, 0
        self._head_is_here()
        self._all.unproven.pop(self, None)
        self._all.idle.pop(self, None)
        try:
            yield
        finally:
            self._at_work = False
            if self in self._all.open:
                self._all.idle[self] = None

    def log_exception(self, *message: object, **details: object) -> None:
        """aiohttp's, of requests that are no HTTP among others; anybody can send those."""
        if self._all.throttle.admits("http"):
            super().log_exception(*message, **details)

    def _expect_head(self) -> None:
        self._head_timer = asyncio.get_running_loop().call_later(HEAD_SECONDS, self.drop)

    def _head_is_here(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
