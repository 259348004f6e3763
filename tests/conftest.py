"""Shared fixtures. Four virtual CPU devices, so that meshes are real; everything else uses the first."""

import dataclasses
import os
import pathlib

import jax
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden" / "released-tiny"
CACHE = ROOT / ".jax_cache"

# Subprocesses inherit the cache; four devices are for this process only.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
# The suite compiles hundreds of small programs and runs each for milliseconds.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
jax.config.update("jax_disable_most_optimizations", os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1")
if jax.__version__.startswith("0.10."):  # XLA ends a process that names a flag it does not know
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")  # less time in the compiler
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_default_matmul_precision", "highest")

import jaxtyping  # noqa: E402

# The annotated axes are checked, here and only here: jaxtyping's of every array, in every function of these modules.
HOOK = jaxtyping.install_import_hook(
    [
        f"dinalrm_jax.{name}"
        for name in ("noise", "preference", "sampling", "model.reward", "model.head", "model.lrm",
                     "model.backbone.attention.attend", "model.backbone.mmdit", "model.backbone.sd3.transformer")
    ],
    "beartype.beartype",
)  # fmt: skip

import dinalrm_jax as dina  # noqa: E402
from dinalrm_jax.model.backbone.sd3.config import SD3Config  # noqa: E402
from dinalrm_jax.model.config import LoRAConfig, RewardModelConfig  # noqa: E402
from dinalrm_jax.model.encoding import EncodersConfig  # noqa: E402
from dinalrm_jax.model.parameters import Params  # noqa: E402
from dinalrm_jax.scenes import rehearsal  # noqa: E402

TINY_SD3 = SD3Config(
    sample_size=16,
    num_layers=4,
    num_attention_heads=2,
    attention_head_dim=8,
    joint_attention_dim=24,
    caption_projection_dim=16,
    pooled_projection_dim=20,
    pos_embed_max_size=12,
    dual_attention_layers=(0, 1),
)
TINY = RewardModelConfig(
    transformer=TINY_SD3, num_blocks=3, visual_taps=(1, 3), text_taps=(1, 3), lora=LoRAConfig(rank=2, alpha=4.0)
)


# The longest files, begun first, so that no worker is left with one of them at the end.
LONGEST = (
    "test_readme.py",
    "test_launch.py",
    "test_train.py",
    "test_step.py",
    "test_process.py",
    "test_reward_model.py",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def randomized(params: Params, seed: int = 0) -> Params:
    """Every parameter redrawn, so that nothing hides behind a zero or a one of the initialisation."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, array in params.items():
        draw = rng.standard_normal(array.shape).astype(np.float32)
        if name.endswith("pos_embed.pos_embed"):
            out[name] = array
        elif array.ndim == 1 and name.endswith("weight"):
            out[name] = 1 + 0.2 * draw
        else:
            out[name] = draw * (0.3 if array.ndim < 2 else array.shape[-1] ** -0.5)
    return {name: jax.numpy.asarray(array) for name, array in out.items()}


def random_inputs(config: SD3Config, batch: int = 2, height: int = 8, width: int = 12, tokens: int = 5, seed: int = 1):
    """(latents, noise, prompt) for a model of this geometry."""
    rng = np.random.default_rng(seed)
    latents, noise = rng.standard_normal((2, batch, height, width, config.in_channels)).astype(np.float32)
    prompt = dina.PromptEmbeds(
        rng.standard_normal((batch, tokens, config.joint_attention_dim)).astype(np.float32),
        rng.standard_normal((batch, config.pooled_projection_dim)).astype(np.float32),
    )
    return latents, noise, jax.tree.map(jax.numpy.asarray, prompt)


@pytest.fixture(scope="session")
def cases() -> dict[str, np.ndarray]:
    """The released code's inputs and outputs; images of the batch channels-last."""
    channels_first = {"latents_chosen", "latents_rejected", "noise", "velocity_base", "grad_latents"}
    with np.load(GOLDEN / "cases.npz") as data:
        return {name: data[name].transpose(0, 2, 3, 1) if name in channels_first else data[name] for name in data}


@pytest.fixture(scope="session")
def golden_prompt(cases) -> dina.PromptEmbeds:
    return dina.PromptEmbeds(
        jax.numpy.asarray(cases["encoder_hidden_states"]), jax.numpy.asarray(cases["pooled_projections"])
    )


@pytest.fixture(scope="session")
def golden_model() -> dina.RewardModel:
    return dina.RewardModel.from_pretrained(GOLDEN, GOLDEN, dtype="float32")


@pytest.fixture(scope="session")
def tiny_model() -> dina.RewardModel:
    model = dina.RewardModel.init(TINY)
    return dina.RewardModel(TINY, randomized(model.params), model.execution)


@pytest.fixture(scope="session")
def scene_model() -> dina.RewardModel:
    """Of the quickstart's kind, with the built-in encoders, so that it scores images and prompts without files."""
    transformer = dataclasses.replace(TINY_SD3, num_layers=2, joint_attention_dim=64, pooled_projection_dim=64)
    taps = {"num_blocks": 1, "visual_taps": (1,), "text_taps": (1,)}
    config = dataclasses.replace(TINY, transformer=transformer, **taps, encoders=EncodersConfig("tiny", 16))
    return dina.RewardModel(config, randomized(dina.RewardModel.init(config).params))


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory):
    """A random SD3 pipeline directory."""
    directory = tmp_path_factory.mktemp("pipeline") / "sd3"
    rehearsal.write_pipeline(directory)
    return directory


@pytest.fixture(scope="session")
def rehearsal_source(tmp_path_factory):
    """A small HPDv3 directory."""
    directory = tmp_path_factory.mktemp("hpdv3") / "source"
    rehearsal.write_hpdv3(directory, train_pairs=9, eval_pairs=3)
    return directory


@pytest.fixture(scope="session")
def alignment_cases():
    """Random arrays, and what verl-omni's scheduler and losses and LPO's selection compute from them."""
    with np.load(ROOT / "tests" / "golden" / "alignment.npz") as found:
        return {name: found[name] for name in found.files}
