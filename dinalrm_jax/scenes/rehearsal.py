"""A whole input for rehearsals, made from nothing: a random, tiny SD3 pipeline and HPDv3-layout data.

Both are in the published layouts, file for file, so that what runs on them is the very path that
runs on the published ones. Nothing here is trained: the pipeline's weights are noise.
"""

import dataclasses
import functools
import json
import math
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from dinalrm_jax.disk import whole_directory
from dinalrm_jax.encoders.clip import CLIPTextConfig, CLIPTextModel
from dinalrm_jax.encoders.t5 import T5Config, T5Encoder
from dinalrm_jax.encoders.vae import AutoencoderKL, VAEConfig
from dinalrm_jax.mapping import ConfigError, to_mapping
from dinalrm_jax.model import tables
from dinalrm_jax.model.backbone.family import BackboneConfig
from dinalrm_jax.model.backbone.sd3.config import SD3Config
from dinalrm_jax.model.backbone.sd3.transformer import SD3Transformer
from dinalrm_jax.model.backbone.sd3.weights import table
from dinalrm_jax.model.parameters import functional
from dinalrm_jax.scenes import draw
from dinalrm_jax.scenes.config import TWO_GROUPS
from dinalrm_jax.weights.files import save_safetensors

SHAPES = ((64, 64), (96, 64), (64, 96))  # height, width of the images, in turn
CLIP_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
CLIP_L = CLIPTextConfig(
    vocab_size=516, hidden_size=16, intermediate_size=32, projection_dim=12, num_hidden_layers=3,
    num_attention_heads=2, hidden_act="quick_gelu", eos_token_id=2,
)  # fmt: skip
CLIP_G = dataclasses.replace(
    CLIP_L, hidden_size=24, intermediate_size=48, projection_dim=20, num_attention_heads=3, hidden_act="gelu"
)
T5 = T5Config(vocab_size=128, d_model=48, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
VAE = VAEConfig(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4)
TRANSFORMER = SD3Config(
    sample_size=16, num_layers=3, num_attention_heads=2, attention_head_dim=16, joint_attention_dim=T5.d_model,
    caption_projection_dim=32, pooled_projection_dim=CLIP_L.projection_dim + CLIP_G.projection_dim,
    pos_embed_max_size=24, dual_attention_layers=(0,),
)  # fmt: skip


def write_pipeline(directory: str | pathlib.Path, seed: int = 0, transformer: BackboneConfig = TRANSFORMER) -> None:
    """Writes a random SD3 pipeline that diffusers and transformers load; whole or not at all.

    Raises:
        ConfigError: a transformer of another family.
    """
    if not isinstance(transformer, SD3Config):
        raise ConfigError(
            f"a rehearsal writes an SD3 pipeline, model.transformer is a {type(transformer).__name__}; leave out "
            "rehearsal and name the data"
        )
    with whole_directory(directory) as partial:
        components = {
            "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
            "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
            "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
            "text_encoder_3": ("transformers", "T5EncoderModel"),
            "tokenizer": ("transformers", "CLIPTokenizer"),
            "tokenizer_2": ("transformers", "CLIPTokenizer"),
            "tokenizer_3": ("transformers", "T5TokenizerFast"),
            "transformer": ("diffusers", "SD3Transformer2DModel"),
            "vae": ("diffusers", "AutoencoderKL"),
        }
        for name in components:
            (partial / name).mkdir()
        _write_json(partial / "model_index.json", {"_class_name": "StableDiffusion3Pipeline", **components})
        scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
        _write_json(partial / "scheduler" / "scheduler_config.json", scheduler)
        for name, config in (("text_encoder", CLIP_L), ("text_encoder_2", CLIP_G)):
            clip: dict[str, Any] = {"architectures": ["CLIPTextModelWithProjection"], "model_type": "clip_text_model"}
            # As published: the ids of another vocabulary, which nothing reads.
            clip |= {"bos_token_id": 0, "pad_token_id": 1}
            _write_module(
                partial / name, "model", lambda rngs, c=config: CLIPTextModel(c, rngs=rngs), config, clip, seed
            )
        t5 = {"architectures": ["T5EncoderModel"], "model_type": "t5", "tie_word_embeddings": False}
        _write_module(partial / "text_encoder_3", "model", functools.partial(T5Encoder, T5), T5, t5, seed)
        # diffusers names the blocks of an autoencoder; ours has no other kinds.
        depth = len(VAE.block_out_channels)
        vae: dict[str, Any] = {"_class_name": "AutoencoderKL", "down_block_types": depth * ["DownEncoderBlock2D"]}
        vae |= {"up_block_types": depth * ["UpDecoderBlock2D"], "force_upcast": True}
        stem = "diffusion_pytorch_model"
        _write_module(partial / "vae", stem, functools.partial(AutoencoderKL, VAE), VAE, vae, seed)
        _write_module(
            partial / "transformer",
            stem,
            functools.partial(SD3Transformer, transformer),
            transformer,
            {"_class_name": "SD3Transformer2DModel"},
            seed,
            table(transformer),
        )
        _write_clip_tokenizer(partial / "tokenizer", pad="<|endoftext|>")
        _write_clip_tokenizer(partial / "tokenizer_2", pad="!")
        _write_t5_tokenizer(partial / "tokenizer_3")


def _write_module(directory, stem, build, config, extra, seed, table=tables.IDENTITY) -> None:
    _write_json(directory / "config.json", {**extra, **to_mapping(config)})
    module = functional(lambda rngs: build(rngs=rngs))
    params: dict[str, Any] = module.init(seed, lambda name: name.endswith(".pos_embed"))  # a table, no weights
    # All others are drawn, so that nothing can hide behind an identity or a zero; by NumPy, which compiles nothing.
    rng = np.random.default_rng(seed)
    for name, shape in module.shapes.items():
        if name not in params:
            drawn = rng.standard_normal(shape.shape).astype(np.float32)
            is_scale = len(shape.shape) == 1 and name.endswith("weight")
            params[name] = 1 + 0.2 * drawn if is_scale else drawn * np.float32(_spread(shape.shape))
    save_safetensors(directory / f"{stem}.safetensors", tables.dump(params, table))


def _spread(shape: tuple[int, ...]) -> float:
    """The standard deviation of weights (out, in, ...), that of PyTorch's layers; of biases a fifth."""
    return 0.2 if len(shape) == 1 else (3 * math.prod(shape[1:])) ** -0.5


def _write_clip_tokenizer(directory: pathlib.Path, pad: str) -> None:
    """CLIP's byte-pair tokenizer with the bytes, the bytes that end a word, and two merges."""
    characters = _byte_characters()
    words = [*characters, *(c + "</w>" for c in characters), "re", "re" + "d</w>", *CLIP_SPECIAL]
    vocabulary = {word: index for index, word in enumerate(words)}
    _write_json(directory / "vocab.json", vocabulary)
    (directory / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    start, end = CLIP_SPECIAL
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": pad}
    _write_json(directory / "special_tokens_map.json", special)
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **special}
    _write_json(directory / "tokenizer_config.json", config)


def _byte_characters() -> list[str]:
    """The printable character that byte-level tokenizers write for each byte; "!" is the first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def _write_t5_tokenizer(directory: pathlib.Path) -> None:
    """A unigram tokenizer over letters, with T5's special tokens and its end mark."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(chr(code), -4.0) for code in range(33, 127)] + [("▁red", -5.0), ("ing", -5.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(directory / "tokenizer.json"))
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    config = {"tokenizer_class": "T5TokenizerFast", "model_max_length": 512, "extra_ids": 0, **special}
    _write_json(directory / "tokenizer_config.json", config)
    _write_json(directory / "special_tokens_map.json", special)


def _write_json(path: pathlib.Path, value) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def write_hpdv3(directory: str | pathlib.Path, train_pairs: int, eval_pairs: int, seed: int = 0) -> None:
    """Writes scenes as an HPDv3 directory: JSON files with votes and without, JPEG images of several shapes."""
    with whole_directory(directory) as partial:
        (partial / "images").mkdir()
        for split, file, count in (("train", "train.json", train_pairs), ("eval", "test.json", eval_pairs)):
            rows = []
            for number, pair in enumerate(
                draw.scene_pairs(count, 64, seed, held_out=split == "eval", by="combinations", two_groups=TWO_GROUPS)
            ):
                height, width = SHAPES[number % len(SHAPES)]
                names = [f"images/{split}-{number:06d}-{role}.jpg" for role in ("chosen", "rejected")]
                for name, pixels in zip(names, (pair.chosen, pair.rejected)):
                    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)
                    image.save(partial / name, quality=90)
                row: dict[str, Any] = {"prompt": pair.caption, "path1": names[0], "path2": names[1]}
                row |= {"model1": "flux", "model2": "sdxl"}
                if split == "train":
                    annotated = number % 3 != 0
                    row |= {"choice_dist": [12, 7] if annotated else None, "confidence": 0.99 if annotated else None}
                rows.append(row)
            _write_json(partial / file, rows)
