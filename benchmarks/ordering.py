"""How well a reward orders a generator's pictures of ONE caption, by the rules for drawn scenes.

    python -m benchmarks.ordering --run runs/quickstart_align_reward [--captions 70] [--count 8] [--steps 12]

The generator of the run draws `count` pictures of each held-out caption; the run's reward model scores them at single
levels and as an ensemble, and `scenes.verify` says what they are worth. Prints, for each level, the mean over captions
of the correlation (Pearson's; of captions whose pictures differ in worth), the share of correct pictures among those
that the reward ranks first, and how much of the way from a mean picture's worth to the best one's that is.
"""

import pathlib

import numpy as np
from absl import app, flags

import dinalrm_jax as dina
from dinalrm_jax.devices.compilation import enable_compilation_cache
from dinalrm_jax.scenes.draw import draw_captions
from dinalrm_jax.scenes.samples import worth
from dinalrm_jax.training.workdir import read_claim

LEVELS: tuple[float | tuple[float, ...], ...] = (0.0, 0.2, 0.4, 0.6, 0.8, (0.2, 0.5, 0.7))


def main(argv: list[str]) -> None:
    values = flags.FLAGS
    enable_compilation_cache()
    run = pathlib.Path(values.run)
    generator = dina.Generator.from_pretrained(run / "generator" / "backbone", dtype="float32")
    model = dina.RewardModel.from_pretrained(run / "model", dtype="float32")
    scenes = read_claim(run).config.scenes
    captions = draw_captions(values.captions, values.seed, held_out=not values.seen, two_groups=scenes.two_groups)
    texts = [caption for caption in captions for _ in range(values.count)]
    latents = generator.sample(texts, (64, 64), values.steps, 1.0, seed=1000 + values.seed, batch_size=64)
    shape = (len(captions), values.count)
    worths = np.reshape([worth(text, row) for text, row in zip(texts, latents)], shape)
    correct = worths == 5
    differ = np.ptp(worths, axis=1) > 0
    mean, best = worths.mean(), worths.max(axis=1).mean()
    print(f"{shape[0]} captions x {shape[1]} pictures; correct {100 * correct.mean():.1f} %, of the best "
          f"{100 * correct.any(axis=1).mean():.1f} %; worth {mean:.2f}, of the best {best:.2f}")  # fmt: skip
    for level in LEVELS:
        scores = np.concatenate(
            [
                model.score_latents(latents[rows], model.encode_prompt(texts[rows]), sigma=level)
                for rows in (slice(start, start + 128) for start in range(0, len(texts), 128))
            ]
        ).reshape(shape)
        related = [np.corrcoef(s, w)[0, 1] for s, w in zip(scores[differ], worths[differ])]
        first = np.arange(len(captions)), scores.argmax(axis=1)
        closed = (worths[first].mean() - mean) / (best - mean)
        said = f"first correct {100 * correct[first].mean():.1f} %, {100 * closed:.0f} % of the way"
        print(f"sigma {level}: correlation {np.mean(related):.3f}; {said}", flush=True)


if __name__ == "__main__":
    flags.DEFINE_string("run", "runs/quickstart_align_reward", "Workdir of the training run.")
    flags.DEFINE_integer("captions", 70, "Held-out captions.", lower_bound=1)
    flags.DEFINE_integer("count", 8, "Pictures of each.", lower_bound=2)
    flags.DEFINE_integer("steps", 12, "Of the sampler.", lower_bound=1)
    flags.DEFINE_integer("seed", 7, "Of captions and pictures.")
    flags.DEFINE_bool("seen", False, "Captions that training saw, in the place of held-out ones.")
    app.run(main)
