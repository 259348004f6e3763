"""Images to latents and prompts to embeddings, by the encoders a model was made for.

`EncodersConfig` chooses: "sd3" is the VAE and the three text encoders of an SD3 pipeline, "tiny" the fixed formulas of
`dinalrm_jax.encoders.tiny`, which need no weights, "minilm" a small text encoder, and "taesd3" a small autoencoder.
"""

import functools
import hashlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dinalrm_jax.devices.local import on_local_devices, split_locally
from dinalrm_jax.disk import AnyPath
from dinalrm_jax.encoders import tiny
from dinalrm_jax.encoders.minilm import MiniLMPromptEncoder, minilm_fingerprint
from dinalrm_jax.encoders.pipeline import (
    TEXT_FILES,
    VAE_FILES,
    load_vae,
    open_pipeline,
    text_fingerprint,
    vae_fingerprint,
)
from dinalrm_jax.encoders.prompt import SD3PromptEncoder
from dinalrm_jax.encoders.taesd3 import TAESD3Codec, directory_of, taesd3_fingerprint
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.batch import PromptEmbeds
from dinalrm_jax.model.encoding import EncodersConfig
from dinalrm_jax.model.parameters import Params

PRECISION = "highest"  # of the VAE's products: by default TPUs and GPUs round what they multiply


class PromptEncoder(Protocol):
    """Texts to embeddings."""

    def __call__(self, prompts: Sequence[str], /) -> PromptEmbeds: ...

    def longer(self, prompts: Sequence[str]) -> list[int]:
        """Which prompts are longer than what is read; what is beyond has no effect."""
        ...


class Decoder(Protocol):
    """What draws latents."""

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """(B, H/8, W/8, C) clean, scaled latents -> (B, H, W, 3) uint8, as good as it can."""
        ...


class ImageCodec(Decoder, Protocol):
    """Attributes:
    downsampling: pixels along a side of one latent.
    fingerprint: tells encoders apart whose latents must not be mixed.
    """

    downsampling: int
    fingerprint: str

    def encode(self, images: np.ndarray, names: Sequence[str] | None = None) -> np.ndarray:
        """Clean, scaled latents.

        Args:
            images: (B, H, W, 3) uint8 RGB, sides multiples of `downsampling`.
            names: of the images; a posterior sample is drawn for each, from its name alone. None:
                the posterior's mode.

        Returns:
            (B, H/8, W/8, C) float32.
        """
        ...

    def decoder(self) -> tuple[Callable[[Params, jax.Array], jax.Array], Params]:
        """`decode` as a pure function (params, latents) -> pixels from 0 to 1, differentiable, and its parameters."""
        ...


def load_prompt_encoder(config: EncodersConfig, base_model: str | pathlib.Path | None, dtype: str) -> PromptEncoder:
    """The text side of the encoders that `config` describes; see `SD3PromptEncoder` for the errors."""
    if config.kind == "tiny":
        return TinyPromptEncoder(config.text_length)
    if config.kind == "minilm":
        return MiniLMPromptEncoder(base_model, config.text_length)
    return SD3PromptEncoder(_required(base_model), config.text_length, dtype)


def prompt_fingerprint(config: EncodersConfig, base_model: str | pathlib.Path | None) -> str:
    """Tells prompt encoders apart whose embeddings must not be mixed; cheap, and raises what loading would first."""
    if config.kind == "tiny":
        return "hashed_words"
    if config.kind == "minilm":
        return minilm_fingerprint(base_model)
    return text_fingerprint(open_pipeline(_required(base_model), TEXT_FILES))


def load_image_codec(config: EncodersConfig, base_model: str | pathlib.Path | None) -> ImageCodec:
    """The image side of the encoders that `config` describes.

    Raises:
        ConfigError, WeightsError, FileNotFoundError: not an SD3 pipeline, or an incomplete one; or not TAESD3's files.
    """
    if config.images == "taesd3":
        return TAESD3Codec(_taesd3(base_model))
    return TinyCodec() if config.kind == "tiny" else SD3Codec(_required(base_model))


def image_codec_fingerprint(config: EncodersConfig, base_model: str | pathlib.Path | None) -> str | None:
    """The fingerprint that the image codec has, without loading it; None where no VAE is named.

    For latents that were made elsewhere: naming a base model says that they are of its VAE.
    """
    if config.kind == "tiny" or base_model is None:
        return None
    if config.images == "taesd3":
        return taesd3_fingerprint(_taesd3(base_model))
    vae = open_pipeline(base_model, VAE_FILES) / "vae"
    return vae_fingerprint(vae) if vae.is_dir() else None


class TinyPromptEncoder:
    """Hashed words, up to `length` of them."""

    def __init__(self, length: int):
        self._length = length

    def __call__(self, prompts: Sequence[str]) -> PromptEmbeds:
        return PromptEmbeds(*tiny.encode_prompts(prompts, self._length, tiny.TEXT_WIDTH))

    def longer(self, prompts: Sequence[str]) -> list[int]:
        return [place for place, prompt in enumerate(prompts) if len(tiny.words(prompt)) > self._length]


