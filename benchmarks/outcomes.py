"""How well rewards order the outcomes of ONE sampling step by what becomes of them: what LPO has to learn from.

    python -m benchmarks.outcomes [--run runs/quickstart_align_reward] [--rewards MODEL,MODEL] [--captions 100]
        [--candidates 6] [--steps 12] [--sigma 0.2]

At every step of the run's generator (DDIM's with eta 1, as `lpo` has it) some outcomes of one state are drawn, and each
is finished without further noise; `scenes.verify` says what the picture is worth, from 0 to 5. A reward scores the
outcome as it is, noisy, at the level that the step reaches; its jump to clean latents; and the finished picture, both
at `sigma`. Prints, for each of these, the mean correlation within a state (Pearson's; of states whose pictures differ
in worth), and by how much the picture of the outcome that the reward puts first is worth more than that of the last.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import dinalrm_jax as dina
from dinalrm_jax import sampling
from dinalrm_jax.devices.compilation import enable_compilation_cache
from dinalrm_jax.model.backbone.family import transformer_functional
from dinalrm_jax.model.reward import reward_functional
from dinalrm_jax.noise import timestep
from dinalrm_jax.scenes.draw import draw_captions
from dinalrm_jax.scenes.samples import worth
from dinalrm_jax.training.workdir import read_claim

SHAPE = (8, 8, 16)  # of the latents of a scene


def main(argv: list[str]) -> None:
    values = flags.FLAGS
    enable_compilation_cache()
    generator = dina.Generator.from_pretrained(f"{values.run}/generator/backbone", dtype="float32")
    module = transformer_functional(generator.config, generator.execution)
    models = {path: dina.RewardModel.from_pretrained(path, dtype="float32") for path in values.rewards}
    scenes = read_claim(pathlib.Path(values.run)).config.scenes
    captions = draw_captions(values.captions, values.seed, held_out=False, two_groups=scenes.two_groups)
    count, rng = values.candidates, np.random.default_rng(values.seed)
    texts = [caption for caption in captions for _ in range(count)]
    sigmas = sampling.schedule(values.steps, generator.origin.shift)

    @jax.jit
    def velocity(latents, level, prompt):
        levels = jnp.full(len(latents), level)
        return module.bind(generator.params).velocity(latents, timestep(levels), prompt)

    def scorer(model):
        functional = reward_functional(model.config, model.execution)

        @jax.jit
        def score(latents, level, prompt):
            return functional.bind(model.params).score_noisy(latents, prompt, jnp.full(len(latents), level))

        return score

    scorers = {path: scorer(model) for path, model in models.items()}
    # All have the generator's encoders.
    prompt, prompts = (models[values.rewards[0]].encode_prompt(each) for each in (captions, texts))
    x = rng.standard_normal((len(captions), *SHAPE)).astype(np.float32)
    for step in range(values.steps - 1):
        here, following = sigmas[step : step + 2]
        t = sampling.transition("ddim", x, velocity(x, here, prompt), here, following, 1.0, sigmas[1])
        z = rng.standard_normal((len(captions), count, *SHAPE)).astype(np.float32)
        outcomes = np.asarray(t.mean)[:, None] + float(np.ravel(t.std)[0]) * z
        noisy = outcomes.reshape(-1, *SHAPE)
        jump = sampling.clean(noisy, velocity(noisy, following, prompts), following)
        final = noisy
        for place in range(step + 1, values.steps):
            final = final + (sigmas[place + 1] - sigmas[place]) * np.asarray(velocity(final, sigmas[place], prompts))
        worths = np.reshape([worth(text, row) for text, row in zip(texts, final)], (-1, count))
        differ = np.ptp(worths, axis=1) > 0
        x = outcomes[np.arange(len(captions)), rng.integers(0, count, len(captions))]
        if not differ.any():
            print(f"{here:.2f} to {following:.2f}: no pictures differ")
            continue
        spread = worths.std(axis=1).mean()
        print(f"{here:.2f} to {following:.2f}: {100 * differ.mean():.0f} % of states differ, by {spread:.2f}")
        shared = np.repeat(rng.standard_normal((len(captions), 1, *SHAPE)), count, axis=1).reshape(noisy.shape)
        of_clean = {
            name: np.float32((1 - values.sigma) * latents + values.sigma * shared)
            for name, latents in (("jump", jump), ("final", final))
        }
        for path, score in scorers.items():
            said = []
            for name in ("noisy", "jump", "final"):
                latents, level = (noisy, following) if name == "noisy" else (of_clean[name], values.sigma)
                scores = np.reshape(score(latents, level, prompts), worths.shape)
                related = [np.corrcoef(s, w)[0, 1] for s, w in zip(scores[differ], worths[differ])]
                rows = np.arange(len(captions))
                gain = worths[rows, scores.argmax(axis=1)] - worths[rows, scores.argmin(axis=1)]
                error = gain.std() / np.sqrt(len(gain))
                said.append(f"{name} {np.nanmean(related):.2f}, {gain.mean():+.2f} (error {error:.2f})")
            print(f"    {path}: {'; '.join(said)}", flush=True)


if __name__ == "__main__":
    flags.DEFINE_string("run", "runs/quickstart_align_reward", "Workdir of the run that trained the generator.")
    flags.DEFINE_list("rewards", ["runs/quickstart_align_reward/model"], "Reward models on that generator.")
    flags.DEFINE_integer("captions", 100, "Not those held out.", lower_bound=1)
    flags.DEFINE_integer("candidates", 6, "Outcomes of a state.", lower_bound=2)
    flags.DEFINE_integer("steps", 12, "Of the sampler.", lower_bound=3)
    flags.DEFINE_float("sigma", 0.2, "The level that clean latents are scored at.")
    flags.DEFINE_integer("seed", 3, "Of captions and noise.")
    app.run(main)
