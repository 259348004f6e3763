"""The quickstart's scenes as records, through the tiny encoders."""

import pathlib

from tqdm import tqdm

from dinalrm_jax.data import records
from dinalrm_jax.encoders import tiny
from dinalrm_jax.mapping import ConfigError, to_mapping
from dinalrm_jax.model.encoding import EncodersConfig
from dinalrm_jax.scenes import draw
from dinalrm_jax.scenes.config import ScenesConfig


def write_scene_records(directory: str | pathlib.Path, config: ScenesConfig, encoders: EncodersConfig) -> None:
    """Draws, encodes and writes the training and held-out pairs; whole or not at all.

    Raises:
        ConfigError: encoders other than the tiny ones, or such as cut the captions short.
    """
    if encoders.kind != "tiny":
        raise ConfigError(f"scenes are encoded by the tiny encoders; model.encoders.kind is {encoders.kind!r}")
    longest = draw.WORDS if config.two_groups == 0 else 2 * draw.WORDS + 1
    if encoders.text_length < longest:
        raise ConfigError(
            f"these scenes' captions have up to {longest} words, of which the encoders read {encoders.text_length}; "
            "set model.encoders.text_length"
        )
    images: list[records.ImageRecord] = []
    prompts: dict[str, int] = {}
    pairs: dict[str, list[records.PairRecord]] = {}
    with tqdm(total=config.train_pairs + config.eval_pairs, desc="drawing scenes", unit="pair") as bar:
        for split, count in (("train", config.train_pairs), ("eval", config.eval_pairs)):
            pairs[split] = []
            for pair in draw.scene_pairs(
                count,
                config.image_size,
                config.seed,
                held_out=split == "eval",
                by=config.held_out,
                two_groups=config.two_groups,
            ):
                for role in ("chosen", "rejected"):
                    name = f"{split}/{len(pairs[split])}/{role}"
                    images.append(records.ImageRecord(tiny.encode_image(getattr(pair, role)), name))
                prompt = prompts.setdefault(pair.caption, len(prompts))
                pairs[split].append(records.PairRecord(len(images) - 2, len(images) - 1, prompt, pair.kind))
                bar.update()
    texts = list(prompts)
    embeds, pooled = tiny.encode_prompts(texts, encoders.text_length, tiny.TEXT_WIDTH)
    records.write(
        directory,
        images=images,
        prompts=[records.PromptRecord(text, embeds[i], pooled[i]) for i, text in enumerate(texts)],
        pairs=pairs,
        encoders=encoders,
        downsampling=tiny.BLOCK,
        source={"scenes": to_mapping(config)},
    )
