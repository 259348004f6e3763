"""Text encoders and VAE of a diffusers Stable Diffusion 3 pipeline directory.

    DIRECTORY/model_index.json
    DIRECTORY/{text_encoder,text_encoder_2,text_encoder_3,vae}/config.json and safetensors
    DIRECTORY/{tokenizer,tokenizer_2,tokenizer_3}/

Our modules carry the files' names and PyTorch's layouts, so every table is the identity.
"""

import hashlib
import json
import pathlib
from typing import TypeVar

import numpy as np

from dinalrm_jax.encoders.clip import CLIPTextConfig, CLIPTextModel
from dinalrm_jax.encoders.t5 import T5Config, T5Encoder
from dinalrm_jax.encoders.vae import AutoencoderKL, VAEConfig
from dinalrm_jax.mapping import ConfigError, from_known
from dinalrm_jax.model import tables
from dinalrm_jax.model.parameters import Functional, functional
from dinalrm_jax.weights.files import SafetensorsDirectory, read_json, resolve

PIPELINE_CLASS = "StableDiffusion3Pipeline"
TEXT_FILES = ("model_index.json", "text_encoder*/*", "tokenizer*/*")
VAE_FILES = ("model_index.json", "vae/*")

C = TypeVar("C")
Loaded = tuple[Functional, dict[str, np.ndarray]]


def open_pipeline(base_model: str | pathlib.Path, files: tuple[str, ...]) -> pathlib.Path:
    """The directory of an SD3 pipeline; `files` are what is fetched where it is a hub id.

    Raises:
        FileNotFoundError: no such directory or repository.
        ConfigError: a pipeline of another family.
    """
    directory = resolve(base_model, files)
    if not (directory / "model_index.json").is_file():
        raise ConfigError(
            f"{base_model} has no model_index.json: text encoders and VAE are read from a whole diffusers pipeline "
            "directory, such as that of stabilityai/stable-diffusion-3.5-medium"
        )
    found = read_json(directory / "model_index.json").get("_class_name")
    if found != PIPELINE_CLASS:
        raise ConfigError(f"{base_model} is a {found}, expected a {PIPELINE_CLASS}: it is a model of another family")
    return directory


def load_clip(directory: pathlib.Path) -> tuple[CLIPTextConfig, *Loaded]:
    """A CLIP text tower: its geometry, structure and float32 or half precision arrays."""
    config = _geometry(CLIPTextConfig, directory)
    module = functional(lambda rngs: CLIPTextModel(config, rngs=rngs))
    unused = r"text_model\.embeddings\.position_ids"  # a buffer that older files hold
    return config, module, _tensors(directory, "model", module, unused)


def load_t5(directory: pathlib.Path) -> tuple[T5Config, *Loaded]:
    """The T5 encoder; as `load_clip`."""
    config = _geometry(T5Config, directory)
    module = functional(lambda rngs: T5Encoder(config, rngs=rngs))
    unused = r"encoder\.embed_tokens\.weight"  # `shared` under its other name
    return config, module, _tensors(directory, "model", module, unused)


def load_vae(directory: pathlib.Path) -> tuple[VAEConfig, *Loaded]:
    """The autoencoder; as `load_clip`."""
    config = _geometry(VAEConfig, directory)
    module = functional(lambda rngs: AutoencoderKL(config, rngs=rngs))
    return config, module, _tensors(directory, "diffusion_pytorch_model", module, None)


def vae_fingerprint(directory: pathlib.Path) -> str:
    """Tells VAEs apart that share a geometry, by scale, shift and the encoder's weights.

    Weights count in float16, so that a VAE published in both precisions is one.
    """
    config, tensors = _geometry(VAEConfig, directory), SafetensorsDirectory(directory, "diffusion_pytorch_model")
    digest = hashlib.sha256(json.dumps([config.scaling_factor, config.shift_factor]).encode())
    for name in sorted(name for name in tensors if name.startswith("encoder.")):
        digest.update(tensors[name].astype(np.float16).tobytes())
    return digest.hexdigest()[:16]


def text_fingerprint(directory: pathlib.Path) -> str:
    """Tells text encoders apart, by their geometry and final norms; checks that all parts are there.

    Raises:
        FileNotFoundError, ConfigError: a missing encoder or tokenizer.
    """
    digest = hashlib.sha256()
    final_norms = ("text_model.final_layer_norm.weight", "text_model.final_layer_norm.weight",
                   "encoder.final_layer_norm.weight")  # fmt: skip
    kinds = (CLIPTextConfig, CLIPTextConfig, T5Config)
    for number, (kind, final_norm) in enumerate(zip(kinds, final_norms)):
        suffix = f"_{number + 1}" if number else ""
        encoder, tokenizer = directory / f"text_encoder{suffix}", directory / f"tokenizer{suffix}"
        digest.update(repr(_geometry(kind, encoder)).encode())
        tensors = SafetensorsDirectory(encoder, "model")
        if final_norm not in tensors:
            raise ConfigError(f"{encoder} holds no {final_norm}: it is an encoder of another kind")
        digest.update(tensors[final_norm].astype(np.float16).tobytes())
        if not tokenizer.is_dir():
            raise ConfigError(f"{directory} is incomplete: it has no {tokenizer.name}")
    return digest.hexdigest()[:16]


def _geometry(cls: type[C], directory: pathlib.Path) -> C:
    path = directory / "config.json"
    return from_known(cls, read_json(path), str(path))


def _tensors(directory: pathlib.Path, stem: str, module: Functional, unused: str | None) -> dict[str, np.ndarray]:
    tensors = SafetensorsDirectory(directory, stem)
    return tables.load(tensors, tables.IDENTITY, module.shapes, source=str(directory), unused=unused)
