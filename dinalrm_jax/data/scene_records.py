"""The quickstart's scenes as records, through the tiny encoders."""

import pathlib

from tqdm import tqdm

from dinalrm_jax.config import ScenesConfig, to_mapping
from dinalrm_jax.data import records, synthetic, tiny_encoders

TEXT_LENGTH, TEXT_WIDTH = 16, 64


def tiny_manifest(length: int, **source) -> dict:
    """What `records.write` puts down for the tiny encoders."""
    return {
        "codec": {"name": "tiny_dct", "channels": tiny_encoders.CHANNELS},
        "text": {"name": "hashed_words", "length": length, "width": TEXT_WIDTH},
        "source": source,
    }


def write_scene_records(directory: str | pathlib.Path, config: ScenesConfig) -> None:
    """Draws, encodes and writes the training and held-out pairs; whole or not at all."""
    images: list[records.ImageRecord] = []
    prompts: dict[str, int] = {}
    pairs: dict[str, list[records.PairRecord]] = {}
    with tqdm(total=config.train_pairs + config.eval_pairs, desc="drawing scenes", unit="pair") as bar:
        for split, count in (("train", config.train_pairs), ("eval", config.eval_pairs)):
            pairs[split] = []
            for pair in synthetic.scene_pairs(count, config.image_size, config.seed, held_out=split == "eval"):
                for role in ("chosen", "rejected"):
                    name = f"{split}/{len(pairs[split])}/{role}"
                    images.append(records.ImageRecord(tiny_encoders.encode_image(getattr(pair, role)), name))
                prompt = prompts.setdefault(pair.caption, len(prompts))
                pairs[split].append(records.PairRecord(len(images) - 2, len(images) - 1, prompt, pair.kind))
                bar.update()
    records.write(
        directory,
        images=images,
        prompts=prompt_records(list(prompts), TEXT_LENGTH),
        pairs=pairs,
        manifest=tiny_manifest(TEXT_LENGTH, scenes=to_mapping(config)),
    )


def prompt_records(prompts: list[str], length: int) -> list[records.PromptRecord]:
    """Texts with their tiny embeddings."""
    embeds, pooled = tiny_encoders.encode_prompts(prompts, length, TEXT_WIDTH)
    return [records.PromptRecord(text, embeds[i], pooled[i]) for i, text in enumerate(prompts)]
