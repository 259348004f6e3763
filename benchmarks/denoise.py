"""A guided denoising step of SD3.5-Medium's transformer beside diffusers', in turn, on this machine.

    python -m benchmarks.denoise [--resolution 256] [--blocks 12] [--repeats 5]

Both have the same random weights in float32, and get one image's latents with and without its prompt, as
classifier-free guidance has it. Twelve of the 24 blocks are the default: two whole transformers take 18 GB. Prints
seconds, their ratio (above 1: ours is faster) and the largest difference of the velocities.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from dinalrm_jax import noise
from dinalrm_jax.model.backbone.family import transformer_functional
from dinalrm_jax.model.backbone.sd3.config import SD3Config
from dinalrm_jax.model.backbone.sd3.weights import table
from dinalrm_jax.model.batch import PromptEmbeds
from dinalrm_jax.model.execution import ExecutionConfig
from dinalrm_jax.model.tables import dump

TOKENS = 333


def random_weights(shapes) -> dict[str, np.ndarray]:
    """Such that a token keeps its size."""
    numbers = np.random.default_rng(0).standard_normal(1 << 22, np.float32)
    return {
        name: np.ones(shape.shape, np.float32)
        if len(shape.shape) < 2
        else np.resize(numbers, shape.shape) * np.float32(np.prod(shape.shape[1:]) ** -0.5)
        for name, shape in shapes.items()
    }


def main(argv: list[str]) -> None:
    import torch
    from diffusers import SD3Transformer2DModel

    values = flags.FLAGS
    config = SD3Config(num_layers=values.blocks, dual_attention_layers=tuple(range(min(13, values.blocks))))
    module = transformer_functional(config, ExecutionConfig("float32"))
    params = random_weights(module.shapes)
    with torch.device("meta"):
        theirs = SD3Transformer2DModel(
            sample_size=config.sample_size, num_layers=config.num_layers, in_channels=config.in_channels,
            num_attention_heads=config.num_attention_heads, attention_head_dim=config.attention_head_dim,
            joint_attention_dim=config.joint_attention_dim, caption_projection_dim=config.caption_projection_dim,
            pooled_projection_dim=config.pooled_projection_dim, out_channels=config.in_channels,
            pos_embed_max_size=config.pos_embed_max_size, dual_attention_layers=config.dual_attention_layers,
            qk_norm="rms_norm",
        ).eval()  # fmt: skip
    tensors = {name: torch.from_numpy(array) for name, array in dump(params, table(config)).items()}
    theirs.load_state_dict(tensors, strict=True, assign=True)
    side, spec = values.resolution // 8, config.latents
    rng = np.random.default_rng(0)
    latents = np.repeat(rng.standard_normal((1, side, side, spec.channels)).astype(np.float32), 2, axis=0)
    embeds = rng.standard_normal((2, TOKENS, spec.text_width)).astype(np.float32)
    pooled = rng.standard_normal((2, spec.pooled_width)).astype(np.float32)
    sigma = np.full(2, 0.6, np.float32)
    prompt = jax.tree.map(jnp.asarray, PromptEmbeds(embeds, pooled))
    step = jax.jit(lambda params, x: module.bind(params).velocity(x, noise.timestep(sigma), prompt))
    held = jax.device_put(params)
    arguments = {
        "hidden_states": torch.from_numpy(latents.transpose(0, 3, 1, 2).copy()),
        "timestep": torch.from_numpy(1000 * sigma),
        "encoder_hidden_states": torch.from_numpy(embeds),
        "pooled_projections": torch.from_numpy(pooled),
    }
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for number in range(1 + values.repeats):
        started = time.perf_counter()
        ours = np.asarray(step(held, latents))
        between = time.perf_counter()
        with torch.no_grad():
            reference = theirs(**arguments).sample.numpy().transpose(0, 2, 3, 1)
        ended = time.perf_counter()
        if number:  # the first call compiles
            times["ours"].append(between - started)
            times["theirs"].append(ended - between)
    error = np.abs(ours - reference).max() / np.abs(reference).max()
    medians = {name: statistics.median(found) for name, found in times.items()}
    for name, found in times.items():
        print(f"{name}: {medians[name]:.3f} s a step ({min(found):.3f} to {max(found):.3f}, {len(found)} calls)")
    ratio = medians["theirs"] / medians["ours"]
    print(f"their time over ours: {ratio:.2f}; velocities differ by {error:.1e} of the largest")
    size = f"{values.blocks} blocks, {values.resolution} pixels, float32"
    print(f"{size}, jax {jax.__version__}, torch {torch.__version__}")


if __name__ == "__main__":
    flags.DEFINE_integer("resolution", 256, "Side of the image in pixels.")
    flags.DEFINE_integer("blocks", 12, "Of the transformer.", lower_bound=1, upper_bound=24)
    flags.DEFINE_integer("repeats", 5, "Timed calls, after one to warm up.", lower_bound=1)
    app.run(main)
