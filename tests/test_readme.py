"""Every snippet of the README runs: Python blocks in one session, commands in a real shell."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import dinalrm_jax as dina
from tests.conftest import GOLDEN, ROOT, random_inputs
from tests.data.test_hpdv2 import row, write_source

README = (ROOT / "README.md").read_text()
STAND_INS = {
    "path/to/DiNa-LRM-SD35M-12layers": str(GOLDEN),
    "path/to/stable-diffusion-3.5-medium": str(GOLDEN),
}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def with_stand_ins(text, extra=None):
    for name, path in {**STAND_INS, **(extra or {})}.items():
        text = text.replace(name, path)
    return text


def test_python_snippets(golden_model):
    latents, _, prompt = random_inputs(golden_model.config.transformer)
    session = {
        "latents": latents,
        "prompt_embeds": np.asarray(prompt.prompt_embeds),
        "pooled_prompt_embeds": np.asarray(prompt.pooled_prompt_embeds),
    }
    for block in blocks("python"):
        exec(compile(with_stand_ins(block), "README.md", "exec"), session)
    # bfloat16 by default: near the float32 scores, and the ascent raises the reward.
    np.testing.assert_allclose(session["scores"], golden_model.score_latents(latents, prompt, 0.4), atol=0.1)
    exact = golden_model.score_latents(latents, prompt, (0.2, 0.5, 0.7))
    np.testing.assert_allclose(session["better"], exact, atol=0.1)
    improved = golden_model.score_latents(session["improved"], prompt, 0.4)
    assert improved.sum() > golden_model.score_latents(latents, prompt, 0.4).sum()
    assert session["model"].execution.remat == "block"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The files that the commands need, where `runs/` may be written."""
    directory = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "dinalrm_jax", "launch"):
        shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
    rows = [row(f"prompt {i}", [f"{i}{j}.png" for j in range(4)], [2, 1, 4, 3]) for i in range(12)]
    write_source(directory / "HPDv2", rows)
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


def test_commands(checkout):
    """In README order; training commands made short by further overrides."""
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    ran = 0
    for command in commands:
        if command.startswith("pip install torch"):
            continue  # .ci/run runs this one
        command = with_stand_ins(command, {"path/to/HPDv2": str(checkout / "HPDv2")})
        command = command.removeprefix("pip install -r requirements.txt && ")
        if "dinalrm_jax.train" in command:
            command = f"{command} {SHORT if 'hpdv2' in command else SHORT_SCENES}"
        result = shell(command, checkout)
        assert result.returncode == 0, (command, result.stderr)
        ran += 1
    assert ran == 6
    exported = dina.RewardModel.from_pretrained(checkout / "runs" / "released", GOLDEN, dtype="float32")
    golden = dina.RewardModel.from_pretrained(GOLDEN, GOLDEN, dtype="float32")
    for name in golden.params:
        np.testing.assert_array_equal(exported.params[name], golden.params[name], err_msg=name)
    assert (
        "Baseline without a model, the larger image file wins"
        in (checkout / "runs" / "hpdv2" / "run" / "report" / "report.md").read_text()
    )
    assert (checkout / "runs" / "quickstart" / "report" / "pairs.png").exists()


def test_launch_script(checkout):
    command = "CONFIG=configs/quickstart.py WORKDIR=runs/launched launch/one_host.sh " + SHORT_SCENES
    result = shell(command, checkout)
    assert result.returncode == 0, result.stderr
    assert (checkout / "runs" / "launched" / "model" / "trained.safetensors").exists()
    result = shell("launch/one_host.sh", checkout)
    assert result.returncode != 0
    assert "set CONFIG to a file under configs/" in result.stderr


def test_pictures_exist():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        with Image.open(ROOT / path) as image:
            assert image.size[0] > 300
