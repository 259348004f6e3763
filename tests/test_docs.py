"""The documents: links, pictures, tables from results on file, the README's length, the site."""

import importlib.util
import json
import re
import subprocess
import sys

import pytest
from PIL import Image

from benchmarks import experiments, measured, speed
from tests.conftest import ROOT

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"(!?)\[[^\]]*\]\(([^)\s]+)\)")


def anchors(text):
    """Of a document's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for picture, link in LINK.findall(text):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link
        if picture:
            with Image.open(target) as image:
                assert image.size[0] > 300, link


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


def test_tables_are_those_of_the_results_on_file():
    for path in (measured.README, measured.DOCUMENT):
        text = path.read_text()
        assert measured.MARKED.search(text)
        assert measured.with_tables(text) == text, "run python -m benchmarks.measured"
    assert speed.all_markdown()
    text = measured.DOCUMENT.read_text()
    assert speed.with_section(text, speed.all_markdown()) == text, "run python -m benchmarks.measured"


def test_every_file_of_results_is_shown():
    shown = {match[2] for match in measured.MARKED.finditer(measured.DOCUMENT.read_text())}
    of_machines = {f"{machine}_{name}" for machine, names in speed.SETS.items() for name in names}
    of_cards = {path.stem for path in measured.RESULTS.glob("gpu_*.json")}  # see test_gpu.py
    elsewhere = of_machines | of_cards | {experiments.RESULT.stem}
    assert {path.stem for path in measured.RESULTS.glob("*.json")} - elsewhere == shown


def test_experiments_on_ratings_are_those_on_file():
    text = experiments.DOCUMENT.read_text()
    shown = text.split(experiments.START)[1].split(experiments.END)[0].strip()
    assert shown == experiments.as_markdown(json.loads(experiments.RESULT.read_text()))


@pytest.mark.heavy
def test_the_site_builds(tmp_path):
    for name in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed; pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "standardized_margin" in (tmp_path / "site" / "api" / "preference" / "index.html").read_text()


@pytest.mark.heavy
def test_the_package_is_clean_under_the_type_checker():
    result = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout
