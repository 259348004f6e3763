"""Samples images of prompts.

    python -m dinalrm_jax.generate --base-model B --prompt "a red fox in the snow" --output runs/fox
    python -m dinalrm_jax.generate --base-model B --prompts prompts.txt --count 4 --checkpoint C --output runs/best

Writes a PNG an image, with prompt, seed and settings among its texts, and sheet.png, all images of every prompt
beside each other. B is a pipeline in diffusers layout (a directory or hub id), or the generator of a training run
(WORKDIR/generator/backbone). --policy adds what `align` tuned, or any LoRA in PEFT's or diffusers' layout. With
--checkpoint a reward model ranks each prompt's images: files are numbered from best to worst, and ranking.csv has
the scores. An image depends on its prompt, the seed and its number, not on the batch it is computed in. On several
hosts (--distributed) each process takes a part of the prompts.
"""

from dinalrm_jax.cli.command import answer_help, run_command
from dinalrm_jax.cli.options import GenerateOptions

answer_help(__name__, __doc__, GenerateOptions)  # before the imports that take a second

import pathlib
import re

import jax
import numpy as np
from tqdm import tqdm

from dinalrm_jax.data.buckets import parse_bucket
from dinalrm_jax.data.generated import save_generated
from dinalrm_jax.devices import processes
from dinalrm_jax.devices.compilation import enable_compilation_cache
from dinalrm_jax.encoders.taesd3 import Preview
from dinalrm_jax.evaluation.ranking import ScoredImage, as_csv, draw_sheet
from dinalrm_jax.evaluation.scoring import normalize, ranks
from dinalrm_jax.generator import Generator, numbered
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.tables import WeightsError
from dinalrm_jax.reward_model import RewardModel


def read_prompts(options: GenerateOptions) -> list[str]:
    """The prompts of the flags or of the file, a line each.

    Raises:
        ConfigError: an empty prompt, or none at all.
    """
    prompts = list(options.prompt)
    if options.prompts is not None:
        prompts += pathlib.Path(options.prompts).read_text().rstrip().splitlines()
    where = options.prompts or "--prompt"
    if not prompts:
        raise ConfigError(f"{where} holds no prompt; write one a line")
    if empty := [number for number, prompt in enumerate(prompts, 1) if not prompt.strip()]:
        line = f", line {empty[0]}" if options.prompts is not None else ""
        raise ConfigError(f"{where}{line} holds an empty prompt; write what the image is to show")
    return prompts


def file_name(index: int, prompt: str, number: int) -> str:
    """ "0003-a-red-fox-01.png": the prompt's place, its first words, the image's number."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:40].strip("-")
    return f"{index:04d}-{words}-{number:02d}.png"


def scores_of(model: RewardModel, prompts: list[str], latents: np.ndarray, options: GenerateOptions) -> list[float]:
    """Of every latent under its prompt, at the levels of the token-level ensemble."""
    found = []
    for start in range(0, len(prompts), options.batch_size):
        some = slice(start, start + options.batch_size)
        found.append(model.score_latents(latents[some], model.encode_prompt(prompts[some]), sigma=options.levels))
    return np.concatenate(found).tolist()


def save_images(
    options: GenerateOptions, prompts: list[str], places: list[int], numbers: list[int], images: np.ndarray, scores
) -> list[ScoredImage]:
    """Writes the images, prompt by prompt, the best first where there are scores; their rows."""
    output, rows = pathlib.Path(options.output), []
    for place in dict.fromkeys(places):
        members = [row for row, each in enumerate(places) if each == place]
        order = ranks([scores[row] for row in members]) if scores is not None else range(1, len(members) + 1)
        for rank, row in sorted(zip(order, members)):
            path = output / file_name(place, prompts[row], rank)
            made = {
                "prompt": prompts[row], "negative_prompt": options.negative_prompt, "seed": options.seed,
                "number": numbers[row], "steps": options.steps, "guidance": options.guidance,
                "text_length": options.text_length, "base_model": options.base_model, "policy": options.policy,
                "preview": options.preview,
                "score": None if scores is None else scores[row],
            }  # fmt: skip
            save_generated(path, images[row], made)
            score = 0.0 if scores is None else scores[row]
            rows.append(ScoredImage(rank, score, str(path), prompts[row], None, float(normalize(score))))
    return rows


def main(options: GenerateOptions) -> None:
    """Samples, ranks and writes what the options name."""
    processes.initialize(options.distributed)
    enable_compilation_cache()
    output, prompts = pathlib.Path(options.output), read_prompts(options)
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"{output} exists already and is not empty; choose another output or remove it first")
    processes.barrier("output")  # before any of them makes it
    size = None if options.size is None else parse_bucket(options.size)
    generator = Generator.from_pretrained(options.base_model, options.policy, options.dtype)
    model = None if options.checkpoint is None else RewardModel.from_pretrained(
        options.checkpoint, options.base_model, options.dtype
    )  # fmt: skip
    preview = None if options.preview is None else Preview(options.preview)
    if cut := generator.cut_prompts(prompts, options.text_length):
        processes.say(
            f"{len(cut)} of {len(prompts)} prompts are longer than the text encoders read, and are cut (--text-length "
            f"reads more of them): the first is {prompts[cut[0]][:60]!r}"
        )
    everything = [place for place in range(len(prompts)) for _ in range(options.count)]
    numbers = numbered([prompts[place] for place in everything])
    mine = [row for row, place in enumerate(everything) if place % jax.process_count() == jax.process_index()]
    places, texts = [everything[row] for row in mine], [prompts[everything[row]] for row in mine]
    if not texts:
        return
    with tqdm(total=len(texts), desc="sampling", unit="image") as bar:
        latents = generator.sample(
            texts, size, options.steps, options.guidance, options.seed, negative_prompts=options.negative_prompt,
            text_length=options.text_length, numbers=[numbers[row] for row in mine], batch_size=options.batch_size,
            keep_encoders=model is not None, progress=bar.update,
        )  # fmt: skip
    scores = None if model is None else scores_of(model, texts, latents, options)
    images = (
        generator.decode(latents, options.batch_size)
        if preview is None
        else preview.decode(latents, options.batch_size)
    )
    output.mkdir(parents=True, exist_ok=True)
    rows = save_images(options, texts, places, [numbers[row] for row in mine], images, scores)
    several = f"_{jax.process_index()}" if jax.process_count() > 1 else ""
    draw_sheet(output / f"sheet{several}.png", rows, scored=scores is not None)
    if scores is not None:
        (output / f"ranking{several}.csv").write_text(as_csv(rows))
    print(f"wrote {len(rows)} images to {output}")


if __name__ == "__main__":
    run_command(
        main,
        GenerateOptions,
        errors=(ConfigError, WeightsError, ValueError, OSError),
        interrupted="nothing was written",
        leave=processes.leave,
    )
