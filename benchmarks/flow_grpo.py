"""A step of Flow-GRPO beside the same step in PyTorch, in turn, on this machine.

    python -m benchmarks.flow_grpo [--prompts 4] [--repeats 10]

On the golden model's transformer with LoRA of rank 4, and its reward: eight images of every prompt by ten steps, the
first three with the noise of "sde", two updates with the KL divergence from the reference, AdamW, float32. PyTorch's
side is diffusers' transformer with PEFT's adapters and the released reward model's modules. Prints seconds, their ratio
(above 1: ours is faster) and whether anything was compiled after the first step.
"""

import pathlib
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import dinalrm_jax as dina
from dinalrm_jax import sampling
from dinalrm_jax.alignment.flow_grpo import flow_grpo
from dinalrm_jax.alignment.opened import names_in
from dinalrm_jax.alignment.policy import POLICY, REWARD, Policy, PromptBatch
from dinalrm_jax.alignment.rewards import LatentReward, Rewards
from dinalrm_jax.config import FlowGRPOConfig, OptimizerConfig, StageConfig
from dinalrm_jax.devices.mesh import MeshConfig, make_mesh
from dinalrm_jax.model.backbone.family import transformer_functional
from dinalrm_jax.model.config import LoRAConfig
from dinalrm_jax.model.execution import ExecutionConfig
from dinalrm_jax.model.lora import init_adapters
from dinalrm_jax.training.step import assemble
from dinalrm_jax.weights.pretrained import load_backbone
from dinalrm_jax.weights.verify import ReleasedInTorch

GOLDEN = pathlib.Path(__file__).parent.parent / "tests" / "golden" / "released-tiny"
GRPO = FlowGRPOConfig(steps=10, kind="sde", noise_level=0.7, window=3, first=0, last=3, group=8, clip_range=1e-4)
LORA, KL, RATE, SIGMA, SIDE, TOKENS = LoRAConfig(4, 8.0), 0.004, 5e-5, 0.4, (8, 12), 24
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


def ours(embeds: np.ndarray, pooled: np.ndarray) -> Callable[[], None]:
    """A jitted step, compiled by its first call."""
    config, base = load_backbone(GOLDEN)
    execution, mesh = ExecutionConfig("float32"), make_mesh(MeshConfig(data=1))
    tuned = transformer_functional(config, execution, lora=LORA)
    policy = Policy(tuned, transformer_functional(config, execution), (*SIDE, config.latents.channels), 3.0)
    model = dina.RewardModel.from_pretrained(GOLDEN, GOLDEN, dtype="float32")
    names = names_in(model.params, base, f"{REWARD}0.")
    rewards = Rewards({"reward": (LatentReward(model, names, (SIGMA,)), 1.0)})
    collection, objective = flow_grpo(policy, rewards, GRPO, KL)
    whole = jax.NamedSharding(mesh, jax.sharding.PartitionSpec())
    frozen = {f"{POLICY}{name}": array for name, array in base.items()}
    frozen = jax.device_put(frozen | {names[name]: array for name, array in model.params.items()}, whole)
    drawn = init_adapters(tuned.shapes, LORA, 0)
    adapters = jax.device_put({f"{POLICY}{name}": jnp.asarray(array) for name, array in drawn.items()}, whole)
    stage = StageConfig(len(embeds), steps=1000, optimizer=OptimizerConfig(RATE, warmup_steps=0, ema_decay=0.0))
    assembled = assemble(objective, adapters, frozen, stage, mesh, collection=collection)
    prompt = dina.PromptEmbeds(jnp.asarray(embeds), jnp.asarray(pooled))
    batch = jax.device_put(PromptBatch(prompt, prompt, prompt, jnp.arange(len(embeds))), whole)
    state = assembled.state

    def step() -> None:
        nonlocal state
        with jax.set_mesh(mesh):
            state, _ = jax.block_until_ready(assembled.step(state, assembled.frozen, batch))

    step.compiled = assembled.step._cache_size  # type: ignore[attr-defined]
    return step


