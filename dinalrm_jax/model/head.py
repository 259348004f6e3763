"""The reward head: FiLM adapters on the taps, gated cross-attention from a few queries, a score.

Attribute names are those of the released `rm_head.pt`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from dinalrm_jax.devices.sharding import WHOLE, Rules
from dinalrm_jax.mapping import ConfigError, Variants
from dinalrm_jax.model.backbone.family import Features
from dinalrm_jax.model.batch import PromptEmbeds
from dinalrm_jax.model.layers import Linear, RMSNorm, add_vector, contract

# torch.nn.RMSNorm's default: the machine epsilon of float32, in which the statistics are computed.
EPS = float(jnp.finfo(jnp.float32).eps)
ZEROS = jax.nn.initializers.zeros

# Where its parameters lie on a mesh, as `backbone.sd3.sharding` says of the backbone's.
RULES: Rules = (
    (r"attn[12]\.(?:to_q|to_[kv]_(?:vis|text))\.weight|ff\.0\.weight", P("tensor", "fsdp")),
    (r"attn[12]\.(?:to_q|to_[kv]_(?:vis|text))\.bias|ff\.0\.bias", P("tensor")),
    (r"attn[12]\.to_out\.0\.weight|ff\.2\.weight", P("fsdp", "tensor")),
    # FiLM adapters and the projections are used whole by every device.
    (r"layer_adapters_.*\.(?:proj_in|proj|cond_mlp\.[02])\.weight|agg_(?:visual|text)\.weight", P("fsdp", None)),
    (r".*\.gate_(?:vis|text)\.[02]\.weight|head\.weight", WHOLE),
    (r".*\.bias|(?:.*\.)?norm_\w+\.weight|.*\.layer_embed|query_tokens", WHOLE),
)


class AnyHeadConfig(Variants):
    """A head: the base of the kinds' frozen configurations, told apart by `kind`."""

    kind: ClassVar[str]
    width: int | None

    @classmethod
    def variant(cls, values: Mapping[str, Any]) -> tuple[type, dict[str, Any]]:
        known, name = {each.kind: each for each in cls.kinds()}, values.get("kind", HeadConfig.kind)
        if name not in known:
            raise ConfigError(f"there is no head {name!r}; known: {', '.join(known)}")
        return known[name], {key: values[key] for key in values if key != "kind"}

    @classmethod
    def kinds(cls) -> tuple[type["AnyHeadConfig"], ...]:
        return tuple(cls.__subclasses__())

    def marks(self) -> dict[str, Any]:
        return {} if self.kind == HeadConfig.kind else {"kind": self.kind}


@dataclasses.dataclass(frozen=True)
class HeadConfig(AnyHeadConfig):
    """The gated Q-Former head; `width` None means the backbone's."""

    kind = "q_former"
    width: int | None = None
    num_queries: int = 4
    num_attn_heads: int = 8
    use_proj_in: bool = False

    def __post_init__(self):
        if self.num_queries < 1 or self.num_attn_heads < 1:
            raise ConfigError(
                f"a head needs queries and attention heads, got {self.num_queries}, {self.num_attn_heads}"
            )


class MLP(nnx.List):
    """Linear, activation, Linear as `torch.nn.Sequential` numbers them: 0 and 2."""

    def __init__(self, in_features: int, hidden: int, out: int, *, rngs: nnx.Rngs, zero_init_last: bool = False):
        last_init = ZEROS if zero_init_last else None
        super().__init__(
            [Linear(in_features, hidden, rngs=rngs), None, Linear(hidden, out, rngs=rngs, kernel_init=last_init)]
        )


