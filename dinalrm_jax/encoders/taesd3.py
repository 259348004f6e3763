"""TAESD3 (github.com/madebyollin/taesd): a tiny autoencoder of SD3's latents: previews, logs, and small experiments.

What it encodes is on the scale that the transformer takes: the VAE's shift and scale do not apply.

Its files name layers by their place, which our names keep: "N.weight" is "layers.N.weight".
"""

import functools
import hashlib
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dinalrm_jax.devices.local import on_local_devices, split_locally
from dinalrm_jax.disk import AnyPath, as_path
from dinalrm_jax.model.layers import Conv2d
from dinalrm_jax.model.parameters import Functional, Params, functional
from dinalrm_jax.model.tables import Row, load
from dinalrm_jax.weights.files import SafetensorsDirectory, resolve

TABLE = (Row("{}", "layers.{}"),)
DECODER, ENCODER = "taesd3_decoder", "taesd3_encoder"  # files, without .safetensors
CHANNELS, WIDTH = 16, 64
BLOCKS = (3, 4, 5, 8, 9, 10, 13, 14, 15, 18)
UPSAMPLERS = (7, 12, 17)  # convolutions after each doubling of the sides
ENCODER_BLOCKS = (1, 3, 4, 5, 7, 8, 9, 11, 12, 13)
DOWNSAMPLERS = (2, 6, 10)  # convolutions that halve the sides
PADDING = ((1, 1), (1, 1))


class Block(nnx.Module):
    """Three convolutions beside the identity."""

    def __init__(self, *, rngs: nnx.Rngs):
        first, second, third = (Conv2d(WIDTH, WIDTH, 3, padding=PADDING, rngs=rngs) for _ in range(3))
        self.conv = nnx.List([first, None, second, None, third])

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.relu(self.conv[4](jax.nn.relu(self.conv[2](jax.nn.relu(self.conv[0](x))))) + x)


class TinyDecoder(nnx.Module):
    """From scaled latents to pixels, layer by layer."""

    def __init__(self, *, rngs: nnx.Rngs):
        layers: list[nnx.Module | None] = [None] * 20
        layers[1] = Conv2d(CHANNELS, WIDTH, 3, padding=PADDING, rngs=rngs)
        for place in BLOCKS:
            layers[place] = Block(rngs=rngs)
        for place in UPSAMPLERS:
            layers[place] = Conv2d(WIDTH, WIDTH, 3, padding=PADDING, use_bias=False, rngs=rngs)
        layers[19] = Conv2d(WIDTH, 3, 3, padding=PADDING, rngs=rngs)
        self.layers = nnx.List(layers)

    def __call__(self, latents: jax.Array) -> jax.Array:
        """(B, H, W, 16) clean, scaled latents -> (B, 8 H, 8 W, 3) in [0, 1] up to what it overshoots."""
        x = jax.nn.relu(self.layers[1](3 * jnp.tanh(latents / 3)))
        for place in range(3, 20):
            if place in UPSAMPLERS:
                x = x.repeat(2, axis=1).repeat(2, axis=2)
            if self.layers[place] is not None:
                x = self.layers[place](x)
        return x


class TinyEncoder(nnx.Module):
    """From pixels to scaled latents, layer by layer."""

    def __init__(self, *, rngs: nnx.Rngs):
        layers: list[nnx.Module] = [Conv2d(3, WIDTH, 3, padding=PADDING, rngs=rngs)]
        for place in range(1, 14):
            if place in DOWNSAMPLERS:
                layers.append(Conv2d(WIDTH, WIDTH, 3, stride=2, padding=PADDING, use_bias=False, rngs=rngs))
            else:
                layers.append(Block(rngs=rngs))
        layers.append(Conv2d(WIDTH, CHANNELS, 3, padding=PADDING, rngs=rngs))
        self.layers = nnx.List(layers)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """(B, H, W, 3) in [0, 1] -> (B, H/8, W/8, 16) clean, scaled latents."""
        for layer in self.layers:
            pixels = layer(pixels)  # type: ignore[operator]
        return pixels


def directory_of(base_model: str | AnyPath) -> AnyPath | None:
    """Where TAESD3's files lie in a base model's directory: in taesd3/ or in itself; None: neither, or on the hub."""
    for place in (as_path(base_model) / "taesd3", as_path(base_model)):
        if (place / f"{ENCODER}.safetensors").is_file():
            return place
    return None


def open_part(source: str | pathlib.Path, name: str, module: Functional) -> Params:
    """The weights of encoder or decoder, on this process's devices.

    Args:
        source: a directory with its file, or the hub id of one: madebyollin/taesd3.

    Raises:
        FileNotFoundError, WeightsError: no such file, or one of another model.
    """
    tensors = SafetensorsDirectory(resolve(source, (f"{name}.safetensors",)), name)
    return on_local_devices(load(tensors, TABLE, module.shapes, source=f"{source}/{name}.safetensors"), jnp.float32)


class Preview:
    """The decoder with its weights; see `open_part` for the source and errors."""

    def __init__(self, source: str | pathlib.Path):
        module = functional(lambda rngs: TinyDecoder(rngs=rngs))
        self._params = open_part(source, DECODER, module)
        self._decode = jax.jit(lambda params, latents: module.bind(params)(latents))

    def decode(self, latents: np.ndarray, batch_size: int = 4) -> np.ndarray:
        """(B, H/8, W/8, 16) clean, scaled latents -> (B, H, W, 3) uint8."""
        parts = [latents[start : start + batch_size].astype(np.float32) for start in range(0, len(latents), batch_size)]
        pixels = np.concatenate([np.asarray(self._decode(self._params, split_locally(part))) for part in parts])
        return np.clip(np.round(255 * pixels), 0, 255).astype(np.uint8)


class TAESD3Codec:
    """Encoder and decoder: an `encoders.load.ImageCodec`; it has no posterior to sample, so names change nothing.

    Args:
        source: see `open_part`.
    """

    downsampling = 8

    def __init__(self, source: str | pathlib.Path):
        module = functional(lambda rngs: TinyEncoder(rngs=rngs))
        self._source, self._params = source, open_part(source, ENCODER, module)
        self.fingerprint = taesd3_fingerprint(source)

        def encode(params, images):
            with jax.default_matmul_precision("highest"):  # as the VAE: convolutions of TPUs and GPUs would round
                return module.bind(params)(images / 255)

        self._encode = jax.jit(encode)

    def encode(self, images: np.ndarray, names: Sequence[str] | None = None) -> np.ndarray:
        """(B, H, W, 3) uint8 -> (B, H/8, W/8, 16) float32."""
        return np.asarray(self._encode(self._params, split_locally(images.astype(np.float32))))

    @functools.cached_property
    def _drawer(self) -> Preview:
        return Preview(self._source)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        return self._drawer.decode(latents)

    def decoder(self) -> tuple[Callable[[Params, jax.Array], jax.Array], Params]:
        module = functional(lambda rngs: TinyDecoder(rngs=rngs))
        params = open_part(self._source, DECODER, module)
        return (lambda params, latents: jnp.clip(module.bind(params)(latents), 0, 1)), params


def taesd3_fingerprint(source: str | pathlib.Path) -> str:
    """Tells encoders apart whose latents must not be mixed."""
    path = resolve(source, (f"{ENCODER}.safetensors",)) / f"{ENCODER}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{source} holds no {ENCODER}.safetensors; TAESD3 is madebyollin/taesd3 on the hub")
    return f"taesd3-{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
