"""The program for the first hour with a GPU, rehearsed on the CPU; it needs nothing that a bare GPU machine lacks."""

import copy
import json
import subprocess
import sys

import pytest

from benchmarks import measured
from benchmarks.gpu import tables
from tests.conftest import ROOT

ABSENT = ("diffusers", "grain", "array_record", "tensorflow_datasets", "tensorflow", "ml_collections", "orbax")
IMPORT = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT}:
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
import benchmarks.gpu.parts
assert "torch" not in sys.modules
"""


def rehearsal(output, parts):
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", f"--output={output}", f"--only={','.join(parts)}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((output / "gpu_cpu.json").read_text())
    assert set(result["parts"]) == {"device", *parts}
    return result


def test_it_needs_few_packages():
    done = subprocess.run([sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_scores_rehearsed(tmp_path):
    result = rehearsal(tmp_path, ("score_large_batch", "original_score"))
    parts = result["parts"]
    one = parts["score_large_batch"]
    assert one["images_per_second"] * one["seconds"]["median"] == pytest.approx(2)
    assert one["peak_gib"] > one["planned_gib"] > 0
    assert "--reference" in parts["original_score"]["not_measured"]

    table = tables.as_markdown(result)
    assert "| score, 64, batch 2 |" in table
    assert "Not measured: original_score (" in table
    failed = copy.deepcopy(result)
    failed["parts"]["score_large_batch"] = {"not_measured": "XlaRuntimeError: no memory"}
    assert "| score, 64, batch 2 |" not in tables.as_markdown(failed)
    assert "score_large_batch (XlaRuntimeError: no memory)" in tables.as_markdown(failed)


@pytest.mark.heavy
def test_the_other_parts_rehearsed(tmp_path):
    parts = rehearsal(tmp_path, ("golden", "kernels", "train_large", "refl", "server", "ahead"))["parts"]
    assert parts["refl"]["images_per_second"] * parts["refl"]["seconds"]["median"] == pytest.approx(2)
    assert parts["ahead"].get("needed_gib") or "cannot compile for h100 here" in parts["ahead"]["not_measured"]
    assert parts["golden"]["largest_float32"] < 1e-4  # docs/method.md: of scores; gradients are relative
    for kind, one in parts["kernels"]["by_tokens"]["70"].items():
        assert max(one["forward"], one["gradients"]) < 1e-5, kind
    assert parts["train_large"]["images_per_second"] * parts["train_large"]["seconds"]["median"] == pytest.approx(4)
    assert parts["server"]["largest_error"] < 1e-5


def test_a_card_s_section_appears_with_its_file(monkeypatch):
    text = measured.DOCUMENT.read_text()
    monkeypatch.setattr(tables, "all_markdown", lambda: "| a table |")
    assert "<!-- gpu: python -m benchmarks.gpu -->\n| a table |\n<!-- end of gpu -->" in measured.with_tables(text)
    monkeypatch.setattr(tables, "all_markdown", lambda: "")
    assert "<!-- gpu: python -m benchmarks.gpu -->\n<!-- end of gpu -->" in measured.with_tables(text)


def test_it_says_where_there_is_no_gpu(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", f"--output={tmp_path}", "--only=golden"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no GPU here (cpu); --rehearse" in done.stderr
    assert not list(tmp_path.iterdir())
