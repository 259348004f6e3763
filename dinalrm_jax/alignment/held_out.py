"""How a policy is watched while it is tuned, and what a run leaves for people."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dinalrm_jax import sampling
from dinalrm_jax.alignment.policy import Encode, Policy, Reward, distance, norm_ratio
from dinalrm_jax.config import AlignConfig
from dinalrm_jax.devices.mesh import row_devices
from dinalrm_jax.devices.sharding import WHOLE, local_rows, put_rows
from dinalrm_jax.encoders.load import ImageCodec
from dinalrm_jax.evaluation.plots import new_figure, save
from dinalrm_jax.evaluation.ranking import shortened
from dinalrm_jax.model.parameters import Params
from dinalrm_jax.noise import NoiseDraw, draw_noise

EVALUATION_SEED = 1  # not that of the training's noise


@dataclasses.dataclass(frozen=True)
class PolicySamples:
    """Images of the held-out prompts.

    Attributes:
        latents: (N, H, W, C).
        watched: (N,) raw scores at the levels that do not train.
        trained: (N,) at those that do.
        distance, ratio: (N,) of the velocities from the reference's, at noise.
    """

    latents: np.ndarray
    watched: np.ndarray
    trained: np.ndarray
    distance: np.ndarray
    ratio: np.ndarray


class HeldOutPrompts:
    """Samples the held-out prompts by the same noise every time: a `training.loop.HeldOut`.

    Args:
        config: of the run.
        policy, frozen: what samples; parameters on the mesh.
        trained_on, watched: the reward at the levels that train, and at others.
        prompts: held out.
        encode, encode_for_reward: texts to embeddings.
        mesh: over whose devices images are split.
    """

    headline = "held_out_reward"

    def __init__(
        self,
        config: AlignConfig,
        policy: Policy,
        frozen: Params,
        trained_on: Reward,
        watched: Reward,
        prompts: Sequence[str],
        encode: Encode,
        encode_for_reward: Encode,
        mesh: Mesh,
    ):
        self.prompts, self._frozen, self._mesh = list(prompts), frozen, mesh
        self._size = -(-len(prompts) // row_devices(mesh)) * row_devices(mesh)
        rows = np.resize(np.arange(len(prompts)), self._size)[local_rows(self._size, mesh)]
        texts = [self.prompts[row] for row in rows]
        # The reward's noise is not that which the image was made of: that one would lie on the image's own path.
        names = [f"{row}\0{self.prompts[row]}" for row in rows]
        keys, reward_keys = (NoiseDraw(seed).keys(names) for seed in (EVALUATION_SEED, EVALUATION_SEED + 1))
        inputs = encode(texts), encode(len(texts) * [""]), encode_for_reward(texts), keys, reward_keys
        self._inputs = put_rows(jax.tree.map(np.asarray, inputs), self._size, mesh)
        sigmas = jnp.asarray(policy.schedule(config.evaluation.steps))
        guidance = config.evaluation.guidance

        def sample(params, prompt, negative, reward_prompt, keys, reward_keys):
            noise = draw_noise(keys, (self._size, *policy.shape))
            velocity, reference = policy.velocity(params), policy.reference(params)
            latents = sampling.rollout(sampling.guided(velocity, prompt, negative, guidance), noise, sigmas).latents
            level = jnp.ones(self._size)
            own, plain = velocity(noise, level, prompt), reference(noise, level, prompt)
            return (
                latents,
                watched(params, latents, reward_prompt, reward_keys),
                trained_on(params, latents, reward_prompt, reward_keys),
                distance(own, plain),
                norm_ratio(own, plain),
            )

        self._sample = jax.jit(sample, out_shardings=NamedSharding(mesh, WHOLE))
        self._program: jax.stages.Compiled | None = None

    def compile(self, trained: Params) -> None:
        """Before the first step, so that what does not fit says so at once."""
        if self._program is None:
            with jax.set_mesh(self._mesh):
                self._program = self._sample.lower({**self._frozen, **trained}, *self._inputs).compile()

    def samples(self, trained: Params) -> PolicySamples:
        """What the policy with these adapters makes of the prompts."""
        self.compile(trained)
        with jax.set_mesh(self._mesh):
            found = self._program({**self._frozen, **trained}, *self._inputs)
        return PolicySamples(*(np.asarray(array)[: len(self.prompts)] for array in found))

    def __call__(self, trained: Params) -> dict[str, float]:
        """Means over the prompts; the reward at levels that do not train decides which state is the best."""
        found = self.samples(trained)
        error = found.watched.std(ddof=1) / np.sqrt(len(found.watched)) if len(found.watched) > 1 else 0.0
        return {
            self.headline: float(found.watched.mean()),
            "held_out_reward_error": float(error),
            "held_out_trained_reward": float(found.trained.mean()),
            "held_out_distance": float(found.distance.mean()),
            "held_out_velocity_ratio": float(found.ratio.mean()),
        }


def report(
    directory: pathlib.Path,
    prompts: Sequence[str],
    before: PolicySamples,
    after: PolicySamples,
    codec: ImageCodec,
    images: int,
) -> str:
    """Writes policy.json and before_after.png; what to tell in the terminal."""
    values = {
        name: {
            "held_out_reward": float(found.watched.mean()),
            "trained_reward": float(found.trained.mean()),
            "velocity_ratio": float(found.ratio.mean()),
            "reference_distance": float(found.distance.mean()),
        }
        for name, found in (("before", before), ("after", after))
    }
    (directory / "policy.json").write_text(json.dumps(values, indent=1) + "\n")
    count = min(images, len(prompts))
    figure = new_figure(1.6 * count, 3.8)
    axes = figure.subplots(2, count, squeeze=False)
    for row, (name, found) in enumerate((("before", before), ("after", after))):
        for place, image in enumerate(codec.decode(found.latents[:count])):
            axis = axes[row, place]
            axis.imshow(image)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_title(f"{found.watched[place]:+.2f}", fontsize=9)
            if not place:
                axis.set_ylabel(name)
            if row:
                axis.set_xlabel(shortened(prompts[place], 24), fontsize=7, parse_math=False)
    figure.suptitle("The same noise before and after; the reward at levels that did not train", fontsize=10)
    save(figure, directory / "before_after.png")
    first, last = values["before"], values["after"]
    return (
        f"{len(prompts)} held-out prompts: reward {first['held_out_reward']:+.2f} -> {last['held_out_reward']:+.2f} at "
        f"levels that did not train, {first['trained_reward']:+.2f} -> {last['trained_reward']:+.2f} at those that "
        f"did; |v| / |v_ref| {last['velocity_ratio']:.3f}. A reward that rises proves no better picture: look at "
        f"{directory / 'before_after.png'}"
    )
