"""One call of the released PyTorch code at a time, for `dinalrm_jax.benchmark --reference PATH`.

    python -m dinalrm_jax.timing.reference PATH --mode score --rows 1 --side 32 --tokens 205 --blocks 12 --dtype float32

PATH is a checkout of HKUST-C4G/diffusion-rm, which is run as it is, with random weights. Prints a line of
JSON when it is ready, and one with the seconds and the peak memory after each line on standard input. Needs
torch, diffusers, peft and what that code imports.
"""

import argparse
import json
import resource
import sys
import time
import types


def build(arguments: argparse.Namespace):
    """The call to time."""
    sys.path.insert(0, arguments.reference)
    import torch
    from diffusers import SD3Transformer2DModel
    from diffusion_rm.models.sd3_rm import SD3RewardModel
    from omegaconf import OmegaConf

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=arguments.blocks + 1,
        attention_head_dim=64, num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536,
        pooled_projection_dim=2048, pos_embed_max_size=384, dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    ).to(device, dtype)  # fmt: skip
    stub = torch.nn.Linear(1, 1)
    names = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    pipeline = types.SimpleNamespace(**dict.fromkeys(names, stub), transformer=transformer)
    config = OmegaConf.load(f"{arguments.reference}/config/sd3m/thurstone-12layer.yaml").model
    model = SD3RewardModel(pipeline, config, device, dtype)
    if arguments.compile:
        model.backbone = torch.compile(model.backbone)

    rows, side = arguments.rows, arguments.side
    latents = torch.randn(rows, 16, side, side).to(device, dtype)
    embeds = torch.randn(rows, arguments.tokens, 4096).to(device, dtype)
    pooled = torch.randn(rows, 2048).to(device, dtype)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-5, weight_decay=0.01)

    def at(sigma):
        return torch.full((rows,), 1000 * sigma, device=device, dtype=dtype)

    def score():
        with torch.no_grad():
            return model(latents, embeds, pooled, at(0.4))

    def ensemble():
        with torch.no_grad():
            return model.forward_ensemble(3 * [latents], embeds, pooled, [at(0.2), at(0.5), at(0.7)])

    def gradient():
        x = latents.clone().requires_grad_(True)
        return torch.autograd.grad(model(x, embeds, pooled, at(0.4)).sum(), x)[0]

    def train():
        chosen = model(latents, embeds, pooled, at(0.4))
        rejected = model(0.9 * latents, embeds, pooled, at(0.4))
        z = (chosen - rejected).float() / (2 * (2 * 0.4**2 + 0.01)) ** 0.5
        (1 - torch.sqrt(torch.special.ndtr(z) + 1e-6)).mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    work = {"score": score, "ensemble": ensemble, "gradient": gradient, "train": train}[arguments.mode]

    def call() -> dict:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"seconds": time.perf_counter() - start, "peak_bytes": peak}

    return call, {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": str(device)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference")
    parser.add_argument("--mode", required=True)
    parser.add_argument("--dtype", required=True)
    for name in ("rows", "side", "tokens", "blocks"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--compile", action="store_true")
    call, about = build(parser.parse_args())
    print(json.dumps(about), flush=True)
    for _ in sys.stdin:
        print(json.dumps(call()), flush=True)


if __name__ == "__main__":
    main()
