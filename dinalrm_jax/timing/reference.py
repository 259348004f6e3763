"""One call of the released PyTorch code at a time, for `dinalrm_jax.benchmark --reference PATH`.

    python dinalrm_jax/timing/reference.py PATH '{"mode": "score", "resolution": 256, ...}' [--compile]

PATH is a checkout of HKUST-C4G/diffusion-rm, which is run as it is, with random weights; the second argument holds
the fields of `dinalrm_jax.timing.setting.Setting`. The encoders are those that its pipelines use, of transformers and
diffusers. Prints a line of JSON when it is ready, and one with the seconds and the peak memory after each line on
standard input. Needs torch, diffusers, peft and what that code imports, and imports nothing of ours, whose memory
would count as its own.
"""

import argparse
import importlib.util
import json
import pathlib
import sys
import time
import types
from typing import Any


def build(path: str, setting: types.SimpleNamespace, compiled: bool):
    """The call to time, and what is known of it."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, setting.dtype)
    torch.manual_seed(0)
    if setting.mode == "text":
        work = text_work(setting, device, dtype)
    elif setting.mode == "image":
        work = image_work(setting, device, dtype)
    else:
        work = reward_work(path, setting, device, dtype, compiled)
    memory = load_memory()

    def call() -> dict:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return {
            "seconds": seconds,
            "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else memory.peak_bytes(),
        }

    def warm_up() -> dict:
        answer = call()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        memory.forget_peak()
        return answer

    about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": str(device)}
    return warm_up, call, about | {"compiled": compiled}


def reward_work(path: str, setting, device, dtype, compiled: bool):
    """The released model: score, ensemble, gradient or train."""
    sys.path.insert(0, path)
    import torch
    from diffusers import SD3Transformer2DModel
    from diffusion_rm.models.sd3_rm import SD3RewardModel
    from omegaconf import OmegaConf

    make: Any = SD3Transformer2DModel  # whose `.to` its annotations lack
    transformer = make(
        sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=setting.blocks + 1,
        attention_head_dim=64, num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536,
        pooled_projection_dim=2048, pos_embed_max_size=384, dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    ).to(device, dtype)  # fmt: skip
    stub = torch.nn.Linear(1, 1)
    names = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    pipeline = types.SimpleNamespace(**dict.fromkeys(names, stub), transformer=transformer)
    config = OmegaConf.load(f"{path}/config/sd3m/thurstone-12layer.yaml").model
    model = SD3RewardModel(pipeline, config, device, dtype)
    if compiled:
        model.backbone = torch.compile(model.backbone)

    rows, side = setting.batch, setting.resolution // 8
    latents = torch.randn(rows, 16, side, side).to(device, dtype)
    embeds = torch.randn(rows, setting.tokens, 4096).to(device, dtype)
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

    return {"score": score, "ensemble": ensemble, "gradient": gradient, "train": train}[setting.mode]


def text_work(setting, device, dtype):
    """CLIP ViT-L/14, ViT-bigG/14 and T5-XXL of transformers on random ids."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    torch.set_default_dtype(dtype)  # T5-XXL is not drawn in float32 first
    clip_l = CLIPTextConfig(hidden_size=768, intermediate_size=3072, projection_dim=768, num_attention_heads=12)
    clip_g = CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, projection_dim=1280, num_hidden_layers=32, num_attention_heads=20,
        hidden_act="gelu",
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    towers = [CLIPTextModelWithProjection(config).to(device).eval() for config in (clip_l, clip_g)]
    encoder = T5EncoderModel(t5).to(device).eval()
    ids = [torch.randint(2, 32000, (setting.batch, n), device=device) for n in (77, 77, setting.tokens - 77)]

    def work():
        with torch.no_grad():
            hidden = [tower(x, output_hidden_states=True).hidden_states[-2] for tower, x in zip(towers, ids)]
            return hidden, encoder(ids[2])[0]

    return work


def image_work(setting, device, dtype):
    """SD3's VAE of diffusers on random pixels."""
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), down_block_types=4 * ("DownEncoderBlock2D",),
        up_block_types=4 * ("UpDecoderBlock2D",), layers_per_block=2, latent_channels=16, use_quant_conv=False,
        use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609,
    ).to(device, dtype).eval()  # fmt: skip
    pixels = 2 * torch.rand(setting.batch, 3, setting.resolution, setting.resolution).to(device, dtype) - 1

    def work():
        with torch.no_grad():
            return (vae.encode(pixels).latent_dist.mode() - 0.0609) * 1.5305

    return work


def load_memory():
    """`memory.py` beside this file, without the package around it."""
    spec = importlib.util.spec_from_file_location("memory", pathlib.Path(__file__).with_name("memory.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference")
    parser.add_argument("setting", type=json.loads)
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    warm_up, call, about = build(arguments.reference, types.SimpleNamespace(**arguments.setting), arguments.compile)
    print(json.dumps(about), flush=True)
    for number, _ in enumerate(sys.stdin):
        print(json.dumps(call() if number else warm_up()), flush=True)


if __name__ == "__main__":
    main()
