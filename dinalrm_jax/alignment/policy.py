"""What an alignment works on: prompts, and a policy beside its reference."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dinalrm_jax import sampling
from dinalrm_jax.config import AlignConfig
from dinalrm_jax.devices.sharding import local_rows, put_rows, row_sharded
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.batch import PromptEmbeds
from dinalrm_jax.model.parameters import Functional, Params
from dinalrm_jax.noise import AnyArray, timestep
from dinalrm_jax.scenes import draw
from dinalrm_jax.training.stream import Form

POLICY, REWARD = "policy.", "reward"  # before the names of their parameters, which lie in one dict
PROMPTS_KEPT = 256  # encoded, on the host: about 1 GB of SD3.5's
Encode = Callable[[Sequence[str]], PromptEmbeds]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """B prompts: as the policy reads them, the negative ones of guidance, as the reward reads them, their numbers."""

    prompt: PromptEmbeds
    negative: PromptEmbeds
    reward_prompt: PromptEmbeds
    number: AnyArray


@dataclasses.dataclass(frozen=True)
class Policy:
    """A generator with adapters.

    Attributes:
        tuned: the transformer with adapters.
        plain: without.
        shape: (H, W, C) of the latents.
        shift: of its schedule.
    """

    tuned: Functional
    plain: Functional
    shape: tuple[int, int, int]
    shift: float

    def velocity(self, params: Params) -> Callable[[jax.Array, jax.Array, PromptEmbeds], jax.Array]:
        """Of latents (B, H, W, C), levels (B,) and prompts, by parameters under their common names."""
        return _velocity(self.tuned, params)

    def reference(self, params: Params) -> Callable[[jax.Array, jax.Array, PromptEmbeds], jax.Array]:
        """The same without adapters; no gradient flows through it."""
        plain = {name: array for name, array in params.items() if ".lora_" not in name}
        return _velocity(self.plain, jax.lax.stop_gradient(plain))

    def schedule(self, steps: int) -> np.ndarray:
        return sampling.schedule(steps, self.shift)


def own_params(params: Params, prefix: str) -> Params:
    """Those of one part of an alignment, under the names that they have without its prefix."""
    return {name.removeprefix(prefix): array for name, array in params.items() if name.startswith(prefix)}


def _velocity(transformer: Functional, params: Params):
    module = transformer.bind(own_params(params, POLICY))
    return lambda latents, sigma, prompt: module.velocity(latents, timestep(sigma), prompt).astype(jnp.float32)


def read_prompts(config: AlignConfig) -> tuple[list[str], list[str]]:
    """The prompts to train on and those held out: the file's last ones, or captions of scenes that are held out.

    Raises:
        ConfigError: an empty line, or too few prompts.
        FileNotFoundError: no such file.
    """
    held_out = config.evaluation.prompts
    if config.scenes is not None:  # captions of the scenes that the generator was trained on, and of those it was not
        train, judged = (
            draw.draw_captions(count, config.seed, held_out=kept, two_groups=config.scenes.two_groups)
            for count, kept in ((config.scenes.count, False), (held_out, True))
        )
        return train, judged
    prompts = pathlib.Path(config.prompts).read_text().splitlines()
    empty = [number for number, prompt in enumerate(prompts, 1) if not prompt.strip()]
    if empty:
        raise ConfigError(f"{config.prompts}, line {empty[0]}: an empty prompt")
    if len(prompts) <= held_out:
        raise ConfigError(
            f"there are {len(prompts)} prompts, of which evaluation.prompts = {held_out} are held out; none "
            "is left to train on"
        )
    return prompts[:-held_out], prompts[-held_out:]


class PromptStream:
    """Endless batches of prompts in an order of their own every epoch: a `training.stream.Stream`.

    Args:
        prompts: to train on.
        encode, encode_for_reward: texts to embeddings.
        batch_size: images of a batch, over all processes.
        group: images of a prompt, one after the other.
        seed: of the order.
        mesh: over whose devices rows are split.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        encode: Encode,
        encode_for_reward: Encode,
        batch_size: int,
        group: int,
        seed: int,
        mesh: Mesh,
    ):
        self._prompts, self._group, self._mesh = prompts, group, mesh
        self._encode = functools.lru_cache(maxsize=PROMPTS_KEPT)(lambda text: _row(encode, text))
        self._encode_for_reward = functools.lru_cache(maxsize=PROMPTS_KEPT)(lambda text: _row(encode_for_reward, text))
        self._order = functools.lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng([seed, epoch]).permutation(len(prompts))
        )
        self._batch_size, self._next = batch_size, 0
        self.units: Mapping[str, int] = {"images": batch_size, "prompts": batch_size // group}
        example = self._batch([0])
        abstract = jax.tree.map(lambda x: row_sharded((batch_size, *x.shape[1:]), x.dtype, mesh), example)
        self.forms: Mapping[Form, PromptBatch] = {(): abstract}

    def restore(self, position: Mapping[str, Any]) -> None:
        self._next = position["prompts"]

    def __iter__(self) -> Iterator[tuple[Form, PromptBatch, dict[str, Any]]]:
        while True:
            count = self._batch_size // self._group
            places = [self._place(self._next + number) for number in range(count)]
            self._next += count
            rows = [place for place in places for _ in range(self._group)]
            local = [rows[row] for row in local_rows(self._batch_size, self._mesh)]
            batch = put_rows(self._batch(local), self._batch_size, self._mesh)
            yield (), batch, {"prompts": self._next}

    def _place(self, number: int) -> int:
        """Which prompt is the so-manieth of the run."""
        epoch, within = divmod(number, len(self._prompts))
        return int(self._order(epoch)[within])

    def _batch(self, places: Sequence[int]) -> PromptBatch:
        def stacked(encode, texts):
            return jax.tree.map(lambda *rows: np.stack(rows), *(encode(text) for text in texts))

        texts = [self._prompts[place] for place in places]
        return PromptBatch(
            stacked(self._encode, texts),
            stacked(self._encode, len(texts) * [""]),
            stacked(self._encode_for_reward, texts),
            np.asarray(places, np.int32),
        )


def _row(encode: Encode, text: str) -> PromptEmbeds:
    return jax.tree.map(lambda array: np.asarray(array[0], np.float16), encode([text]))  # as records hold them


def row_randomness(keys: jax.Array, count: int) -> list[jax.Array]:
    """`count` independent keys of every row, (B,) each."""
    return list(jax.vmap(lambda key: jax.random.split(key, count), out_axes=1)(keys))


def of_the_first(value: jax.Array) -> jax.Array:
    """A device's integer, replaced by that of the first along `data`: loops with collectives must agree on it."""
    if "data" not in jax.sharding.get_abstract_mesh().manual_axes:
        return value
    return jax.lax.psum(jnp.where(jax.lax.axis_index("data") == 0, value, 0), "data")


def like(rows: jax.Array, x: jax.Array) -> jax.Array:
    """(B,) against (B, ...)."""
    return rows.reshape(rows.shape + (1,) * (x.ndim - 1))


def distance(velocity: jax.Array, reference: jax.Array) -> jax.Array:
    """(B,) mean squared difference."""
    return jnp.square(velocity - reference).mean(axis=tuple(range(1, velocity.ndim)))


def norm_ratio(velocity: jax.Array, reference: jax.Array) -> jax.Array:
    """(B,) |v| / |v_ref|: a policy that only turns the reward up leaves 1."""
    axes = tuple(range(1, velocity.ndim))
    return jnp.sqrt(jnp.square(velocity).sum(axis=axes) / jnp.square(reference).sum(axis=axes))
