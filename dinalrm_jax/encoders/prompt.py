"""Prompts to SD3's embeddings: tokenizers, the two CLIP towers, T5, and their assembly."""

import copy
import functools
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dinalrm_jax.devices.local import on_local_devices, split_locally
from dinalrm_jax.encoders.pipeline import TEXT_FILES, load_clip, load_t5, open_pipeline
from dinalrm_jax.encoders.tokenizers import load_tokenizer
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.batch import PromptEmbeds
from dinalrm_jax.model.encoding import CLIP_TOKENS
from dinalrm_jax.model.parameters import Functional, Params


class SD3PromptEncoder:
    """diffusers' `StableDiffusion3Pipeline.encode_prompt`, without guidance.

    Args:
        base_model: an SD3 pipeline, directory or hub id.
        text_length: T5 tokens; DiNa-LRM trains with 128.
        dtype: compute dtype and storage of the weights.

    Raises:
        ConfigError, WeightsError, FileNotFoundError: not such a pipeline, or an incomplete one.
    """

    def __init__(self, base_model: str | pathlib.Path, text_length: int, dtype: str):
        directory = open_pipeline(base_model, TEXT_FILES)
        self.text_length, self.dtype = text_length, dtype
        self._tokenizers = [
            load_tokenizer(directory / "tokenizer", "clip"),
            load_tokenizer(directory / "tokenizer_2", "clip"),
            load_tokenizer(directory / "tokenizer_3", "t5"),
        ]
        clip_l, self._clip_l, params_l = load_clip(directory / "text_encoder")
        clip_g, self._clip_g, params_g = load_clip(directory / "text_encoder_2")
        t5, self._t5, params_t5 = load_t5(directory / "text_encoder_3")
        if clip_l.hidden_size + clip_g.hidden_size > t5.d_model:
            raise ConfigError(
                f"{directory}: the CLIP widths {clip_l.hidden_size} + {clip_g.hidden_size} exceed T5's {t5.d_model}, "
                "which they are padded to; these encoders do not belong together"
            )
        self._params = {
            name: on_local_devices(params, dtype)
            for name, params in (("clip_l", params_l), ("clip_g", params_g), ("t5", params_t5))
        }
        self._encode = jax.jit(functools.partial(encode_ids, self._clip_l, self._clip_g, self._t5, dtype))

    def __call__(self, prompts: Sequence[str]) -> PromptEmbeds:
        """B prompts -> (B, 77 + text_length, 4096) and (B, 2048), float32."""
        lengths = (CLIP_TOKENS, CLIP_TOKENS, self.text_length)
        ids = [self._tokens(tokenizer, prompts, n) for tokenizer, n in zip(self._tokenizers, lengths)]
        return self._encode(self._params, *split_locally(ids))

    def with_length(self, text_length: int) -> "SD3PromptEncoder":
        """The same encoders, on the same weights, for so many T5 tokens."""
        other = copy.copy(self)
        other.text_length = text_length
        return other

    def longer(self, prompts: Sequence[str]) -> list[int]:
        """Which prompts have more tokens than T5 is given here; CLIP reads the first 77 of any."""
        counts = [len(self._tokenizers[2](prompt)["input_ids"]) for prompt in prompts]
        return [place for place, count in enumerate(counts) if count > self.text_length]

    @staticmethod
    def _tokens(tokenizer, prompts: Sequence[str], length: int) -> np.ndarray:
        encoded = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True)
        return np.asarray(encoded["input_ids"], np.int32)


def encode_ids(
    clip_l: Functional, clip_g: Functional, t5: Functional, dtype: str, params: dict[str, Params], ids_l, ids_g, ids_t5
) -> PromptEmbeds:
    """Token ids of B prompts, (B, 77) twice and (B, T), to (B, 77 + T, 4096) and (B, 2048), float32.

    As diffusers' SD3 pipeline joins them: the CLIP towers' tokens side by side, zeros up to T5's width, T5's after.
    """
    hidden_l, pooled_l = clip_l.bind(params["clip_l"])(ids_l, dtype)
    hidden_g, pooled_g = clip_g.bind(params["clip_g"])(ids_g, dtype)
    hidden_t5 = t5.bind(params["t5"])(ids_t5, dtype)
    clip = jnp.concatenate([hidden_l, hidden_g], axis=-1)
    clip = jnp.pad(clip, ((0, 0), (0, 0), (0, hidden_t5.shape[-1] - clip.shape[-1])))
    embeds = PromptEmbeds(jnp.concatenate([clip, hidden_t5], axis=1), jnp.concatenate([pooled_l, pooled_g], axis=-1))
    return jax.tree.map(lambda array: array.astype(jnp.float32), embeds)
