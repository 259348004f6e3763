"""The programs of the whole generator: what they are given, at full size, and that they lower."""

import numpy as np
import pytest

from dinalrm_jax.cli.flags import UsageError
from dinalrm_jax.cli.options import BenchmarkOptions
from dinalrm_jax.devices.mesh import MeshConfig, make_mesh
from dinalrm_jax.timing.generation import generation_program
from dinalrm_jax.timing.setting import Setting

# Millions of parameters: of SD3.5-Medium's transformer, of the reward's head and LoRA, of CLIP ViT-H/14 and SD3's VAE.
TRANSFORMER, REWARD, CLIP_H, VAE = 2243.8, 139.3 + 28.3, 986.1, 83.8


def program(mode):
    setting = Setting(mode, 64, 1, 77 + 16, dtype="bfloat16", layers="scan", remat="block")
    return generation_program(setting, make_mesh(MeshConfig(data=1)))


def millions(params, beginning=""):
    return sum(np.prod(x.shape) for name, x in params.items() if name.startswith(beginning)) / 1e6


def test_a_rollout_is_given_the_whole_transformer():
    generating = program("generate")
    params, latents, *_ = generating.arguments
    assert millions(params) == pytest.approx(TRANSFORMER, abs=0.05)
    assert {str(x.dtype) for x in params.values()} == {"bfloat16"}
    (found,) = [generating.lower().out_info]
    assert found.shape == latents.shape == (1, 8, 8, 16)


@pytest.mark.parametrize(("mode", "reward", "decoder"), [("refl", REWARD, 0), ("refl_pixels", CLIP_H, VAE)])
def test_refl_is_given_one_copy_of_the_backbone(mode, reward, decoder):
    """A reward of latents adds its head and adapters to it, one of pixels a VAE and a CLIP."""
    state, frozen, _ = program(mode).arguments
    assert millions(frozen, "policy.") == pytest.approx(TRANSFORMER, abs=0.05)
    assert millions(frozen, "reward0.") == pytest.approx(reward, abs=0.05)
    assert millions(frozen, "decoder.") == pytest.approx(decoder, abs=0.05)
    # Of rank 32 on the eight projections of 24 blocks, the last one without its text's, and of 13 second attentions.
    matrices = 24 * 8 - 4 + 13 * 4
    assert millions(state.params) == pytest.approx(matrices * 32 * 2 * 1536 / 1e6)
    assert {str(x.dtype) for x in state.params.values()} == {"float32"}


def test_they_are_not_timed():
    with pytest.raises(UsageError, match="the mode refl is compiled ahead, not timed"):
        BenchmarkOptions(setting=Setting("refl"))
