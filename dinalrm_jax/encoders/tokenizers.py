"""Tokenizers of transformers, from directories."""

import pathlib
from collections.abc import Callable
from typing import Literal

from dinalrm_jax.mapping import ConfigError

WORDS = ("tokenizer.json", "vocab.json", "spiece.model")  # one of these holds a tokenizer's vocabulary


def load_tokenizer(directory: pathlib.Path, kind: Literal["clip", "t5", "bert"]) -> Callable:
    """A tokenizer of texts.

    Raises:
        ConfigError: the directory holds none, which transformers, of CLIP's, does not notice.
    """
    from transformers import AutoTokenizer, CLIPTokenizer  # slow to import

    try:
        if not any((directory / name).is_file() for name in WORDS):
            raise ValueError(f"none of {', '.join(WORDS)} is there")
        loader = CLIPTokenizer if kind == "clip" else AutoTokenizer
        return loader.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{directory} holds no tokenizer: {error}") from error
