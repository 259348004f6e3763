"""Best-of-N: a policy samples N images for a prompt, the reward picks one; both on one copy of the backbone.

    python -m examples.best_of_n [--run runs/quickstart] [--prompt TEXT] [--output runs/best_of_n.png]

The policy is the quickstart's generator, a whole SD3-style transformer sampled by Euler steps; the reward model
was trained on its first blocks. `from_pretrained(..., backbone=...)` takes those arrays from the policy as they
are, so with SD3.5-Medium the 2.5 GB of the truncated backbone are held once.
"""

import argparse
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import dinalrm_jax as dina
from dinalrm_jax import sampling
from dinalrm_jax.evaluation.plots import new_figure, save
from dinalrm_jax.model.backbone.family import transformer_functional
from dinalrm_jax.model.execution import ExecutionConfig
from dinalrm_jax.model.parameters import Functional
from dinalrm_jax.weights.pretrained import load_backbone


def sampler(policy: Functional, sigmas: np.ndarray) -> Callable:
    """(params, noise (B, H, W, C), prompt) -> clean latents, by Euler's method.

    SD3.5's own levels are shifted (`dina.sampling.schedule`), the quickstart's generator was trained on
    evenly spread ones.
    """

    def sample(params, noise, prompt):
        module = policy.bind(params)
        return sampling.euler(
            lambda latents, sigma: module.velocity(latents, dina.noise.timestep(sigma), prompt), noise, sigmas
        )

    return sample


def best_of_n(sample: Callable, reward_fn: Callable) -> Callable:
    """A jitted (policy params, reward params, noise (N, H, W, C), one prompt, key) -> (best, latents, rewards)."""

    def choose(policy_params, reward_params, noise, prompt, key):
        prompts = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(noise), *x.shape[1:])), prompt)
        latents = sample(policy_params, noise, prompts)
        rewards = reward_fn(reward_params, latents, prompts, key)
        return jnp.argmax(rewards), latents, rewards

    return jax.jit(choose)


def main(run: pathlib.Path, output: pathlib.Path, prompt: str, count: int, seed: int) -> None:
    if not (run / "model").is_dir():
        raise SystemExit(
            f"error: {run} holds no trained model; make one first: python -m dinalrm_jax.train --config "
            "configs/quickstart.py, or name another run with --run"
        )
    transformer, backbone = load_backbone(run / "generator" / "backbone")  # once, for both
    policy = transformer_functional(transformer, ExecutionConfig())
    model = dina.RewardModel.from_pretrained(run / "model", dtype="float32", backbone=backbone)

    choose = best_of_n(sampler(policy, np.linspace(1, 0, 31, dtype=np.float32)), model.reward_fn(sigma=(0.2, 0.5, 0.7)))
    noise = jax.random.normal(jax.random.key(seed), (count, 8, 8, transformer.latents.channels))
    embeds = model.encode_prompt([prompt])
    best, latents, rewards = choose(backbone, model.params, noise, embeds, jax.random.key(0))
    print(
        f"{prompt!r}, {count} samples: mean reward {rewards.mean():+.2f}, the best, number {best}, {rewards[best]:+.2f}"
    )

    order = np.argsort(-np.asarray(rewards))
    figure = new_figure(1.5 * count, 2.2)
    axes = figure.subplots(1, count, squeeze=False)[0]
    for axis, row, image in zip(axes, order, model.image_codec.decode(np.asarray(latents)[order])):
        axis.imshow(image)
        axis.set_axis_off()
        axis.set_title(f"{rewards[row]:+.1f}", fontsize=10)
    figure.suptitle(f"{prompt!r}: {count} samples, best first", fontsize=10)
    output.parent.mkdir(parents=True, exist_ok=True)
    save(figure, output)
    print(f"wrote {output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run", type=pathlib.Path, default=pathlib.Path("runs/quickstart"), help="a quickstart's workdir"
    )
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/best_of_n.png"), help="the picture")
    parser.add_argument("--prompt", default="two blue squares on the left", help="what to draw")
    parser.add_argument("--count", type=int, default=8, help="samples")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    main(**vars(parser.parse_args()))
