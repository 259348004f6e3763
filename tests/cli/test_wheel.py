"""What is built and installed."""

import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.heavy
def test_the_wheel_carries_the_configs_and_nothing_else(tmp_path):
    tree = tmp_path / "tree"
    for name in ("dinalrm_jax", "configs", "tests/cli", "benchmarks"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "requirements.txt"):
        shutil.copy(ROOT / name, tree / name)
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path / 'dist')!r})"
    (tmp_path / "dist").mkdir()
    subprocess.run([sys.executable, "-c", build], cwd=tree, check=True, capture_output=True)
    (sdist,) = (tmp_path / "dist").iterdir()
    pip = [sys.executable, "-m", "pip"]
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "wheel", *offline, "-w", tmp_path, sdist], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", *offline, "--target", site, wheel], check=True, capture_output=True)
    found = {path.name for path in site.iterdir()}
    assert {name for name in found if not name.endswith(".dist-info")} == {"bin", "dinalrm_jax"}
    program = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import dinalrm_jax; from dinalrm_jax.cli import configs\n"
        f"assert dinalrm_jax.__file__.startswith({str(site)!r})\n"
        "print(configs.shipped_names()); print(configs.load_config('configs/hpdv2.py', [], ()).name)"
    )
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=tmp_path / "elsewhere", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "quickstart.py" in done.stdout
    assert done.stdout.endswith("hpdv2\n")
