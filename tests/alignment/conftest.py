"""A tiny policy and a reward on its backbone, for the tests of what is computed from them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dinalrm_jax as dina
from dinalrm_jax.alignment.policy import Policy, PromptBatch
from dinalrm_jax.alignment.rewards import LatentReward, Rewards
from dinalrm_jax.config import (
    AlignConfig,
    OptimizerConfig,
    PolicyEvaluationConfig,
    ReFLConfig,
    RewardConfig,
    StageConfig,
)
from dinalrm_jax.devices.mesh import MeshConfig
from dinalrm_jax.model.backbone.family import transformer_functional
from dinalrm_jax.model.config import LoRAConfig, RewardModelConfig
from dinalrm_jax.model.encoding import EncodersConfig
from dinalrm_jax.model.execution import ExecutionConfig
from dinalrm_jax.model.lora import init_adapters
from dinalrm_jax.weights.pretrained import load_backbone, truncate
from tests.conftest import randomized

OPTIMIZER = OptimizerConfig(learning_rate=3e-3, weight_decay=0.0, warmup_steps=0, ema_decay=0.0)
REFL = ReFLConfig(steps=4, guidance=1.5, first=1, last=3)
PROMPTS = [
    f"{count} {colour} {thing}" for count in ("one", "two") for colour in ("red", "blue") for thing in ("cup", "dog")
]


@pytest.fixture(scope="session")
def reward_checkpoint(tiny_pipeline, tmp_path_factory):
    """A random reward on the pipeline's own backbone."""
    transformer, backbone = load_backbone(tiny_pipeline)
    config = RewardModelConfig(
        transformer=transformer, num_blocks=2, visual_taps=(1, 2), text_taps=(1,), encoders=EncodersConfig("sd3", 16),
        lora=LoRAConfig(2, 4.0),
    )  # fmt: skip
    model = dina.RewardModel.init(config)
    params = {**randomized(model.params), **truncate(backbone, config)}
    directory = tmp_path_factory.mktemp("reward") / "model"
    dataclasses.replace(model, params=jax.tree.map(jnp.asarray, params)).save(directory)
    return directory


@pytest.fixture
def config(tiny_pipeline, reward_checkpoint, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    stage = StageConfig(8, 3, optimizer=OPTIMIZER, checkpoint_every=1, evaluate_every=2, log_every=1)
    return AlignConfig(
        "tiny", str(tiny_pipeline), RewardConfig(str(reward_checkpoint)), stage, str(tmp_path / "prompts.txt"),
        refl=REFL, lora=LoRAConfig(2, 4.0), height=32, width=48, text_length=16,
        evaluation=PolicyEvaluationConfig(prompts=2, steps=3, guidance=1.5), mesh=MeshConfig(data=1),
    )  # fmt: skip


@pytest.fixture(scope="session")
def parts(tiny_pipeline, reward_checkpoint):
    """A policy with adapters that are not zero, its reward, all parameters, a batch of eight rows and their keys."""
    transformer, backbone = load_backbone(tiny_pipeline)
    lora = LoRAConfig(2, 4.0)
    tuned = transformer_functional(transformer, ExecutionConfig(), lora=lora)
    policy = Policy(tuned, transformer_functional(transformer, ExecutionConfig()), (4, 6, 16), 3.0)
    model = dina.RewardModel.from_pretrained(reward_checkpoint, tiny_pipeline)
    rng = np.random.default_rng(0)
    drawn = init_adapters(tuned.shapes, lora, 0)
    adapters = {name: jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32) for name, x in drawn.items()}
    params = {f"policy.{name}": array for name, array in {**backbone, **adapters}.items()}
    names = {name: f"reward0.{name}" for name in model.params}
    params |= {names[name]: array for name, array in model.params.items()}
    texts = [text for text in PROMPTS[:2] for _ in range(4)]
    embeds, negative = model.encode_prompt(texts), model.encode_prompt(8 * [""])
    batch = PromptBatch(embeds, negative, embeds, jnp.arange(8) // 4)
    rewards = Rewards({"reward": (LatentReward(dataclasses.replace(model, params={}), names, (0.4,)), 1.0)})
    return policy, rewards, params, batch, jax.random.split(jax.random.key(3), 8)
