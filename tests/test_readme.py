"""Every snippet of the README and of docs/ runs: Python blocks in one session, commands in a real shell."""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import dinalrm_jax as dina
from dinalrm_jax.model.config import LoRAConfig, RewardModelConfig
from dinalrm_jax.noise import nearest_schedule_sigma
from dinalrm_jax.reward_model import ranks
from dinalrm_jax.scenes import rehearsal
from tests.conftest import GOLDEN, ROOT, randomized
from tests.data.source_files import ranking, write_hpdv2
from tests.server.serving import running

# In an order in which a later page may use what an earlier one made: the README, then the pages by their use.
FIRST = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("training", "scoring", "jax", "server"))]
PAGES = [*FIRST, *sorted({*(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"} - set(FIRST))]
OWN_PAIRS = "own pairs"  # a block that `test_own_pairs` runs as a whole
GOLDEN_STAND_INS = {
    "path/to/DiNa-LRM-SD35M-12layers": str(GOLDEN),
    "path/to/stable-diffusion-3.5-medium": str(GOLDEN),
}


# What other tests run: .ci/run, tests/test_launch.py and tests/test_examples.py; and commands that another one
# here differs from in its values only (overrides: tests/test_config.py).
RUN_ELSEWHERE = (
    "pip install torch",
    "local_processes.sh",
    "examples.ascend_latents",
    "--workdir runs/mine",
    "--config configs/hpdv3.py --config.data",
)


def blocks(language):
    """The blocks of a language, page by page, but for those that a comment before them says are not run, and why."""
    found = []
    for page in PAGES:
        fenced = re.finditer(rf"(?:<!-- ([^\n]*) -->\n)?```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)
        found += [(page.name, match[1] or "", match[2]) for match in fenced]
    return [(page, text) for page, comment, text in found if not comment.startswith(("not run: ", OWN_PAIRS))]


def with_stand_ins(text, paths):
    for name, path in paths.items():
        text = text.replace(name, path)
    return text


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Stand-ins for the published checkpoint and its base model, small and whole: weights, text encoders, VAE."""
    directory = tmp_path_factory.mktemp("published")
    rehearsal.write_pipeline(directory / "base")
    taps = {"num_blocks": 2, "visual_taps": (1, 2), "text_taps": (1, 2)}
    config = RewardModelConfig(rehearsal.TRANSFORMER, **taps, lora=LoRAConfig(2, 4.0))
    params = randomized(dina.RewardModel.init(config).params)
    dina.RewardModel(config, params).export_released(directory / "checkpoint")
    return {
        "path/to/DiNa-LRM-SD35M-12layers": str(directory / "checkpoint"),
        "path/to/stable-diffusion-3.5-medium": str(directory / "base"),
    }


def test_python_snippets(published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("fox_1.png", "fox_2.png"):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(name)
    exact = dina.RewardModel.from_pretrained(*published.values(), dtype="float32")
    session = {}
    with running(exact, warmup=("8x8x205",), max_batch_size=1) as server:
        stand_ins = {
            **published,
            "http://127.0.0.1:8000": server.url,
            "1024": "64",
        }  # the position table ends at 384 pixels
        for page, block in blocks("python"):
            exec(compile(with_stand_ins(block, stand_ins), page, "exec"), session)
    # The last model loaded is of bfloat16, the default: near the float32 scores.
    small = exact.score("a red fox in the snow", ["fox_1.png", "fox_2.png"], (0.2, 0.5, 0.7))
    np.testing.assert_allclose(session["better"], small, atol=0.1)
    assert session["ranks"] == ranks(session["better"])
    latents, prompt = session["latents"], session["prompt"]
    at_once = exact.score_latents(latents, prompt, 0.4)
    np.testing.assert_allclose(session["scores"], at_once, atol=0.1)
    np.testing.assert_allclose(session["again"], at_once, atol=0.1)
    nearest = float(nearest_schedule_sigma(0.4))
    np.testing.assert_allclose(session["served"], exact.score_latents(latents, prompt, nearest), atol=1e-4)
    assert exact.score_latents(session["improved"], prompt, 0.4).sum() > at_once.sum()
    assert session["model"].execution.remat == "block"
    assert session["images"].shape == (1, 64, 64, 3)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The files that the commands need, where `runs/` may be written."""
    directory = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "dinalrm_jax", "examples", "launch"):
        shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
    rows = [ranking(f"prompt {i}", [f"{i}{j}.png" for j in range(4)], [2, 1, 4, 3]) for i in range(12)]
    write_hpdv2(directory / "HPDv2", rows)
    rehearsal.write_pipeline(directory / "sd3")
    rehearsal.write_hpdv3(directory / "HPDv3", train_pairs=12, eval_pairs=3)
    return directory


def shell(command, checkout, timeout=300):
    environment = {**os.environ, "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", "-euc", command], cwd=checkout, capture_output=True, text=True, timeout=timeout, env=environment
    )


# One block and two steps: what is tested is that the command runs, on the configuration it names.
SHORT = " ".join(
    f"--config.{override}"
    for override in (
        "generator.steps=2",
        "generator.batch_size=4",
        "reward.steps=2",
        "reward.batch_size=4",
        "evaluation.batch_size=4",
        "model.transformer.num_layers=2",
        "model.transformer.dual_attention_layers='(0,)'",
        "model.num_blocks=1",
        "model.visual_taps='(1,)'",
        "model.text_taps='(1,)'",
    )
)
SHORT_SCENES = f"{SHORT} --config.scenes.train_pairs=8 --config.scenes.eval_pairs=4"


# Preprocessing and training of preference datasets, whose parts tests/data, test_train.py and test_launch.py run.
PREFERENCES = ("--dataset", "configs/hpdv2.py", ":smoke")


@pytest.mark.parametrize("preferences", [False, pytest.param(True, marks=pytest.mark.heavy)])
def test_commands(checkout, published, preferences):
    """In the order of the pages; training commands made short by further overrides."""
    commands = dict.fromkeys(line for _, block in blocks("bash") for line in block.splitlines())  # each once
    for name in ("fox_1.png", "fox_2.png"):
        Image.new("RGB", (40, 40), (int(name[4]) * 90, 90, 30)).save(checkout / name)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    ran, server = 0, None
    for command in commands:
        if any(name in command for name in RUN_ELSEWHERE):
            continue
        if any(name in command for name in PREFERENCES) != preferences:
            continue
        if "--dataset hpdv3" in command:
            # The published data and pipeline in small, and sizes to match.
            paths = {"path/to/HPDv3": "HPDv3", "path/to/stable-diffusion-3.5-medium": "sd3"}
            command = with_stand_ins(command, paths) + " --buckets 64x64,96x64 --min-area 1024"
        elif "smoke" in command:
            command += " --config.rehearsal.train_pairs=8 --config.rehearsal.eval_pairs=4 --config.reward.steps=2"
            command += " --config.model.num_blocks=1 --config.model.visual_taps='(1,)' --config.model.text_taps='(1,)'"
        elif "dinalrm_jax.train" in command:
            command += f" {SHORT if 'hpdv2' in command else SHORT_SCENES}"
        elif any(f"dinalrm_jax.{name} " in command for name in ("score", "generate", "evaluate", "serve", "client")):
            command = with_stand_ins(command, {**published, "8000": port})
            command += " --sigma 0.4" if "evaluate" in command else ""
        if "dinalrm_jax.serve" in command:
            serve = [sys.executable, *shlex.split(command)[1:], "--warmup=8x8x205", "--max-batch-size=1"]
            server = subprocess.Popen(serve, cwd=checkout, stderr=subprocess.DEVNULL)
            ran += 1
            continue
        command = with_stand_ins(command, {**GOLDEN_STAND_INS, "path/to/HPDv2": str(checkout / "HPDv2")})
        command = command.removeprefix("pip install -r requirements.txt && ")
        result = shell(command, checkout)
        assert result.returncode == 0, (command, result.stderr)
        ran += 1
        if "dinalrm_jax.client" in command:
            assert "is ready" in result.stdout
            server.send_signal(signal.SIGTERM)
            assert server.wait(30) == 0
    assert ran == (4 if preferences else 10)
    if preferences:
        report = (checkout / "runs" / "hpdv2" / "run" / "report" / "report.md").read_text()
        assert "Baseline without a model, the larger image file wins" in report
        return
    assert "HPDv2" in (checkout / "runs" / "hpdv2_evaluation" / "report.md").read_text()
    assert all((checkout / "runs" / name).exists() for name in ("foxes.png", "best_of_8/ranking.csv"))
    exported = dina.RewardModel.from_pretrained(checkout / "runs" / "released", GOLDEN, dtype="float32")
    golden = dina.RewardModel.from_pretrained(GOLDEN, GOLDEN, dtype="float32")
    for name in golden.params:
        np.testing.assert_array_equal(exported.params[name], golden.params[name], err_msg=name)
    assert (checkout / "runs" / "quickstart" / "report" / "pairs.png").exists()


@pytest.mark.heavy
def test_own_pairs(checkout):
    """The block for people's own pairs, on a dozen drawn ones; its training made short."""
    (block,) = re.findall(
        rf"<!-- {OWN_PAIRS} -->\n```bash\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), flags=re.DOTALL
    )
    own, rng = checkout / "own", np.random.default_rng(0)
    own.mkdir()
    for number in range(12):
        (own / f"{number}.txt").write_text(f"a small picture, number {number}")
        for side, spread in (("chosen", 20), ("rejected", 120)):
            pixels = np.clip(rng.normal(128, spread, (72, 80, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(own / f"{number}.{side}.png")
    result = shell(block.replace("--workdir runs/own/run", f"--workdir runs/own/run {SHORT}"), checkout)
    assert result.returncode == 0, result.stderr
    assert (checkout / "runs" / "own" / "run" / "report" / "report.md").exists()
    assert "0.rejected.png" in result.stdout


def test_launch_script(checkout):
    """What it would run; the same command runs above."""
    command = "PYTHON=echo CONFIG=configs/quickstart.py WORKDIR=runs/launched launch/one_host.sh --config.seed=1"
    result = shell(command, checkout)
    expected = "-m dinalrm_jax.train --config configs/quickstart.py --workdir runs/launched --config.seed=1"
    assert (result.returncode, result.stdout.strip()) == (0, expected)
    result = shell("launch/one_host.sh", checkout)
    assert result.returncode != 0
    assert "set CONFIG to a file under configs/" in result.stderr
