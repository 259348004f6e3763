"""What makes an image a better one: a reward model, rules for drawn scenes, and mixtures of them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from dinalrm_jax.alignment.policy import PromptBatch, own_params
from dinalrm_jax.encoders import tiny
from dinalrm_jax.model.parameters import Params
from dinalrm_jax.model.reward import reward_functional
from dinalrm_jax.noise import AnyArray
from dinalrm_jax.preference import LossConfig, preferred
from dinalrm_jax.reward_model import RewardModel
from dinalrm_jax.scenes.verify import verify

ERROR = "reward_error"
BROKEN, BROKEN_PROMPT = "nonfinite_reward", "nonfinite_reward_prompt"
DIGITS = 31  # of a prompt's number, in base two
EPSILON = 1e-4  # beside the deviation, so that equal rewards give no advantage instead of a division by 0


def group_advantages(
    rewards: Float[AnyArray, " n"], groups: Int[AnyArray, " n"], scale: Literal["global", "group"] = "global"
) -> Float[Array, " n"]:
    """`(reward - mean of its group) / (standard deviation + 1e-4)`.

    Args:
        rewards: (N,).
        groups: (N,) integers; images of one prompt have the same one.
        scale: whose deviation (with n - 1 in its denominator): of all rewards, or of the group's own. A group of one
            has no advantage.
    """
    rewards, groups = jnp.asarray(rewards, jnp.float32), jnp.asarray(groups)
    same = (groups[:, None] == groups).astype(jnp.float32)
    count = same.sum(axis=1)

    def summed(values: jax.Array) -> jax.Array:  # of each one's group; TPUs and GPUs would round the factors
        return jnp.matmul(same, values, precision="highest")

    centred = rewards - summed(rewards) / count
    if scale == "global":
        return centred / (jnp.std(rewards, ddof=1) + EPSILON)
    if scale != "group":
        raise ValueError(f'scale must be "global" or "group", got {scale!r}')
    return centred / (jnp.sqrt(summed(jnp.square(centred)) / jnp.maximum(count - 1, 1)) + EPSILON)


class Reward(Protocol):
    """Any function of parameters, clean latents, their prompts and keys is a reward."""

    def __call__(self, params: Params, latents: jax.Array, batch: PromptBatch, keys: jax.Array, /) -> jax.Array:
        """(B,) raw scores of latents (B, H, W, C), with keys (B,) for whatever noise it takes."""
        ...


@dataclasses.dataclass(frozen=True)
class LatentReward:
    """A frozen reward model on the policy's own backbone, differentiable in the latents.

    Attributes:
        model: without its arrays.
        names: of its parameters, to those among all of the alignment: what it shares with the policy is there once.
        sigma: the noise level that it scores at, or those of an ensemble.
    """

    model: RewardModel
    names: Mapping[str, str]
    sigma: tuple[float, ...]

    def __call__(self, params: Params, latents: jax.Array, batch: PromptBatch, keys: jax.Array) -> jax.Array:
        score = self.model.reward_fn(self.sigma if len(self.sigma) > 1 else self.sigma[0])
        return score(self._own(params), latents, batch.reward_prompt, keys)

    def at_level(self, params: Params, noisy: jax.Array, batch: PromptBatch, levels: jax.Array) -> jax.Array:
        """(B,) raw scores of latents (B, H, W, C) that a sampler has at levels (B,): noisy as they are."""
        module = reward_functional(self.model.config, self.model.execution).bind(self._own(params))
        return module.score_noisy(noisy, batch.reward_prompt, levels)

    def preferred(self, one: jax.Array, other: jax.Array, levels: jax.Array) -> jax.Array:
        """(B,) the probability that an image is preferred to another, by their scores and the model's likelihood.

        (Bradley and Terry's of a model that does not say what it was trained with.)
        """
        return preferred(one, other, levels, self.model.likelihood or LossConfig("bradley_terry"))

    def _own(self, params: Params) -> Params:
        return jax.lax.stop_gradient({name: params[known] for name, known in self.names.items()})


@dataclasses.dataclass(frozen=True)
class JudgeReward:
    """A frozen judge of decoded images, differentiable in the latents.

    Attributes:
        decode: (params, latents) -> pixels (B, H, W, 3) from 0 to 1, of parameters under the decoder's own names.
        score: (params, pixels, token ids (B, T)) -> (B,), of parameters under the judge's own names.
        ids: the name, among all parameters, of the token ids (N, T) of all prompts, which a batch names by number.
        decoder, prefix: before the names of their parameters.
        dtype: that images are decoded in.
    """

    decode: Callable[[Params, jax.Array], jax.Array]
    score: Callable[[Params, jax.Array, jax.Array], jax.Array]
    ids: str
    decoder: str
    prefix: str
    dtype: str

    def __call__(self, params: Params, latents: jax.Array, batch: PromptBatch, keys: jax.Array) -> jax.Array:
        decoder, own = (jax.lax.stop_gradient(own_params(params, prefix)) for prefix in (self.decoder, self.prefix))
        # The image's memory is the decoder's, and large; the judge sees it at its own, small size.
        pixels = self.decode(decoder, latents.astype(self.dtype)).astype(jnp.float32)
        return self.score(own, pixels, params[self.ids][batch.number]).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class SceneRules:
    """The share of its caption that a drawn scene shows, by `scenes.verify`, of the tiny codec's latents; no gradient.

    As a reward it is a control: an algorithm that cannot raise it has a fault, whatever the reward model is like.

    Attributes:
        captions: all prompts, which a batch names by their numbers.
    """

    captions: Sequence[str]

    def __call__(self, params: Params, latents: jax.Array, batch: PromptBatch, keys: jax.Array) -> jax.Array:
        def judged(latents, numbers):
            shares = [
                verify(self.captions[number], tiny.decode_latents(row)).share
                for number, row in zip(np.asarray(numbers), np.asarray(latents))
            ]
            return np.array(shares, np.float32)

        shape = jax.ShapeDtypeStruct(latents.shape[:1], jnp.float32)
        return jax.pure_callback(judged, shape, jax.lax.stop_gradient(latents), batch.number)


@dataclasses.dataclass(frozen=True, eq=False)
class Rewards:
    """Weighted rewards by name; the first one is "reward".

    Attributes:
        members: name to (reward, weight).
        noises: every image is scored with so many keys.
        by_error: whether an image's standard error over them is its weight of the reference.
    """

    members: Mapping[str, tuple[Reward, float]]
    noises: int = 1
    by_error: bool = False

    def __call__(self, params: Params, latents: jax.Array, batch: PromptBatch, keys: jax.Array) -> dict[str, jax.Array]:
        """(B,) raw scores by name; under several noises their means, and ERROR, that of the weighted sum's mean."""
        if self.noises == 1:
            return self._scored(params, latents, batch, keys)
        again = [jax.vmap(jax.random.fold_in, (0, None))(keys, number) for number in range(self.noises)]
        found = [self._scored(params, latents, batch, each) for each in again]
        raw = {name: jnp.stack([each[name] for each in found]).mean(axis=0) for name in self.members}
        spread = jnp.stack([self.total(each) for each in found]).std(axis=0, ddof=1)
        return raw | {ERROR: jax.lax.stop_gradient(spread / np.sqrt(self.noises))}

    def _scored(self, params: Params, latents: jax.Array, batch: PromptBatch, keys: jax.Array) -> dict[str, jax.Array]:
        return {name: reward(params, latents, batch, keys) for name, (reward, _) in self.members.items()}

    def doubt(self, raw: Mapping[str, jax.Array]) -> jax.Array | float:
        """(B,) factors of the reference's weight."""
        return raw[ERROR] if self.by_error else 1.0

    def metrics(self, raw: Mapping[str, jax.Array], batch: PromptBatch) -> dict[str, jax.Array]:
        """(B,) scores and BROKEN, 1 where one is not finite; (B, DIGITS) BROKEN_PROMPT for `broken_prompt`."""
        broken = ~jnp.isfinite(self.total(raw))
        digits = (jnp.asarray(batch.number)[:, None] >> jnp.arange(DIGITS)) & 1
        digits = jnp.where(broken[:, None], digits, 0).astype(jnp.float32)
        return {**raw, BROKEN: broken.astype(jnp.float32), BROKEN_PROMPT: digits}

    def total(self, raw: Mapping[str, jax.Array]) -> jax.Array:
        """(B,) the weighted sum of raw scores."""
        return jnp.stack([weight * raw[name] for name, (_, weight) in self.members.items()]).sum(axis=0)

    def advantages(self, raw: Mapping[str, jax.Array], group: int, scale: Literal["global", "group"]) -> jax.Array:
        """(B,) the weighted sum of each reward's own `group_advantages`, images of a group being neighbours.

        Within a shard_map over `data` the rewards of the others count for the deviation.
        """
        apart = [weight * _of_all_devices(raw[name], group, scale) for name, (_, weight) in self.members.items()]
        return jnp.stack(apart).sum(axis=0)


def broken_prompt(metrics: Mapping[str, AnyArray | float], prompts: Sequence[str]) -> str | None:
    """Whose reward a step found NaN or infinite, by its metrics, which are means over rows; None: none was."""
    share = float(metrics.get(BROKEN, 0.0))
    if not share:
        return None
    digits = np.asarray(metrics[BROKEN_PROMPT]) / share  # each 0 or 1 where there is one prompt, between where several
    if np.abs(digits - digits.round()).max() < 1e-4:
        number = int((digits.round().astype(np.int64) << np.arange(DIGITS)).sum())
        return f"the reward of the prompt {prompts[number]!r} is NaN or infinite"
    return f"the rewards of several prompts are NaN or infinite, {100 * share:.0f} % of the images"


def _of_all_devices(rewards: jax.Array, group: int, scale: Literal["global", "group"]) -> jax.Array:
    everywhere, first = rewards, jnp.zeros((), jnp.int32)
    if "data" in jax.sharding.get_abstract_mesh().manual_axes:
        everywhere = jax.lax.all_gather(rewards, "data", tiled=True)
        first = jax.lax.axis_index("data") * len(rewards)
    advantages = group_advantages(everywhere, jnp.arange(len(everywhere)) // group, scale)
    return jax.lax.dynamic_slice_in_dim(advantages, first, len(rewards))
