"""Scores a released checkpoint with PyTorch and compares them with ours.

The PyTorch side reads the released files itself: diffusers loads and runs the transformer's
blocks, PEFT the adapters, `torch.load` the head, whose forward pass is written out below. Nothing
of our converter is used, so an agreement says that it is right. Needs torch, diffusers and peft
(the `test` extra).
"""

import jax
import numpy as np

from dinalrm_jax.config import ExecutionConfig, RewardModelConfig
from dinalrm_jax.data.batch import PromptEmbeds
from dinalrm_jax.weights import pretrained

SIGMAS = (0.1, 0.4, 0.7)
TOLERANCE = 1e-4  # design: absolute, on scores of order 1, in float32


class VerificationError(RuntimeError):
    """The converted model scores differently from the released files."""


def verify_against_released(output: str, checkpoint: str, base_model: str) -> str:
    """Compares the native checkpoint `output` with the released files on random inputs, in float32.

    Returns:
        What was compared, and the largest difference, to print.

    Raises:
        VerificationError: a difference above 1e-4 times the larger of 1 and the largest score.
    """
    model = pretrained.load_reward_model(output, None, ExecutionConfig(dtype="float32"))
    transformer = model.config.transformer
    rng = np.random.default_rng(0)
    side = min(16, transformer.pos_embed_max_size * transformer.patch_size)
    latents, noise = rng.standard_normal((2, 2, side, side, transformer.in_channels)).astype(np.float32)
    embeds = rng.standard_normal((2, 20, transformer.joint_attention_dim)).astype(np.float32)
    pooled = rng.standard_normal((2, transformer.pooled_projection_dim)).astype(np.float32)
    with jax.default_matmul_precision("highest"):
        ours = np.stack([model.score_latents(latents, PromptEmbeds(embeds, pooled), s, noise) for s in SIGMAS])
    theirs = np.stack([
        released_scores(checkpoint, base_model, model.config, (1 - s) * latents + s * noise, embeds, pooled, s)
        for s in SIGMAS
    ])  # fmt: skip
    difference, limit = np.abs(ours - theirs).max(), TOLERANCE * max(1.0, np.abs(theirs).max())
    report = f"largest difference {difference:.2e} (limit {limit:.1e}) over {ours.size} scores at sigma {SIGMAS}"
    if not difference <= limit:
        raise VerificationError(f"{output} does not score as {checkpoint} does in PyTorch: {report}")
    return f"verified against PyTorch: {report}"


def released_scores(
    checkpoint: str,
    base_model: str,
    config: RewardModelConfig,
    noisy: np.ndarray,
    prompt_embeds: np.ndarray,
    pooled: np.ndarray,
    sigma: float,
) -> np.ndarray:
    """(B,) scores of noisy channels-last latents, computed by PyTorch from the released files."""
    import torch
    from diffusers import SD3Transformer2DModel
    from peft import PeftModel

    directory = pretrained.resolve(checkpoint) / "checkpoint"
    transformer = SD3Transformer2DModel.from_pretrained(pretrained.read_diffusers_config(base_model)[0])
    transformer.transformer_blocks = transformer.transformer_blocks[: config.num_blocks]
    if (directory / "backbone_lora").is_dir():
        transformer = PeftModel.from_pretrained(transformer, directory / "backbone_lora").base_model.model
    head = torch.load(directory / "rm_head.pt", weights_only=True)
    with torch.no_grad():
        image = transformer.pos_embed(torch.from_numpy(noisy).permute(0, 3, 1, 2))
        temb = transformer.time_text_embed(torch.full((len(noisy),), 1000.0 * sigma), torch.from_numpy(pooled))
        text = transformer.context_embedder(torch.from_numpy(prompt_embeds))
        image_taps, text_taps = {0: image}, {0: text}
        for index, block in enumerate(transformer.transformer_blocks, start=1):
            text, image = block(hidden_states=image, encoder_hidden_states=text, temb=temb)
            image_taps[index], text_taps[index] = image, text
        image_taps = [image_taps[tap] for tap in config.visual_taps]
        text_taps = [text_taps[tap] for tap in config.text_taps]
        return _torch_head(head, image_taps, text_taps, temb, config.head.num_attn_heads).numpy()


def _torch_head(weights, image_taps, text_taps, temb, heads: int):
    """The released `RewardHead.forward` as formulas over its state dict."""
    import torch
    import torch.nn.functional as F

    def linear(name, x):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def rms(name, x):
        return F.rms_norm(x, x.shape[-1:], weights[f"{name}.weight"])

    def tokens(stream, taps):
        adapted = []
        for index, tap in enumerate(taps):
            name = f"layer_adapters_{stream}.{index}"
            tap = linear(f"{name}.proj_in", tap) if f"{name}.proj_in.weight" in weights else tap
            style = linear(f"{name}.cond_mlp.2", F.silu(linear(f"{name}.cond_mlp.0", temb)))
            gamma, beta = style[:, None].chunk(2, dim=-1)
            adapted.append(linear(f"{name}.proj", tap * (1 + gamma) + beta + weights[f"{name}.layer_embed"]))
        return linear(f"agg_{stream}", torch.cat(adapted, dim=-1))

    def attend(name, query, context, stream):
        key, value = linear(f"{name}.to_k_{stream}", context), linear(f"{name}.to_v_{stream}", context)
        if f"{name}.gate_{stream}.0.weight" in weights:
            gate = linear(f"{name}.gate_{stream}.2", F.silu(linear(f"{name}.gate_{stream}.0", context)))
            value = value * torch.sigmoid(gate)
        query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)

    image = tokens("visual", image_taps)
    queries = weights["query_tokens"].expand(len(temb), -1, -1)
    query = linear("attn1.to_q", rms("attn1.norm_q", queries))
    attended = attend("attn1", query, rms("attn1.norm_v", image), "vis")
    if text_taps:
        attended = attended + attend("attn1", query, rms("attn1.norm_t", tokens("text", text_taps)), "text")
    queries = queries + linear("attn1.to_out.0", attended)
    query = linear("attn2.to_q", rms("attn2.norm_q", queries))
    attended = attend("attn2", query, rms("attn2.norm_v", image), "vis")
    queries = queries + linear("attn2.to_out.0", attended)
    queries = queries + linear("ff.2", F.gelu(linear("ff.0", rms("norm_ff", queries))))
    return linear("head", queries)[..., 0].mean(dim=1)
