"""How a reward server runs."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dinalrm_jax.mapping import ConfigError, at_least

if TYPE_CHECKING:  # `serve --help` needs the fields below, and no JAX
    from dinalrm_jax.server.protocol import Limits, RowShape

MAX_ROWS = 64  # of one request; they are batched like those of many


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """How a server runs.

    host: Address to listen on; 0.0.0.0 stands for all of this machine's, and belongs on a trusted network.
    port: Port to listen on; 0 takes a free one.
    max_batch_size: The largest number of rows in one program.
    max_wait_ms: Milliseconds that the first row of a batch waits for others while the device is free.
    max_queue: Rows that may wait; a request beyond them is answered with 429.
    max_body_mb: MiB that one request may have; where it is not given, as many as 64 rows of the largest shape
        take in float32.
    max_held_mb: MiB of all requests that are being read, wait or are scored; where it is not given, `max_queue`
        rows of the largest shape that is compiled at start, or two requests of the largest size.
    max_connections: Connections that may be open; there are fewer where the process may not open as many files.
    warmup: Shapes to compile at start, LATENT_HEIGHTxLATENT_WIDTHxTOKENS; where none is given, 512 pixels and the
        recipe's 333 tokens, or as large as the model goes.
    deadline_s: Seconds from a request's first byte to its answer, else it is answered with 408 (upload) or 504;
        verl-omni's client waits 120.
    drain_s: Seconds that waiting rows have at SIGTERM.
    allow_new_shapes: Compile up to 16 shapes that come later; else they are refused.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    max_batch_size: int = 8
    max_wait_ms: float = 10.0
    max_queue: int = 512
    max_body_mb: int | None = None
    max_held_mb: int | None = None
    max_connections: int = 1024
    warmup: tuple[str, ...] = ()
    deadline_s: float = 100.0
    drain_s: float = 30.0
    allow_new_shapes: bool = False

    def __post_init__(self):
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must lie in 0..65535, got {self.port}")
        at_least(self, 1, ("max_batch_size", "max_queue", "max_body_mb", "max_held_mb", "max_connections"))
        for name in ("max_wait_ms", "drain_s"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        if not self.deadline_s > 0:
            raise ConfigError(f"deadline_s must be positive, got {self.deadline_s}")

    def bytes_of_bodies(self, limits: "Limits", shapes: "Sequence[RowShape]") -> tuple[int, int]:
        """Bytes that one body may have, and all of them together."""
        taken = [*shapes, limits.largest] if self.allow_new_shapes else shapes
        body = max(map(limits.body_bytes, taken)) if self.max_body_mb is None else self.max_body_mb * 2**20
        queue = self.max_queue * max(map(limits.row_bytes, shapes))
        return body, max(queue, 2 * body) if self.max_held_mb is None else self.max_held_mb * 2**20


URL = f"http://{ServerConfig.host}:{ServerConfig.port}"  # where a server with the defaults is
