"""The compiled programs of a server: one for each shape of a row and each bucket of a batch's size."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dinalrm_jax.model.batch import PromptEmbeds
from dinalrm_jax.model.reward import is_trainable, reward_functional, stored_shapes
from dinalrm_jax.noise import draw_noise, seed_key
from dinalrm_jax.reward_model import RewardModel
from dinalrm_jax.server.protocol import RowShape
from dinalrm_jax.weights.digest import digest
from dinalrm_jax.weights.pretrained import PretrainedModel


@dataclasses.dataclass(frozen=True)
class Row:
    """One image to score: latents (h, w, C), embeddings (S, D) and (P,), a level and a seed of 64 bits."""

    latents: np.ndarray
    prompt_embeds: np.ndarray
    pooled_prompt_embeds: np.ndarray
    sigma: float
    seed: int

    @property
    def shape(self) -> RowShape:
        return RowShape(self.latents.shape[0], self.latents.shape[1], len(self.prompt_embeds))


class Engine:
    """Scores up to `max_batch` rows of one shape in one program.

    A batch is padded, by its first row, to the next of 1, 2, 4, 8 ... `max_batch`. A row's noise comes
    from its own seed, as in `RewardModel.score_latents`, so its score does not depend on the others.

    Of a checkpoint that is only open, programs are compiled while its weights are on their way.
    """

    def __init__(self, model: RewardModel | PretrainedModel, max_batch: int):
        self.max_batch = max_batch
        self.buckets = sorted({min(2**power, max_batch) for power in range(max_batch.bit_length() + 1)})
        self._spec = model.config.transformer.latents
        self._model, self._params = model, None
        self.digest: str | None = None  # of the weights on the device, once they are there
        self._compiled_for = (
            model.params if isinstance(model, RewardModel) else stored_shapes(model.config, model.execution)
        )
        module = reward_functional(model.config, model.execution)
        self._score = jax.jit(
            lambda params, latents, prompt, sigma, keys: module.bind(params)(
                latents, prompt, sigma, draw_noise(keys, latents.shape)
            )
        )
        self.shapes: list[RowShape] = []  # those that are compiled for every bucket
        self._programs: dict[tuple[int, RowShape], jax.stages.Compiled] = {}

    def load(self) -> None:
        """Takes the weights, which are read now where they are not in memory yet; their files are closed."""
        self._params = jax.block_until_ready(self._model.params)
        self.digest = digest(self._params, is_trainable)
        self._model = None

    def compile(self, shape: RowShape) -> None:
        """Makes the programs of a shape, all buckets."""
        spec = self._spec
        for size in self.buckets:
            struct: Any = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
            inputs = (
                struct((size, shape.height, shape.width, spec.channels)),
                PromptEmbeds(struct((size, shape.tokens, spec.text_width)), struct((size, spec.pooled_width))),
                struct((size,)),
                jax.ShapeDtypeStruct((size, 2), jnp.uint32),
            )
            self._programs[size, shape] = self._score.lower(self._compiled_for, *inputs).compile()
        self.shapes.append(shape)

    def probe(self, shape: RowShape) -> Row:
        """A row of a shape, to try the device with."""
        spec = self._spec
        rng = np.random.default_rng(0)
        return Row(
            rng.standard_normal((shape.height, shape.width, spec.channels), np.float32),
            rng.standard_normal((shape.tokens, spec.text_width), np.float32),
            rng.standard_normal(spec.pooled_width, np.float32),
            sigma=0.4,
            seed=0,
        )

    def start(self, rows: Sequence[Row]) -> Callable[[], np.ndarray]:
        """Begins a batch of rows of one compiled shape; the result waits for its (len(rows),) scores.

        Out of memory, the batch is done once more in two halves.
        """
        try:
            scores = self._dispatch(rows)
        except jax.errors.JaxRuntimeError as error:
            return functools.partial(self._in_halves, rows, error)

        def finish() -> np.ndarray:
            try:
                return np.asarray(scores)[: len(rows)]
            except jax.errors.JaxRuntimeError as error:
                return self._in_halves(rows, error)

        return finish

    def _in_halves(self, rows: Sequence[Row], error: jax.errors.JaxRuntimeError) -> np.ndarray:
        """The scores of a batch that failed for lack of memory; any other failure is raised."""
        if "RESOURCE_EXHAUSTED" not in str(error) or len(rows) == 1:
            raise error
        middle = (len(rows) + 1) // 2
        return np.concatenate(
            [np.asarray(self._dispatch(half))[: len(half)] for half in (rows[:middle], rows[middle:])]
        )

    def _dispatch(self, rows: Sequence[Row]) -> jax.Array:
        size = next(bucket for bucket in self.buckets if bucket >= len(rows))
        padded = [*rows, *(size - len(rows)) * [rows[0]]]

        def stack(name):
            return np.stack([getattr(row, name) for row in padded], dtype=np.float32, casting="unsafe")

        return self._programs[size, rows[0].shape](
            self._params,
            stack("latents"),
            PromptEmbeds(stack("prompt_embeds"), stack("pooled_prompt_embeds")),
            np.array([row.sigma for row in padded], np.float32),
            seed_key([row.seed for row in padded]),
        )
