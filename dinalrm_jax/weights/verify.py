"""Scores a released checkpoint with PyTorch and compares them with ours.

The PyTorch side reads the weights itself: diffusers loads and runs the transformer's blocks, PEFT
the adapters, `torch.load` the head, whose forward pass is written out below. Only the model's
configuration (taps, depth, heads) is ours, so an agreement says that the conversion is right. Needs
torch, diffusers and peft (the `test` extra).
"""

import importlib.util
from collections.abc import Callable
from typing import cast

import jax
import numpy as np

from dinalrm_jax.model.batch import PromptEmbeds
from dinalrm_jax.model.config import HeadConfig, RewardModelConfig
from dinalrm_jax.weights import pretrained

SIGMAS = (0.1, 0.4, 0.7)
TOLERANCE = 1e-4  # design: absolute, on scores of order 1, in float32


class VerificationError(RuntimeError):
    """The converted model scores differently from the released files, or they cannot be compared."""


def check_torch() -> None:
    """Raises VerificationError unless what the PyTorch side needs is installed."""
    missing = [name for name in ("torch", "diffusers", "peft") if importlib.util.find_spec(name) is None]
    if missing:
        raise VerificationError(f"--verify needs {', '.join(missing)}: pip install torch diffusers peft")


def verify_against_released(
    config: RewardModelConfig, score_latents: Callable[..., np.ndarray], checkpoint: str, base_model: str
) -> str:
    """Compares a float32 model of ours with the released files it came from, on random inputs.

    Args:
        config: of the model.
        score_latents: the model's, see `RewardModel.score_latents`.
        checkpoint, base_model: directories or hub ids.

    Returns:
        What was compared, and the largest difference, to print.

    Raises:
        VerificationError: a difference above 1e-4 times the larger of 1 and the largest score.
    """
    spec = config.transformer.latents
    rng = np.random.default_rng(0)
    side = min(16, spec.largest_side)
    latents, noise = rng.standard_normal((2, 2, side, side, spec.channels)).astype(np.float32)
    embeds = rng.standard_normal((2, 20, spec.text_width)).astype(np.float32)
    pooled = rng.standard_normal((2, spec.pooled_width)).astype(np.float32)
    prompt = PromptEmbeds(embeds, pooled)
    reference = ReleasedInTorch(checkpoint, base_model, config)
    with jax.default_matmul_precision("highest"):
        ours = np.stack([score_latents(latents, prompt, sigma, noise) for sigma in SIGMAS])
    theirs = np.stack([reference.score(latents, prompt, sigma, noise) for sigma in SIGMAS])
    difference, limit = np.abs(ours - theirs).max(), TOLERANCE * max(1.0, np.abs(theirs).max())
    report = f"largest difference {difference:.2e} (limit {limit:.1e}) over {ours.size} scores at sigma {SIGMAS}"
    if not difference <= limit:
        raise VerificationError(f"the model does not score as {checkpoint} does in PyTorch: {report}")
    return f"verified against PyTorch: {report}"


