"""How a reward server runs."""

import dataclasses
from collections.abc import Sequence

from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.reward_model import RewardModel
from dinalrm_jax.server.protocol import Limits, RowShape
from dinalrm_jax.weights.pretrained import PretrainedModel

MAX_ROWS = 64  # of one request; they are batched like those of many


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """How a server runs.

    max_batch_size: rows in one program.
    max_wait_ms: how long the first row of a batch waits for others while the device is free.
    max_queue: rows that may wait; a request beyond is answered with 429.
    max_body_mb: MiB of one request; None: as many rows as one may have, of the largest shape, in float32.
    max_held_mb: MiB of all requests that are being read, wait or are scored; None: `max_queue` rows of the
        largest shape that is compiled at start, or two requests of the largest size.
    max_connections: that may be open; fewer where the process may not open as many files.
    warmup: shapes compiled at start, LATENT_HEIGHTxLATENT_WIDTHxTOKENS; none: 512 pixels of the recipe, or
        as large as the model goes.
    deadline_s: seconds from a request's first byte to its answer, else 408 (upload) or 504.
    drain_s: seconds that waiting rows have at SIGTERM.
    allow_new_shapes: compile shapes that come, a few; else they are refused.
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

    def bytes_of_bodies(self, limits: Limits, shapes: Sequence[RowShape]) -> tuple[int, int]:
        """Bytes that one body may have, and all of them together."""
        taken = [*shapes, limits.largest] if self.allow_new_shapes else shapes
        body = max(map(limits.body_bytes, taken)) if self.max_body_mb is None else self.max_body_mb * 2**20
        queue = self.max_queue * max(map(limits.row_bytes, shapes))
        return body, max(queue, 2 * body) if self.max_held_mb is None else self.max_held_mb * 2**20


def warmup_shapes(config: ServerConfig, model: RewardModel | PretrainedModel, limits: Limits) -> list[RowShape]:
    """What is compiled at start; where nothing is said, 512 x 512 pixels, and 77 CLIP and 256 T5 tokens as the
    recipe has.

    Raises:
        ConfigError: a shape that this model cannot have.
    """
    shapes = [RowShape.parse(text) for text in config.warmup]
    for shape in shapes:
        if problems := limits.problems(*dataclasses.astuple(shape)):
            raise ConfigError(f"--warmup {shape}: {'; '.join(problems)}")
    if shapes:
        return shapes
    side, encoders = min(64, limits.max_side), model.config.encoders
    return [RowShape(side, side, encoders.text_length if encoders.kind == "tiny" else 77 + 256)]
