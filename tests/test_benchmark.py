"""What the benchmark command counts and runs; the times themselves are nobody's test."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from dinalrm_jax.config import ExecutionConfig, RewardModelConfig
from dinalrm_jax.timing.work import make_work, model_flops
from tests.conftest import ROOT, TINY


@pytest.mark.parametrize(("side", "tera"), [(128, 6.4), (64, 1.3), (32, 0.4)])
def test_cost_model(side, tera):
    """The TFLOP that method.md 8 states for 12 blocks and 205 tokens at 1024, 512 and 256 pixels."""
    flops = model_flops(RewardModelConfig(), "score", rows=1, side=side, tokens=205)
    assert flops / 1e12 == pytest.approx(tera, rel=0.05)  # they are stated with two digits
    assert model_flops(RewardModelConfig(), "train", 2, side, 205) == 8 * flops


@pytest.mark.parametrize("mode", ["score", "train"])
def test_modes_run(mode):
    work = make_work(mode, TINY, ExecutionConfig(), rows=2, side=8, tokens=5, merged=mode == "score")
    result = work.call()
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(result))
    assert work.flops > model_flops(TINY, "score", 1, 8, 5) / 2
    if mode == "train":
        second, metrics = work.call()  # the next step, not the same one again
        assert int(second.step) == 2
        assert metrics["finite"]


@pytest.mark.heavy
def test_benchmark_command(tmp_path):
    """One block, full width."""
    command = [sys.executable, "-m", "dinalrm_jax.benchmark", "--mode=score", "--resolution=32", "--blocks=1"]
    command += ["--tokens=4", "--repeats=1", f"--output={tmp_path / 'out' / 'score.json'}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    saved = json.loads((tmp_path / "out" / "score.json").read_text())
    assert (saved["mode"], saved["blocks"], saved["seconds"]["calls"]) == ("score", 1, 1)
    assert f"{saved['seconds']['median']:.3f} s (median of 1" in result.stdout
    assert saved["share_of_gemm_peak"] == pytest.approx(
        saved["gflop_per_second"] / saved["gemm_peak_gflop_per_second"], rel=1e-6
    )