class ReleasedInTorch:
    """The released files as a PyTorch reward model on the CPU, in float32.

    Args:
        checkpoint, base_model: directories or hub ids.
        config: taps, depth and heads.
    """

    def __init__(self, checkpoint: str, base_model: str, config: RewardModelConfig):
        import torch
        from diffusers import SD3Transformer2DModel
        from peft import PeftModel

        directory = pretrained.resolve(checkpoint, pretrained.CHECKPOINT_FILES) / "checkpoint"
        transformer = SD3Transformer2DModel.from_pretrained(pretrained.read_diffusers_config(base_model)[0]).float()
        transformer.transformer_blocks = transformer.transformer_blocks[: config.num_blocks]
        if (directory / "backbone_lora").is_dir():
            transformer = PeftModel.from_pretrained(
                transformer, directory / "backbone_lora", is_trainable=True
            ).base_model.model
        self.config, self.transformer = config, transformer
        self.head = torch.load(directory / "rm_head.pt", weights_only=True)

    def score(self, latents: np.ndarray, prompt: PromptEmbeds, sigma: float | tuple[float, ...], noise: np.ndarray):
        """(B,) scores, arguments as those of `RewardModel.score_latents`."""
        import torch

        inputs = (latents, prompt.prompt_embeds, prompt.pooled_prompt_embeds, noise)
        rows, embeds, pooled, eps = (torch.from_numpy(np.array(array)) for array in inputs)
        with torch.no_grad():
            return self.forward(rows, embeds, pooled, eps, sigma).numpy()

    def forward(self, latents, prompt_embeds, pooled, noise, sigma: float | tuple[float, ...]):
        """The same of tensors, differentiable in latents, adapters and `head`."""
        import torch

        levels = [
            self._tokens(latents, prompt_embeds, pooled, noise, level)
            for level in (sigma if isinstance(sigma, tuple) else (sigma,))
        ]
        image = torch.cat([image for image, _ in levels], dim=1)
        text = torch.cat([text for _, text in levels], dim=1) if self.config.text_taps else None
        return torch_head(self.head, image, text, cast(HeadConfig, self.config.head).num_attn_heads)

    def _tokens(self, latents, prompt_embeds, pooled, noise, level: float):
        import torch

        transformer, config = self.transformer, self.config
        noisy = (1 - level) * latents + level * noise
        image = transformer.pos_embed(noisy.permute(0, 3, 1, 2))
        temb = transformer.time_text_embed(torch.full((len(noisy),), 1000.0 * level), pooled)
        text = transformer.context_embedder(prompt_embeds)
        image_taps, text_taps = {0: image}, {0: text}
        for index, block in enumerate(transformer.transformer_blocks, start=1):
            text, image = block(hidden_states=image, encoder_hidden_states=text, temb=temb)
            image_taps[index], text_taps[index] = image, text
        return torch_head_tokens(
            self.head,
            [image_taps[tap] for tap in config.visual_taps],
            [text_taps[tap] for tap in config.text_taps],
            temb,
        )


def torch_head_tokens(weights, image_taps, text_taps, temb):
    """The released head's FiLM adapters and aggregation as formulas over its state dict."""
    import torch
    import torch.nn.functional as F

    def tokens(stream, taps):
        adapted = []
        for index, tap in enumerate(taps):
            name = f"layer_adapters_{stream}.{index}"
            tap = _linear(weights, f"{name}.proj_in", tap) if f"{name}.proj_in.weight" in weights else tap
            style = _linear(weights, f"{name}.cond_mlp.2", F.silu(_linear(weights, f"{name}.cond_mlp.0", temb)))
            gamma, beta = style[:, None].chunk(2, dim=-1)
            hidden = tap * (1 + gamma) + beta + weights[f"{name}.layer_embed"]
            adapted.append(_linear(weights, f"{name}.proj", hidden))
        return _linear(weights, f"agg_{stream}", torch.cat(adapted, dim=-1))

    return tokens("visual", image_taps), tokens("text", text_taps) if text_taps else None


def torch_head(weights, image, text, heads: int):
    """The released head's attention and feed-forward over its tokens: (B,) scores."""
    import torch
    import torch.nn.functional as F

    def rms(name, x):
        return F.rms_norm(x, x.shape[-1:], weights[f"{name}.weight"])

    def attend(name, query, context, stream):
        key = _linear(weights, f"{name}.to_k_{stream}", context)
        value = _linear(weights, f"{name}.to_v_{stream}", context)
        if f"{name}.gate_{stream}.0.weight" in weights:
            gate = F.silu(_linear(weights, f"{name}.gate_{stream}.0", context))
            value = value * torch.sigmoid(_linear(weights, f"{name}.gate_{stream}.2", gate))
        query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)

    queries = weights["query_tokens"].expand(len(image), -1, -1)
    query = _linear(weights, "attn1.to_q", rms("attn1.norm_q", queries))
    attended = attend("attn1", query, rms("attn1.norm_v", image), "vis")
    if text is not None:
        attended = attended + attend("attn1", query, rms("attn1.norm_t", text), "text")
    queries = queries + _linear(weights, "attn1.to_out.0", attended)
    query = _linear(weights, "attn2.to_q", rms("attn2.norm_q", queries))
    attended = attend("attn2", query, rms("attn2.norm_v", image), "vis")
    queries = queries + _linear(weights, "attn2.to_out.0", attended)
    queries = queries + _linear(weights, "ff.2", F.gelu(_linear(weights, "ff.0", rms("norm_ff", queries))))
    return _linear(weights, "head", queries)[..., 0].mean(dim=1)


def _linear(weights, name, x):
    import torch.nn.functional as F

    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])
