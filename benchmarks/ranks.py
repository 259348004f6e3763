"""Whether a model ranks alike in bfloat16, and with int8 weights, as in float32.

    python -m benchmarks.ranks [--checkpoint runs/quickstart/model --records runs/quickstart/data]

Scores rows at single levels and as an ensemble, with the same noise: of a model's held-out records or, without a
checkpoint, of the golden model 512 random latents under 32 prompts. Prints for each dtype the largest deviation from
float32 beside the scores' standard deviation, Spearman's rank correlation, and the share of pairs of rows under one
prompt (of records: the held-out pairs) whose order is the same.
"""

import dataclasses
import itertools
import pathlib

import jax
import numpy as np
from absl import app, flags
from scipy import stats

import dinalrm_jax as dina
from dinalrm_jax.data.records import Records
from dinalrm_jax.devices.compilation import enable_compilation_cache
from dinalrm_jax.model.quantization import quantized
from dinalrm_jax.model.reward import is_trainable

GOLDEN = pathlib.Path(__file__).parent.parent / "tests" / "golden" / "released-tiny"
LEVELS: tuple[float | tuple[float, ...], ...] = (0.0, 0.2, 0.4, 0.6, (0.2, 0.5, 0.7))
PROMPTS, IMAGES, BATCH = 32, 16, 64


def random_rows(spec) -> tuple[np.ndarray, dina.PromptEmbeds, np.ndarray]:
    """Latents, their prompts, and the pairs (P, 2) of rows under one prompt."""
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((PROMPTS * IMAGES, 16, 16, spec.channels)).astype(np.float32)
    embeds = rng.standard_normal((PROMPTS, 20, spec.text_width)).astype(np.float32)
    pooled = rng.standard_normal((PROMPTS, spec.pooled_width)).astype(np.float32)
    within = np.array(list(itertools.combinations(range(IMAGES), 2)))
    pairs = (np.arange(0, len(latents), IMAGES)[:, None, None] + within).reshape(-1, 2)
    return latents, dina.PromptEmbeds(*(np.repeat(x, IMAGES, axis=0) for x in (embeds, pooled))), pairs


def held_out_rows(directory: str) -> tuple[np.ndarray, dina.PromptEmbeds, np.ndarray]:
    records = Records(directory)
    found = list(records.pairs("eval"))
    rows = [(image, pair.prompt) for pair in found for image in (pair.chosen, pair.rejected)]
    prompts = [records.prompts[prompt] for _, prompt in rows]
    embeds = dina.PromptEmbeds(
        np.stack([p.prompt_embeds for p in prompts]), np.stack([p.pooled_prompt_embeds for p in prompts])
    )
    latents = np.stack([records.images[image].latents for image, _ in rows]).astype(np.float32)
    return latents, embeds, np.arange(len(rows)).reshape(-1, 2)


def main(argv: list[str]) -> None:
    values = flags.FLAGS
    enable_compilation_cache()
    arguments = (values.checkpoint,) if values.checkpoint else (GOLDEN, GOLDEN)
    exact = dina.RewardModel.from_pretrained(*arguments, dtype="float32")
    spec = exact.config.transformer.latents
    latents, prompt, pairs = held_out_rows(values.records) if values.checkpoint else random_rows(spec)
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}; {len(latents)} rows, {len(pairs)} pairs")

    def scores(model, level):
        parts = [slice(start, start + BATCH) for start in range(0, len(latents), BATCH)]
        return np.concatenate([model.score_latents(latents[rows], prompt[rows], level) for rows in parts])

    expected = {level: scores(exact, level) for level in LEVELS}
    models = {"bfloat16": dina.RewardModel.from_pretrained(*arguments, dtype="bfloat16")}
    # What `from_pretrained(dtype="int8")` gives on a CPU, and elsewhere.
    for dtype in ("float32", "bfloat16"):
        model = dina.RewardModel.from_pretrained(*arguments, dtype=dtype)
        rounded = quantized(dict(model.params), lambda name: not is_trainable(name))
        models[f"int8, computed in {dtype}"] = dataclasses.replace(model, params=rounded)
    for name, model in models.items():
        for level in LEVELS:
            found, wanted = scores(model, level), expected[level]
            same = np.mean(np.sign(np.diff(found[pairs])) == np.sign(np.diff(wanted[pairs])))
            print(
                f"{name}, sigma {level}: at most {np.abs(found - wanted).max():.4f} off, of a deviation of "
                f"{wanted.std():.3f}; rank correlation {stats.spearmanr(found, wanted).statistic:.5f}; "
                f"{100 * same:.2f} % of pairs in the same order",
                flush=True,
            )


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "A reward model; the golden one if not given.")
    flags.DEFINE_string("records", None, "Whose held-out pairs it scores.")
    app.run(main)
