"""How a policy is watched while it is tuned, and what a run leaves for people."""

import dataclasses
import json
import pathlib
import textwrap
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from PIL import Image

from dinalrm_jax import sampling
from dinalrm_jax.alignment.opened import open_judge
from dinalrm_jax.alignment.policy import Encode, Policy, PromptBatch, distance, norm_ratio
from dinalrm_jax.alignment.rewards import Reward
from dinalrm_jax.config import AlignConfig, JudgeConfig
from dinalrm_jax.devices import processes
from dinalrm_jax.devices.mesh import row_devices
from dinalrm_jax.devices.sharding import WHOLE, local_rows, put_rows
from dinalrm_jax.disk import AnyPath, Mirror
from dinalrm_jax.encoders.load import Decoder, ImageCodec
from dinalrm_jax.evaluation.plots import new_figure, save
from dinalrm_jax.evaluation.ranking import shortened
from dinalrm_jax.model.parameters import Params
from dinalrm_jax.noise import NoiseDraw, draw_noise
from dinalrm_jax.scenes.verify import verify

EVALUATION_SEED = 1  # not that of the training's noise
ALARM = 1.0  # standard errors of the difference, by which a judge must fall while the reward rises, to be an alarm
JudgeImages = Callable[[Sequence[str], np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class PolicySamples:
    """Images of the held-out prompts.

    Attributes:
        latents: (N, H, W, C); a prompt's images lie `prompt_count` apart.
        prompt_count: how many prompts.
        watched: (noises, N) raw scores at the levels that do not train.
        trained: (N,) by what does.
        distance, ratio: (N,) of the velocities from the reference's, at noise.
        judged: (N,) by judge.
    """

    latents: np.ndarray
    prompt_count: int
    watched: np.ndarray
    trained: np.ndarray
    distance: np.ndarray
    ratio: np.ndarray
    judged: Mapping[str, np.ndarray]

    def summary(self) -> dict[str, float]:
        """Means over the prompts, `*_error` of the reward over prompts, and over noises of one image."""
        mean = self.watched.mean(axis=0)
        values = {
            "held_out_reward": mean.mean(),
            "held_out_reward_error": self._standard_error(mean),
            "held_out_reward_noise": self.watched.std(axis=0, ddof=1).mean(),
            "held_out_trained_reward": self.trained.mean(),
            "held_out_distance": self.distance.mean(),
            "held_out_velocity_ratio": self.ratio.mean(),
        }
        for name, scores in self.judged.items():
            values |= {f"judge_{name}": scores.mean(), f"judge_{name}_error": self._standard_error(scores)}
        return {name: float(value) for name, value in values.items()}

    def _standard_error(self, values: np.ndarray) -> float:
        """Over prompts: images of one are no independent draws."""
        means = values.reshape(-1, self.prompt_count).mean(axis=0)
        return float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else 0.0


def judge_of_images(config: JudgeConfig) -> JudgeImages:
    """(prompts, images (N, H, W, 3) uint8) -> (N,).

    Raises:
        ConfigError, WeightsError, FileNotFoundError: as for `Judge.from_pretrained`.
    """
    if config.kind == "scenes":
        return lambda prompts, images: np.array(
            [verify(prompt, image).correct for prompt, image in zip(prompts, images)], np.float32
        )
    judge = open_judge(config)
    return lambda prompts, images: judge(prompts, list(images))


class HeldOutPrompts:
    """Samples the held-out prompts by the same noise every time: a `training.loop.HeldOut`.

    Its headline is the first judge's mean, or where there is none, the reward at levels that do not train.

    Args:
        config: of the run.
        policy, frozen: what samples; parameters on the mesh.
        trained_on, watched: the reward that trains, and the same model at other levels.
        prompts: held out.
        first_number: of them; those that train are numbered before.
        encode, encode_for_reward: texts to embeddings.
        codec: of the images that judges see.
        drawer: of those that people see.
        mesh: over whose devices images are split.
        pictures: where every evaluation draws `evaluation.images` of them.
    """

    def __init__(
        self,
        config: AlignConfig,
        policy: Policy,
        frozen: Params,
        trained_on: Reward,
        watched: Reward,
        prompts: Sequence[str],
        first_number: int,
        encode: Encode,
        encode_for_reward: Encode,
        codec: ImageCodec,
        drawer: Decoder,
        mesh: Mesh,
        pictures: AnyPath,
    ):
        self._texts, self._frozen, self._mesh = config.evaluation.each * list(prompts), frozen, mesh
        self._prompt_count = len(prompts)
        self._judges: dict[str, JudgeImages] = {
            judge.kind: judge_of_images(judge) for judge in config.evaluation.judges
        }
        self._codec, self._drawer, self._pictures, self._config = codec, drawer, pictures, config.evaluation
        self.headline = f"judge_{next(iter(self._judges))}" if self._judges else "held_out_reward"
        self._size = -(-len(self._texts) // row_devices(mesh)) * row_devices(mesh)
        rows = np.resize(np.arange(len(self._texts)), self._size)[local_rows(self._size, mesh)]
        texts = [self._texts[row] for row in rows]
        # The reward's noise is not that which the image was made of: that one would lie on the image's own path.
        names = [f"{row}\0{self._texts[row]}" for row in rows]
        keys = NoiseDraw(EVALUATION_SEED).keys(names)
        noises = [NoiseDraw(EVALUATION_SEED + 1 + number).keys(names) for number in range(config.evaluation.noises)]
        batch = PromptBatch(
            encode(texts),
            encode(len(texts) * [""]),
            encode_for_reward(texts),
            np.asarray(first_number + rows % self._prompt_count, np.int32),
        )
        self._inputs = put_rows(jax.tree.map(np.asarray, (batch, keys, noises)), self._size, mesh)
        sigmas = jnp.asarray(policy.schedule(config.evaluation.steps))
        guidance = config.evaluation.guidance

        def sample(params, batch, keys, noises):
            noise = draw_noise(keys, (self._size, *policy.shape))
            velocity, reference = policy.velocity(params), policy.reference(params)
            guided = sampling.guided(velocity, batch.prompt, batch.negative, guidance)
            latents = sampling.rollout(guided, noise, sigmas).latents
            level = jnp.ones(self._size)
            own, plain = velocity(noise, level, batch.prompt), reference(noise, level, batch.prompt)
            return (
                latents,
                jnp.stack([watched(params, latents, batch, each) for each in noises]),
                trained_on(params, latents, batch, noises[0]),
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
        """What the policy with these adapters makes of the prompts, judged."""
        self.compile(trained)
        with jax.set_mesh(self._mesh):
            found = self._program({**self._frozen, **trained}, *self._inputs)
        latents = np.asarray(found[0])[: len(self._texts)]
        watched, trained_on, away, ratio = (np.asarray(array)[..., : len(self._texts)] for array in found[1:])
        images = self._codec.decode(latents) if self._judges else None
        judged = {name: judge(self._texts, images) for name, judge in self._judges.items()}
        return PolicySamples(latents, self._prompt_count, watched, trained_on, away, ratio, judged)

    def __call__(self, trained: Params, step: int) -> dict[str, float]:
        """`PolicySamples.summary`; draws the first images to `pictures`."""
        found = self.samples(trained)
        if processes.is_first():
            strip = np.concatenate(list(self._drawer.decode(found.latents[: self._config.images])), axis=1)
            with Mirror(self._pictures) as pictures:
                Image.fromarray(strip).save(pictures / f"{step:06d}.png")
        return found.summary()

    def enough(self, rows: Sequence[Mapping[str, float]]) -> str | None:
        """Why a run with these evaluations ends: its first judge fell `patience` times, one after the other."""
        patience, said = self._config.patience, [row[self.headline] for row in rows]
        last = said[-patience - 1 :]
        if not patience or len(last) <= patience or any(after >= before for before, after in zip(last, last[1:])):
            return None
        return (
            f"{self.headline} fell at {patience} evaluations one after the other, from {last[0]:.3f} to {last[-1]:.3f}"
        )


def verdict(first: Mapping[str, float], rows: Sequence[Mapping[str, float]], judge: str | None) -> str:
    """What a run's evaluations say: whether its reward rises while its judge, or nothing, goes with it."""
    if judge is None:
        return "no judge watched: a reward that rises proves no better picture; look at pictures.png"
    for row in rows:
        fell = first[judge] - row[judge]
        error = float(np.hypot(first[f"{judge}_error"], row[f"{judge}_error"]))
        if row["held_out_trained_reward"] > first["held_out_trained_reward"] and fell > max(0.0, ALARM * error):
            return (
                f"hacking: at step {row['step']} the reward had risen from {first['held_out_trained_reward']:.2f} to "
                f"{row['held_out_trained_reward']:.2f}, and {judge} fallen from {first[judge]:.3f} to {row[judge]:.3f}"
            )
    change = f"{first[judge]:.3f} to {rows[-1][judge]:.3f}"
    gained = rows[-1][judge] - first[judge]
    if gained > ALARM * float(np.hypot(first[f"{judge}_error"], rows[-1][f"{judge}_error"])):
        return f"{judge} went up: {change}"
    return f"{judge} did not rise measurably: {change}"


def report(
    workdir: AnyPath,
    prompts: Sequence[str],
    before: PolicySamples,
    after: PolicySamples,
    rows: Sequence[Mapping[str, float]],
    drawer: Decoder,
    images: int,
    judge: str | None,
) -> str:
    """Writes policy.json, before_after.png, curves.png and pictures.png; what to tell in the terminal.

    Args:
        rows: the run's evaluations, with their steps.
        judge: the name of the first judge's mean; None: there is none.
    """
    first, last = before.summary(), after.summary()
    said = verdict(first, rows, judge)
    told = {"before": first, "after": last, "verdict": said}
    with Mirror(workdir, kept=["pictures/*.png"]) as directory:
        (directory / "policy.json").write_text(json.dumps(told, indent=1) + "\n")
        _draw_before_after(directory / "before_after.png", prompts, before, after, drawer, images)
        _draw_curves(directory / "curves.png", [{"step": 0, **first}, *rows], judge)
        _draw_pictures(directory / "pictures.png", directory / "pictures")
    return (
        f"{len(prompts)} held-out prompts: reward {first['held_out_reward']:+.2f} -> {last['held_out_reward']:+.2f} at "
        f"evaluation.sigma, {first['held_out_trained_reward']:+.2f} -> {last['held_out_trained_reward']:+.2f} at its "
        f"own levels; |v| / |v_ref| {last['held_out_velocity_ratio']:.3f}\n{said}"
    )


def _draw_before_after(path, prompts, before: PolicySamples, after: PolicySamples, drawer: Decoder, images: int):
    count = min(images, len(before.latents))
    figure = new_figure(1.6 * count, 4)
    axes = figure.subplots(2, count, squeeze=False)
    for row, (name, found) in enumerate((("before", before), ("after", after))):
        for place, image in enumerate(drawer.decode(found.latents[:count])):
            axis = axes[row, place]
            axis.imshow(image)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_title(f"{found.watched[:, place].mean():+.2f}", fontsize=9)
            if not place:
                axis.set_ylabel(name)
            if row:
                prompt = shortened(prompts[place % len(prompts)], 60)
                axis.set_xlabel(textwrap.fill(prompt, 24), fontsize=7, parse_math=False)
    title = "The same noise before and after; the reward at evaluation.sigma"
    figure.suptitle(textwrap.fill(title, 16 * count), fontsize=10)  # about as wide as the images
    save(figure, path)


def _draw_curves(path: pathlib.Path, rows: Sequence[Mapping[str, float]], judge: str | None) -> None:
    panels = [
        (("held_out_reward", "held_out_trained_reward"), "reward"),
        (("held_out_velocity_ratio",), "|v| / |v_ref|"),
        (("held_out_distance",), "distance to the reference"),
    ]
    if judge is not None:
        panels.insert(0, ((judge,), judge))
    figure = new_figure(3.4 * len(panels), 2.8)
    for axis, (names, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for name in names:
            values = np.array([row[name] for row in rows])
            errors = np.array([row.get(f"{name}_error", 0.0) for row in rows])
            steps = [row["step"] for row in rows]
            (line,) = axis.plot(steps, values, marker="o", markersize=3, label=name)
            axis.fill_between(steps, values - errors, values + errors, color=line.get_color(), alpha=0.2, linewidth=0)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        if len(names) > 1:
            axis.legend(fontsize=7)
    save(figure, path)


def _draw_pictures(path: pathlib.Path, directory: pathlib.Path) -> None:
    """The strips of all evaluations below each other."""
    strips = sorted(directory.glob("*.png"))
    shown = strips if len(strips) <= 8 else [strips[place] for place in np.linspace(0, len(strips) - 1, 8).astype(int)]
    figure = new_figure(9, 1.3 * len(shown))
    for axis, strip in zip(figure.subplots(len(shown), 1, squeeze=False)[:, 0], shown):
        axis.imshow(np.asarray(Image.open(strip)))
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_ylabel(f"step {int(strip.stem)}", fontsize=8)
    figure.suptitle("Held-out prompts, the same noise over the run", fontsize=10)
    save(figure, path)
