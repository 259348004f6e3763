"""TAESD3 (github.com/madebyollin/taesd): a tiny decoder of SD3's latents, for previews and logs.

Its files name layers by their place, which our names keep: "N.weight" is "layers.N.weight".
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dinalrm_jax.devices.local import on_local_devices, split_locally
from dinalrm_jax.model.layers import Conv2d
from dinalrm_jax.model.parameters import functional
from dinalrm_jax.model.tables import Row, load
from dinalrm_jax.weights.files import SafetensorsDirectory, resolve

TABLE = (Row("{}", "layers.{}"),)
FILES = ("taesd3_decoder.safetensors",)
CHANNELS, WIDTH = 16, 64
BLOCKS = (3, 4, 5, 8, 9, 10, 13, 14, 15, 18)
UPSAMPLERS = (7, 12, 17)  # convolutions after each doubling of the sides
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


class Preview:
    """The decoder with its weights.

    Args:
        source: a directory with taesd3_decoder.safetensors, or the hub id of one: madebyollin/taesd3.

    Raises:
        FileNotFoundError, WeightsError: no such file, or one of another decoder.
    """

    def __init__(self, source: str | pathlib.Path):
        directory = resolve(source, FILES)
        module = functional(lambda rngs: TinyDecoder(rngs=rngs))
        tensors = SafetensorsDirectory(directory, "taesd3_decoder")
        params = load(tensors, TABLE, module.shapes, source=f"{directory}/taesd3_decoder.safetensors")
        self._params = on_local_devices(params, jnp.float32)
        self._decode = jax.jit(lambda params, latents: module.bind(params)(latents))

    def decode(self, latents: np.ndarray, batch_size: int = 4) -> np.ndarray:
        """(B, H/8, W/8, 16) clean, scaled latents -> (B, H, W, 3) uint8."""
        parts = [latents[start : start + batch_size].astype(np.float32) for start in range(0, len(latents), batch_size)]
        pixels = np.concatenate([np.asarray(self._decode(self._params, split_locally(part))) for part in parts])
        return np.clip(np.round(255 * pixels), 0, 255).astype(np.uint8)