class FiLMAdapter(nnx.Module):
    """One tap's adapter: scale and shift by the noise level's embedding, add a layer embedding, project.

    `h = proj_in(x); h = h (1 + gamma) + beta + layer_embed; out = proj(h)`, with
    `[gamma, beta] = cond_mlp(temb)` starting at zero. `proj_in` exists where asked for or where
    the widths differ.
    """

    def __init__(self, token_dim: int, width: int, out_dim: int, *, use_proj_in: bool, rngs: nnx.Rngs):
        with_proj_in = use_proj_in or token_dim != width
        self.proj_in = Linear(token_dim, width, rngs=rngs) if with_proj_in else None
        self.layer_embed = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, 1, width)))
        self.cond_mlp = MLP(token_dim, 2 * width, 2 * width, rngs=rngs, zero_init_last=True)
        self.proj = Linear(width, out_dim, rngs=rngs)

    def __call__(self, tokens: Float[Array, "b n d"], temb: Float[Array, "b d"]) -> Float[Array, "b n e"]:
        """(B, N, token_dim), (B, token_dim) -> (B, N, out_dim)."""
        hidden = tokens if self.proj_in is None else self.proj_in(tokens)
        style = self.cond_mlp[2](jax.nn.silu(self.cond_mlp[0](temb)))
        gamma, beta = jnp.split(style[:, None], 2, axis=-1)
        return self.proj(add_vector(hidden * (1 + gamma) + beta, self.layer_embed[...]))


class CrossAttention(nnx.Module):
    """Queries read image tokens and, apart, text tokens; each value is gated by a scalar.

    Two separate softmaxes whose outputs are added. The gate of a token is
    `sigmoid(gate.2 silu(gate.0 token))` of the normed token, one half at the start.
    """

    def __init__(self, width: int, heads: int, *, use_text: bool, use_gates: bool, rngs: nnx.Rngs):
        self.heads = heads
        self.norm_q = RMSNorm(width, eps=EPS)
        self.norm_v = RMSNorm(width, eps=EPS)
        self.to_q = Linear(width, width, rngs=rngs)
        self.to_k_vis = Linear(width, width, rngs=rngs)
        self.to_v_vis = Linear(width, width, rngs=rngs)
        self.gate_vis = MLP(width, width, 1, rngs=rngs, zero_init_last=True) if use_gates else None
        if use_text:
            self.norm_t = RMSNorm(width, eps=EPS)
            self.to_k_text = Linear(width, width, rngs=rngs)
            self.to_v_text = Linear(width, width, rngs=rngs)
            self.gate_text = MLP(width, width, 1, rngs=rngs, zero_init_last=True) if use_gates else None
        self.to_out = nnx.List([Linear(width, width, rngs=rngs)])

    def __call__(
        self,
        queries: Float[Array, "b q d"],
        image: Float[Array, "b n d"],
        text: Float[Array, "b t d"] | None = None,
    ) -> Float[Array, "b q d"]:
        """(B, Q, C), (B, Nv, C), (B, Nt, C) -> (B, Q, C), residual included."""
        query = self.to_q(self.norm_q(queries))
        image = self.norm_v(image)
        attended = self._attend(query, image, self.to_k_vis, self.to_v_vis, self.gate_vis)
        if text is not None:
            attended += self._attend(query, self.norm_t(text), self.to_k_text, self.to_v_text, self.gate_text)
        return queries + self.to_out[0](attended)

    def _attend(self, query: jax.Array, tokens: jax.Array, to_key: Linear, to_value: Linear, gate: MLP | None):
        """Attention of a few queries over many tokens, without a key or a value of any token.

        With W_k and W_v of one head, `q . (W_k x + b_k)` is `(W_k^T q) . x` plus what all tokens share and the
        softmax drops, and `sum_n a_n g_n (W_v x_n + b_v)` is `W_v (sum_n a_n g_n x_n) + (sum_n a_n g_n) b_v`: the
        two largest products shrink from all tokens to the queries.
        """
        batch, count, width = query.shape
        dim = width // self.heads
        query = query.reshape(batch, count, self.heads, dim) * dim**-0.5
        key_weight, value_weight = (linear.weight[...].reshape(self.heads, dim, -1) for linear in (to_key, to_value))
        wide = {"preferred_element_type": jnp.float32}
        seen = contract("bqhd,hdc->bqhc", query, key_weight)
        weights = jax.nn.softmax(jnp.einsum("bqhc,bnc->bhqn", seen, tokens, **wide), axis=-1)
        if gate is not None:
            gates = jax.nn.sigmoid(gate[2](jax.nn.silu(gate[0](tokens))))
            weights = weights * gates.astype(jnp.float32)[:, None, None, :, 0]
        pooled = jnp.einsum("bhqn,bnc->bqhc", weights.astype(tokens.dtype), tokens)
        bias = to_value.bias[...].astype(jnp.float32).reshape(self.heads, dim)
        out = contract("bqhc,hdc->bqhd", pooled, value_weight).astype(jnp.float32)
        out += weights.sum(axis=-1).transpose(0, 2, 1)[..., None] * bias
        return out.astype(tokens.dtype).reshape(batch, count, width)