class TinyCodec:
    """The linear codec; it has no posterior to sample."""

    downsampling = tiny.BLOCK
    fingerprint = "tiny_dct"

    def encode(self, images: np.ndarray, names: Sequence[str] | None = None) -> np.ndarray:
        return np.stack([tiny.encode_image(image) for image in images])

    def decode(self, latents: np.ndarray) -> np.ndarray:
        return np.stack([tiny.decode_latents(row) for row in latents])

    def decoder(self) -> tuple[Callable[[Params, jax.Array], jax.Array], Params]:
        return (lambda params, latents: to_unit_range(tiny.to_pixels(latents, jnp))), {}


class SD3Codec:
    """The VAE of an SD3 pipeline, in float32: rounding to bfloat16 would cost more than the latents' storage.

    A batch is split over this process's devices where it divides by their number.
    """

    def __init__(self, base_model: str | pathlib.Path):
        directory = open_pipeline(base_model, VAE_FILES) / "vae"
        config, module, params = load_vae(directory)
        self.downsampling = config.downsampling
        self.fingerprint = vae_fingerprint(directory)
        self._params = on_local_devices(params, jnp.float32)
        self._module, self._channels = module, config.latent_channels
        self._decode = jax.jit(_precisely(lambda params, latents: module.bind(params).decode(latents)))
        self._encode = jax.jit(
            _precisely(lambda params, images, noise: module.bind(params).encode(images / 127.5 - 1, noise))
        )

    def encode(self, images: np.ndarray, names: Sequence[str] | None = None) -> np.ndarray:
        noise = None
        if names is not None:
            height, width = (side // self.downsampling for side in images.shape[1:3])
            noise = np.stack([_named_noise(name, (height, width, self._channels)) for name in names])
        return np.asarray(self._encode(self._params, *split_locally((images.astype(np.float32), noise))))

    def decode(self, latents: np.ndarray) -> np.ndarray:
        images = np.asarray(self._decode(self._params, split_locally(latents.astype(np.float32))))
        return np.clip(np.round((images + 1) * 127.5), 0, 255).astype(np.uint8)

    def decoder(self) -> tuple[Callable[[Params, jax.Array], jax.Array], Params]:
        module = self._module
        return (lambda params, latents: to_unit_range(module.bind(params).decode(latents))), self._params


def to_unit_range(pixels: jax.Array) -> jax.Array:
    """What a decoder gives, from -1 to 1 and beyond, as pixels from 0 to 1."""
    return jnp.clip((pixels + 1) / 2, 0, 1)


def _precisely(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The function, traced at PRECISION whatever the surroundings set."""

    def traced(*arguments):
        with jax.default_matmul_precision(PRECISION):
            return function(*arguments)

    return traced


def _named_noise(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal noise that depends on the name only, so that any batching gives the same latents."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return np.random.Generator(np.random.Philox(seed)).standard_normal(shape, np.float32)


SD3 = (
    "this model's text encoders and VAE come from a Stable Diffusion 3 pipeline; name it: base_model=..., "
    "on the command line --base-model (a directory or hub id in diffusers layout)"
)
TAESD3 = (
    "this model's images are encoded by TAESD3; name it: base_model=..., on the command line --base-model (a directory "
    "with taesd3_encoder.safetensors or with that in taesd3/, or the hub id madebyollin/taesd3)"
)


def _taesd3(base_model: str | AnyPath | None) -> str | AnyPath:
    named = _required(base_model, TAESD3)
    return directory_of(named) or named  # on the hub, or an error that says what is looked for


def _required(base_model: str | pathlib.Path | None, otherwise: str = SD3) -> str | pathlib.Path:
    if base_model is None:
        raise ConfigError(otherwise)
    return base_model


# Encoders are several times the size of a model, so there is one of each, shared by the models that use it.
_small_prompt_encoder = functools.lru_cache(maxsize=4)(load_prompt_encoder)
_sd3_prompt_encoder = functools.lru_cache(maxsize=1)(SD3PromptEncoder)
image_codec = functools.lru_cache(maxsize=1)(load_image_codec)


def prompt_encoder(config: EncodersConfig, base_model: str | pathlib.Path | None, dtype: str) -> PromptEncoder:
    """`load_prompt_encoder`, loaded once for all text lengths and all that use it."""
    if config.kind != "sd3":
        return _small_prompt_encoder(config, base_model, dtype)
    return _sd3_prompt_encoder(_required(base_model), EncodersConfig.text_length, dtype).with_length(config.text_length)


def forget_prompt_encoder() -> None:
    """Frees SD3's text encoders, unless somebody else has them; they are loaded again when they are asked for."""
    _sd3_prompt_encoder.cache_clear()
