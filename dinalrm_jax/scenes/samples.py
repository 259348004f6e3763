"""Preference pairs as real sets have them: of one caption, pictures by a generator, ordered as people would.

Beside a generator's samples stand a true scene and a broken one: latents that are blank, bleached, scaled up or
speckled, which a reward model that never saw them may well like, and a policy then finds.
"""

import itertools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from tqdm import tqdm

from dinalrm_jax.data import records
from dinalrm_jax.encoders import tiny
from dinalrm_jax.mapping import to_mapping
from dinalrm_jax.model.encoding import EncodersConfig
from dinalrm_jax.scenes import draw
from dinalrm_jax.scenes.config import SamplesConfig
from dinalrm_jax.scenes.verify import verify

BROKEN = ("blank", "bleached", "scaled", "speckled")
BROKEN_WORTH = -1.0
CAPTIONS = 64  # that are sampled at once, so that the bar moves

# (captions, their images' numbers, steps) -> latents (B, H/8, W/8, 16): an image depends on caption, number and steps.
Sample = Callable[[Sequence[str], Sequence[int], int], np.ndarray]


def worth(caption: str, latents: np.ndarray) -> float:
    """What a picture is worth to its caption, from 0 to 5: what it shows of four respects, and 1 for all of them."""
    verdict = verify(caption, tiny.decode_latents(latents))
    return 4 * verdict.share + verdict.correct


def broken(latents: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Latents (h, w, C) that no one likes."""
    if kind == "blank":
        return np.broadcast_to(latents.mean(axis=(0, 1)), latents.shape) + 0.02 * rng.standard_normal(latents.shape)
    if kind == "bleached":
        return 0.25 * latents + 0.75 * tiny.encode_image(np.full((_side(latents), _side(latents), 3), 255, np.uint8))
    if kind == "scaled":
        return latents * rng.uniform(1.4, 2.2)
    return latents + rng.uniform(0.25, 0.6) * rng.standard_normal(latents.shape)


def sample_captions(config: SamplesConfig, two_groups: float) -> dict[str, list[str]]:
    """What the generator draws, by split; `two_groups` as of its scenes.

    Raises:
        ConfigError: there are hardly so many.
    """
    counts = {"train": config.train_captions, "eval": config.eval_captions}
    return {
        split: draw.draw_captions(count, config.seed, held_out=split == "eval", two_groups=two_groups)
        for split, count in counts.items()
    }


def write_sample_records(
    directory: str | pathlib.Path,
    config: SamplesConfig,
    captions: Mapping[str, Sequence[str]],
    encoders: EncodersConfig,
    sample: Sample,
) -> None:
    """Samples, judges and writes the pairs; whole or not at all.

    Pairs are drawn evenly among those of a caption's round whose pictures differ in worth.

    Args:
        directory: of the records.
        config: how many of what.
        captions: of `sample_captions`.
        encoders: of the captions, the tiny ones.
        sample: the generator.
    """
    images: list[records.ImageRecord] = []
    prompts: list[str] = []
    pairs: dict[str, list[records.PairRecord]] = {"train": [], "eval": []}
    total = config.rounds * sum(map(len, captions.values()))
    with tqdm(total=total, desc="judging samples", unit="round") as bar:
        for split, texts in captions.items():
            for place, number, samples in _rounds(texts, config, sample):
                prompt = len(prompts) + place
                rng = np.random.default_rng([config.seed, prompt, number])
                members = _members(texts[place], samples, rng)
                first = len(images)
                for kind, latents, _ in members:
                    name = f"{split}/{prompt}/{number}/{len(images) - first}-{kind}"
                    images.append(records.ImageRecord(latents.astype(np.float32), name))
                for chosen, rejected in _compared(members, config, rng):
                    kind = f"{members[chosen][0]}/{members[rejected][0]}"
                    pairs[split].append(records.PairRecord(first + chosen, first + rejected, prompt, kind))
                bar.update()
            prompts += texts
    embeds, pooled = tiny.encode_prompts(prompts, encoders.text_length, tiny.TEXT_WIDTH)
    records.write(
        directory,
        images=images,
        prompts=[records.PromptRecord(text, embeds[i], pooled[i]) for i, text in enumerate(prompts)],
        pairs=pairs,
        encoders=encoders,
        downsampling=tiny.BLOCK,
        source={"samples": to_mapping(config)},
    )


def _side(latents: np.ndarray) -> int:
    """Of the square picture that latents (h, w, C) are, in pixels."""
    return tiny.BLOCK * len(latents)


def _rounds(captions: Sequence[str], config: SamplesConfig, sample: Sample) -> Iterator[tuple[int, int, np.ndarray]]:
    """(place of a caption, number of a round, its samples), of all captions and rounds."""
    for number, start in itertools.product(range(config.rounds), range(0, len(captions), CAPTIONS)):
        drawn = _sampled(captions[start : start + CAPTIONS], number, config.steps, sample)
        for place, samples in enumerate(drawn, start):
            yield place, number, samples


def _sampled(captions: Sequence[str], round_number: int, steps: Sequence[int], sample: Sample) -> np.ndarray:
    """(captions, samples, h, w, C) of a round, as many steps each as asked for."""
    by_number = {}
    for wanted in dict.fromkeys(steps):
        numbers = [number for number, each in enumerate(steps) if each == wanted]
        rows = list(itertools.product(captions, numbers))
        first = round_number * len(steps)
        found = sample([caption for caption, _ in rows], [first + number for _, number in rows], wanted)
        by_number |= dict(zip(numbers, found.reshape(len(captions), len(numbers), *found.shape[1:]).swapaxes(0, 1)))
    return np.stack([by_number[number] for number in range(len(steps))], axis=1)


def _members(caption: str, samples: np.ndarray, rng: np.random.Generator) -> list[tuple[str, np.ndarray, float]]:
    """(kind, latents, worth) of a round's pictures."""
    scene = tiny.encode_image(draw.render(draw.parse(caption), _side(samples[0]), rng))
    spoiled = broken(scene if rng.random() < 0.5 else samples[0], str(rng.choice(BROKEN)), rng)
    judged = [("sample", latents, worth(caption, latents)) for latents in samples]
    return [*judged, ("scene", scene, worth(caption, scene)), ("broken", spoiled, BROKEN_WORTH)]


def _compared(members, config: SamplesConfig, rng: np.random.Generator) -> list[tuple[int, int]]:
    """(chosen, rejected) of a round's pairs, whose order errs where worths lie near each other."""
    differ = [
        pair for pair in itertools.combinations(range(len(members)), 2) if members[pair[0]][2] != members[pair[1]][2]
    ]
    rng.shuffle(differ)
    ordered = []
    for one, other in differ[: config.pairs]:
        gap = members[one][2] - members[other][2] + np.sqrt(2) * config.error * rng.standard_normal()
        ordered.append((one, other) if gap > 0 else (other, one))
    return ordered
