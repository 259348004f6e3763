"""Gradient ascent of the reward on latents: reward_fn under jit, grad and scan.

    python -m examples.ascend_latents [--run runs/quickstart] [--output runs/ascent.png]

Takes images that break their captions or are degraded, from the held-out pairs of the quickstart, and moves
their latents up the reward's gradient, every step with new noise. Then it scores them with noise that was not
climbed on, at that level and at others, and draws them before and after.

The reward rises at every level, and the pictures do not get better: a few dozen free steps find a texture that
the small model likes. That is reward hacking, and why tuning against any reward model needs a second judge.
"""

import argparse
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import dinalrm_jax as dina
from dinalrm_jax.data.records import Records
from dinalrm_jax.evaluation.plots import new_figure, save


def ascent(reward_fn: Callable, step_size: float, steps: int) -> Callable:
    """A jitted (params, latents, prompt, key) -> (latents, (steps, B) rewards on the way)."""

    def climb(params, latents, prompt, key):
        def step(latents, key):
            def total(x):
                rewards = reward_fn(params, x, prompt, key)
                return rewards.sum(), rewards  # rows do not touch each other: the sum's gradient is each row's

            (_, rewards), gradient = jax.value_and_grad(total, has_aux=True)(latents)
            length = jnp.sqrt(jnp.mean(gradient**2, axis=(1, 2, 3), keepdims=True))
            return latents + step_size * gradient / (length + 1e-12), rewards

        return jax.lax.scan(step, latents, jax.random.split(key, steps))

    return jax.jit(climb)


def rejected_images(records: Records, count: int) -> tuple[np.ndarray, dina.PromptEmbeds, list[str]]:
    """Latents of the rejected images of the first held-out pairs, with their prompts and captions."""
    pairs = records.pairs("eval")
    rows = [pairs[index] for index in range(min(count, len(pairs)))]
    latents = np.stack([records.images[row.rejected].latents for row in rows]).astype(np.float32)
    prompts = [records.prompts[row.prompt] for row in rows]
    embeds = dina.PromptEmbeds(
        np.stack([prompt.prompt_embeds for prompt in prompts]),
        np.stack([prompt.pooled_prompt_embeds for prompt in prompts]),
    )
    return latents, embeds, [prompt.text for prompt in prompts]


def main(run: pathlib.Path, output: pathlib.Path, steps: int, count: int) -> None:
    if not (run / "model").is_dir():
        raise SystemExit(
            f"error: {run} holds no trained model; make one first: python -m dinalrm_jax.train --config "
            "configs/quickstart.py, or name another run with --run"
        )
    model = dina.RewardModel.from_pretrained(run / "model", dtype="float32")
    latents, prompt, captions = rejected_images(Records(run / "data"), count)
    climb = ascent(model.reward_fn(sigma=0.4), step_size=0.05, steps=steps)
    improved, rewards = climb(model.params, jnp.asarray(latents), prompt, jax.random.key(0))
    for step in range(0, steps, max(1, steps // 5)):
        print(f"step {step:>3}: mean reward {rewards[step].mean():+.2f}")
    print("with noise that was not climbed on, before -> after:")
    for sigma in (0.4, 0.2, 0.7):
        before, after = (model.score_latents(x, prompt, sigma, seed=1000).mean() for x in (latents, improved))
        print(f"  sigma {sigma}: {before:+.2f} -> {after:+.2f}")

    figure = new_figure(1.9 * len(captions), 4.4)
    axes = figure.subplots(2, len(captions), squeeze=False)
    for row, (name, x) in enumerate((("before", latents), ("after", np.asarray(improved)))):
        scores = model.score_latents(x, prompt, 0.4, seed=1000)
        for axis, image, score in zip(axes[row], model.image_codec.decode(x), scores):
            axis.imshow(image)
            axis.set_axis_off()
            axis.set_title(f"{name} {score:+.1f}", fontsize=9)
    for axis, caption in zip(axes[1], captions):
        axis.text(
            0.5, -0.04, caption.replace(" and ", "\nand "), fontsize=7, ha="center", va="top", transform=axis.transAxes
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    save(figure, output)
    print(f"wrote {output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run", type=pathlib.Path, default=pathlib.Path("runs/quickstart"), help="a quickstart's workdir"
    )
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/ascent.png"), help="the picture")
    parser.add_argument("--steps", type=int, default=40, help="of the ascent")
    parser.add_argument("--count", type=int, default=6, help="images")
    main(**vars(parser.parse_args()))
