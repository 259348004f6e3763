"""What the benchmark command counts and runs; the times themselves are nobody's test."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.config import RewardModelConfig
from dinalrm_jax.model.reward import stored_shapes
from dinalrm_jax.timing import loading
from dinalrm_jax.timing.costs import top_costs
from dinalrm_jax.timing.programs import model_flops
from dinalrm_jax.timing.setting import Setting
from dinalrm_jax.timing.work import make_work
from tests.conftest import ROOT, TINY

SMALL = Setting(resolution=64, batch=2, tokens=5)


@pytest.mark.parametrize(("side", "tera"), [(128, 6.4), (64, 1.3), (32, 0.4)])
def test_cost_model(side, tera):
    """The TFLOP that docs/method.md, Cost model, states for 12 blocks and 205 tokens at 1024, 512 and 256 pixels."""
    flops = model_flops(RewardModelConfig(), "score", rows=1, side=side, tokens=205)
    assert flops / 1e12 == pytest.approx(tera, rel=0.05)  # they are stated with two digits
    assert model_flops(RewardModelConfig(), "train", 2, side, 205) == 8 * flops


@pytest.mark.parametrize("mode", ["score", "train"])
def test_modes_run(mode):
    setting = dataclasses.replace(SMALL, mode=mode, merged=mode == "score", data=2)
    work = make_work(setting, TINY)
    result = work.call()
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(result))
    assert work.flops > model_flops(TINY, "score", 1, 8, 5) / 2
    if mode == "train":
        second, metrics = work.call()  # the next step, not the same one again
        assert int(second.step) == 2
        assert metrics["finite"]
    else:
        assert result.sharding.device_set == set(jax.devices()[:2])  # the batch was split


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "train", "merged": True}, "LoRA is what train trains"),
        ({"data": 4}, "batch 2 must be a multiple of .* 1 x 4 x 1"),
        ({"mode": "image", "remat": "block", "data": 2}, "mode image does not take remat, data, of the reward model"),
        ({"mode": "text", "tokens": 77}, "77 of CLIP and T5's, got 77 in all"),
    ],
)
def test_what_cannot_be_timed(options, message):
    with pytest.raises(ConfigError, match=message):
        make_work(dataclasses.replace(SMALL, **options), TINY)


def test_costs_are_named():
    x = np.ones((400, 400), np.float32)
    product = jax.jit(lambda x: jax.numpy.sin(x @ x)).lower(x).compile()
    costs = top_costs(lambda: jax.block_until_ready(product(x)))
    assert any("dot" in cost["name"] or "fusion" in cost["name"] for cost in costs)
    assert sum(cost["share"] for cost in costs) == pytest.approx(1)


def test_what_load_mode_runs(tmp_path):
    """Its checkpoint loads, and reading counts every byte of it."""
    loading.write_checkpoint(tmp_path / "native", TINY)
    _, count = loading.read(tmp_path / "native")
    assert count == sum(path.stat().st_size for path in (tmp_path / "native").glob("*.safetensors"))
    shapes = stored_shapes(TINY, SMALL.execution)
    numbers = sum(shape.size for shape in shapes.values())
    assert 0 < count - 4 * numbers < 300 * len(shapes)  # the headers
    loading.load(tmp_path / "native", "bfloat16")


PEAKS = """
import numpy as np
from dinalrm_jax.timing.memory import forget_peak, peak_bytes
forget_peak()
print(peak_bytes())
held = np.ones(50 * 2**20, np.uint8)
print(peak_bytes())
del held
forget_peak()
print(peak_bytes())
"""


def test_peak_memory_is_that_since_it_was_forgotten():
    """In a process of its own: the system may take pages back from one as large as the suite's."""
    done = subprocess.run([sys.executable, "-c", PEAKS], cwd=ROOT, capture_output=True, text=True, timeout=60)
    before, high, after = map(int, done.stdout.split())
    assert high >= before + 40 * 2**20
    assert after < high - 40 * 2**20


@pytest.mark.heavy
def test_benchmark_command(tmp_path):
    """One block, full width."""
    command = [sys.executable, "-m", "dinalrm_jax.benchmark", "--mode=score", "--resolution=32", "--blocks=1"]
    command += ["--tokens=4", "--repeats=1", f"--output={tmp_path / 'out' / 'score.json'}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    saved = json.loads((tmp_path / "out" / "score.json").read_text())
    assert (saved["setting"]["mode"], saved["setting"]["blocks"], saved["seconds"]["calls"]) == ("score", 1, 1)
    assert f"{saved['seconds']['median']:.3f} s (median of 1" in result.stdout
    assert saved["share_of_gemm_peak"] == pytest.approx(
        saved["gflop_per_second_and_device"] / saved["gemm_peak_gflop_per_second"], rel=1e-6
    )