class RewardHead(nnx.Module):
    """From taps to one score a row; a single noise level, or several whose tokens are concatenated."""

    def __init__(self, config: HeadConfig, token_dim: int, visual_taps: int, text_taps: int, *, rngs: nnx.Rngs):
        """Of so many taps of tokens of width `token_dim`."""
        width, heads = config.width or token_dim, config.num_attn_heads
        out_dim = width // 4

        def adapters(count):
            return nnx.List(
                FiLMAdapter(token_dim, width, out_dim, use_proj_in=config.use_proj_in, rngs=rngs) for _ in range(count)
            )

        use_text = text_taps > 0
        self.query_tokens = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, config.num_queries, width)))
        self.layer_adapters_visual = adapters(visual_taps)
        self.layer_adapters_text = adapters(text_taps)
        self.agg_visual = Linear(visual_taps * out_dim, width, rngs=rngs)
        self.agg_text = Linear(text_taps * out_dim, width, rngs=rngs) if use_text else None
        self.attn1 = CrossAttention(width, heads, use_text=use_text, use_gates=True, rngs=rngs)
        self.attn2 = CrossAttention(width, heads, use_text=False, use_gates=False, rngs=rngs)
        self.norm_ff = RMSNorm(width, eps=EPS)
        self.ff = MLP(width, 4 * width, width, rngs=rngs)
        self.head = Linear(width, 1, rngs=rngs)

    def prompts(self, prompt: PromptEmbeds) -> PromptEmbeds:
        """What the backbone reads: the B prompts as they are."""
        return prompt

    @jax.default_matmul_precision("highest")
    def tokens(self, features: Features, prompt: PromptEmbeds) -> tuple[jax.Array, jax.Array | None]:
        """One level's features -> (B, Nv, C) image and (B, Nt, C) text tokens (None without text)."""
        image = _adapt(self.layer_adapters_visual, features.visual, features.temb)
        if self.agg_text is None:
            return self.agg_visual(image), None
        return self.agg_visual(image), self.agg_text(_adapt(self.layer_adapters_text, features.text, features.temb))

    @jax.default_matmul_precision("highest")
    def score(self, image: Float[Array, "b n d"], text: Float[Array, "b t d"] | None) -> Float[Array, " b"]:
        """(B, Nv, C), (B, Nt, C) -> (B,) float32, its float32 products exact on GPUs and TPUs too.

        For an ensemble of K levels the tokens of all levels stand one after another, K Nv and K Nt
        of them, and are attended to at once; this is not the mean of K scores.
        """
        queries = self.query_tokens[...]
        queries = jnp.broadcast_to(queries, (image.shape[0], *queries.shape[1:])).astype(image.dtype)
        queries = self.attn1(queries, image, text)
        queries = self.attn2(queries, image)
        hidden = jax.nn.gelu(self.ff[0](self.norm_ff(queries)), approximate=False)
        queries = queries + self.ff[2](hidden)
        return self.head(queries.astype(jnp.float32))[..., 0].mean(axis=-1)


def _adapt(adapters: nnx.List, taps: tuple[jax.Array, ...], temb: jax.Array) -> jax.Array:
    return jnp.concatenate([adapter(tap, temb) for adapter, tap in zip(adapters, taps, strict=True)], axis=-1)
