"""The CLIP text tower (transformers' `CLIPTextModelWithProjection`) in Flax NNX."""

import dataclasses
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.layers import Embedding, LayerNorm, Linear

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}
# An `eos_token_id` that published configs have, and that is not the id in the vocabulary: transformers then takes the
# highest id of a row, which is the end-of-text token's, as the original does.
HIGHEST_ID = 2


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """Fields of transformers' `CLIPTextConfig`; the defaults are its own."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(f"hidden_size {self.hidden_size} is not divisible by {self.num_attention_heads} heads")


class CLIPTextModel(nnx.Module):
    """Causal transformer over token ids."""

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.text_model = CLIPTextTransformer(config, rngs=rngs)
        self.text_projection = Linear(config.hidden_size, config.projection_dim, use_bias=False, rngs=rngs)

    def __call__(self, input_ids: jax.Array, dtype: str) -> tuple[jax.Array, jax.Array]:
        """What SD3 takes of the tower.

        Args:
            input_ids: (B, T) int32.
            dtype: compute dtype.

        Returns:
            The penultimate hidden states (B, T, hidden_size), before any final norm, and the
            projected, pooled output (B, projection_dim).
        """
        penultimate, pooled = self.text_model(input_ids, dtype)
        return penultimate, self.text_projection(pooled)


class CLIPTextTransformer(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = CLIPEmbeddings(config, rngs=rngs)
        self.encoder = CLIPEncoder(config, causal=True, rngs=rngs)
        self.final_layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(self, input_ids: jax.Array, dtype: str) -> tuple[jax.Array, jax.Array]:
        x = self.embeddings(input_ids).astype(dtype)
        *layers, last = self.encoder.layers
        for layer in layers:
            x = layer(x)
        penultimate, final = x, self.final_layer_norm(last(x))
        eos = self.config.eos_token_id
        ends = jnp.argmax(input_ids if eos == HIGHEST_ID else input_ids == eos, axis=-1)
        return penultimate, jnp.take_along_axis(final, ends[:, None, None], axis=1)[:, 0]


class CLIPEmbeddings(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.token_embedding = Embedding(config.vocab_size, config.hidden_size, rngs=rngs)
        self.position_embedding = Embedding(config.max_position_embeddings, config.hidden_size, rngs=rngs)

    def __call__(self, input_ids: jax.Array) -> jax.Array:
        return self.token_embedding(input_ids) + self.position_embedding(jnp.arange(input_ids.shape[1]))


class Tower(Protocol):
    """What the layers of a text or image tower need to know."""

    @property
    def hidden_size(self) -> int: ...

    @property
    def intermediate_size(self) -> int: ...

    @property
    def num_hidden_layers(self) -> int: ...

    @property
    def num_attention_heads(self) -> int: ...

    @property
    def hidden_act(self) -> Literal["quick_gelu", "gelu"]: ...

    @property
    def layer_norm_eps(self) -> float: ...


class CLIPEncoder(nnx.Module):
    def __init__(self, config: Tower, *, causal: bool, rngs: nnx.Rngs):
        layers = range(config.num_hidden_layers)
        self.layers = nnx.List(CLIPEncoderLayer(config, causal=causal, rngs=rngs) for _ in layers)


class CLIPEncoderLayer(nnx.Module):
    def __init__(self, config: Tower, *, causal: bool, rngs: nnx.Rngs):
        self.layer_norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = CLIPAttention(config.hidden_size, config.num_attention_heads, causal=causal, rngs=rngs)
        self.layer_norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CLIPMLP(config, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPAttention(nnx.Module):
    def __init__(self, dim: int, heads: int, *, causal: bool, rngs: nnx.Rngs):
        self.heads, self.causal = heads, causal
        self.q_proj = Linear(dim, dim, rngs=rngs)
        self.k_proj = Linear(dim, dim, rngs=rngs)
        self.v_proj = Linear(dim, dim, rngs=rngs)
        self.out_proj = Linear(dim, dim, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        query, key, value = (
            project(x).reshape(*x.shape[:2], self.heads, -1) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = jax.nn.dot_product_attention(query, key, value, is_causal=self.causal)
        return self.out_proj(out.reshape(x.shape))


class CLIPMLP(nnx.Module):
    def __init__(self, config: Tower, *, rngs: nnx.Rngs):
        self.activation = config.hidden_act
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, rngs=rngs)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))
