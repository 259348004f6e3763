"""The shapes that a server compiles: at its start, or when they first come, beside the work."""

import dataclasses
import queue
import threading
from collections.abc import Callable

from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.encoding import CLIP_TOKENS
from dinalrm_jax.reward_model import RewardModel
from dinalrm_jax.server.config import ServerConfig
from dinalrm_jax.server.protocol import Limits, RequestError, RowShape
from dinalrm_jax.weights.pretrained import PretrainedModel

MAX_NEW_SHAPES = 16  # a server compiles, whatever comes of them; each costs memory for good
MAX_PENDING = 2  # at a time; a compilation takes minutes and all cores


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
    usual = CLIP_TOKENS + 256 if encoders.kind == "sd3" else encoders.tokens
    return [RowShape(side, side, limits.tokens or usual)]


class NewShapes:
    """A bounded number of shapes, one compiled after another.

    A compilation cannot be interrupted, so it runs in a thread that no exit waits for.

    Args:
        limit: shapes that may come; 0: none.
        compile: makes a shape's programs.
        changed: held by whoever calls; notified when a compilation ends.

    Attributes:
        pending: shapes that wait for their programs.
        failed: those that have none, and why.
    """

    def __init__(self, limit: int, compile: Callable[[RowShape], None], changed: threading.Condition):
        self.pending: set[RowShape] = set()
        self.failed: dict[RowShape, str] = {}
        self._limit, self._compile, self._changed = limit, compile, changed
        self._begun = 0
        self._wanted: queue.SimpleQueue[RowShape] = queue.SimpleQueue()

    def request(self, shape: RowShape, known: list[RowShape]) -> None:
        """Begins to compile a shape that is not among the `known`, or says why it is not taken.

        Raises:
            RequestError: 400 where it never will be, 503 where others are compiled first.
        """
        if shape in self.pending:
            return
        if shape in self.failed:
            raise RequestError(400, "unknown_shape", self.reason(shape))
        if self._begun == self._limit:
            more = f"{self._limit} new ones are all that is taken" if self._limit else "any with --allow-new-shapes"
            raise RequestError(
                400,
                "unknown_shape",
                f"latents and tokens of shape {shape} are not compiled here; this server takes "
                f"{', '.join(map(str, known))} (more with --warmup, {more})",
            )
        if len(self.pending) == MAX_PENDING:
            raise RequestError(
                503, "compiling", f"{MAX_PENDING} other shapes are being compiled; try {shape} again later"
            )
        if self._begun == 0:
            threading.Thread(target=self._run, name="compile", daemon=True).start()
        self._begun += 1
        self.pending.add(shape)
        self._wanted.put(shape)

    def reason(self, shape: RowShape) -> str:
        """Why a shape that failed is refused."""
        return f"shape {shape} cannot be compiled here: {self.failed[shape]}"

    def _run(self) -> None:
        while True:
            shape = self._wanted.get()
            failure = None
            try:
                self._compile(shape)
            except BaseException as error:
                failure = f"{type(error).__name__}: {error}"[:500]
            with self._changed:
                self.pending.remove(shape)
                if failure is not None:
                    self.failed[shape] = failure
                self._changed.notify_all()