def theirs(embeds: np.ndarray, pooled: np.ndarray) -> Callable[[], None]:
    """The same in PyTorch."""
    import torch
    from diffusers import SD3Transformer2DModel
    from peft import LoraConfig

    config, _ = load_backbone(GOLDEN)
    transformer = SD3Transformer2DModel.from_pretrained(GOLDEN, subfolder="transformer").float()
    transformer.add_adapter(LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules=TARGETS))
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE)
    reward = ReleasedInTorch(str(GOLDEN), str(GOLDEN), dina.RewardModel.from_pretrained(GOLDEN, GOLDEN).config)
    sigmas = sampling.schedule(GRPO.steps).tolist()
    text, pool = torch.from_numpy(embeds), torch.from_numpy(pooled)

    def velocity(x, level: float, rows=slice(None)):
        return transformer(
            hidden_states=x, timestep=torch.full((len(x),), 1000 * level), encoder_hidden_states=text[rows],
            pooled_projections=pool[rows],
        ).sample  # fmt: skip

    def transition(x, v, index: int):
        sigma, following = sigmas[index], sigmas[index + 1]
        h = sigma - following
        g = GRPO.noise_level * (sigma / (1 - (sigmas[1] if sigma == 1 else sigma))) ** 0.5
        mean = x * (1 - g**2 * h / (2 * sigma)) - v * (1 + g**2 * (1 - sigma) / (2 * sigma)) * h
        return mean, g * h**0.5

    def log_prob(mean, std: float, x):
        return (-((x - mean) ** 2) / (2 * std**2)).mean(dim=(1, 2, 3))

    def step() -> None:
        visited, old = [], []
        with torch.no_grad():
            x = torch.randn(len(embeds), config.latents.channels, *SIDE)
            for index in range(GRPO.steps):
                v = velocity(x, sigmas[index])
                if index < GRPO.window:
                    mean, std = transition(x, v, index)
                    after = mean + std * torch.randn_like(x)
                    visited.append((x, after))
                    old.append(log_prob(mean, std, after))
                    x = after
                else:
                    x = x + (sigmas[index + 1] - sigmas[index]) * v
            latents = x.permute(0, 2, 3, 1)
            raw = reward.forward(latents, text, pool, torch.randn_like(latents), SIGMA)
            grouped = raw.reshape(-1, GRPO.group)
            advantage = ((grouped - grouped.mean(dim=1, keepdim=True)) / (raw.std() + 1e-4)).reshape(-1).clamp(-5, 5)
        for number in range(GRPO.updates):
            rows = slice(number, None, GRPO.updates)
            optimizer.zero_grad()
            for index, (before, after) in enumerate(visited):
                x, wanted, a = before[rows], after[rows], advantage[rows]
                mean, std = transition(x, velocity(x, sigmas[index], rows), index)
                transformer.disable_adapters()
                with torch.no_grad():
                    plain, _ = transition(x, velocity(x, sigmas[index], rows), index)
                transformer.enable_adapters()
                ratio = torch.exp(log_prob(mean, std, wanted) - old[index][rows])
                clipped = ratio.clamp(1 - GRPO.clip_range, 1 + GRPO.clip_range)
                distance = ((mean - plain) ** 2).mean(dim=(1, 2, 3)) / (2 * std**2)
                loss = torch.maximum(-a * ratio, -a * clipped).mean() + KL * distance.mean()
                (loss / GRPO.window).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()

    return step


def main(argv: list[str]) -> None:
    import torch

    values = flags.FLAGS
    config, _ = load_backbone(GOLDEN)
    images, rng = values.prompts * GRPO.group, np.random.default_rng(0)
    embeds = rng.standard_normal((images, TOKENS, config.latents.text_width)).astype(np.float32)
    pooled = rng.standard_normal((images, config.latents.pooled_width)).astype(np.float32)
    steps = {"ours": ours(embeds, pooled), "theirs": theirs(embeds, pooled)}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(1 + values.repeats):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if number:  # the first one compiles
                times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(found) for name, found in times.items()}
    for name, found in times.items():
        print(f"{name}: {medians[name]:.3f} s a step ({min(found):.3f} to {max(found):.3f}, {len(found)} steps)")
    print(f"their time over ours: {medians['theirs'] / medians['ours']:.2f}")
    print(f"programs of ours: {steps['ours'].compiled()}")  # type: ignore[attr-defined]
    print(f"{images} images, jax {jax.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    flags.DEFINE_integer("prompts", 4, "Of a step, with eight images each.", lower_bound=1)
    flags.DEFINE_integer("repeats", 10, "Timed steps, after one to warm up.", lower_bound=1)
    app.run(main)
