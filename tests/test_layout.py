"""The map of the package: who may import whom."""

import ast
import pathlib

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "dinalrm_jax"
COMMANDS = (
    "train", "align", "evaluate", "preprocess", "convert", "score", "generate", "judge", "serve", "benchmark",
    "client", "__main__",
)  # fmt: skip
# From the floor to the roof: a part imports itself and what stands before it.
PARTS = (
    "mapping", "disk", "noise", "preference", "sampling",
    "devices", "model", "weights", "encoders", "data", "scenes", "config", "evaluation", "training",
    "reward_model", "openvino", "generator", "alignment", "__init__", "server", "timing", "cli", *COMMANDS,
)  # fmt: skip


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts if parts[-1] != "__init__" or len(parts) == 2 else parts[:-1])


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def imports_of(path: pathlib.Path) -> set[str]:
    """The package's modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dinalrm_jax"):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("dinalrm_jax")}
    return {"dinalrm_jax.__init__" if name == "dinalrm_jax" else name for name in found}


IMPORTS = {name: imports_of(path) for name, path in MODULES.items()}


def part(module: str) -> str:
    return module.split(".")[1]


def test_every_part_has_its_place():
    assert {part(name) for name in MODULES} == set(PARTS)


def test_no_import_goes_upwards():
    upwards = {
        (name, other)
        for name, others in IMPORTS.items()
        for other in others
        if PARTS.index(part(other)) > PARTS.index(part(name))
        or (part(name) in COMMANDS and part(other) in COMMANDS and name != other)
    }
    assert upwards == set()


def test_there_is_no_circle():
    waiting = {name: {other for other in others if other in IMPORTS} for name, others in IMPORTS.items()}
    while done := {name for name, others in waiting.items() if not others}:
        waiting = {name: others - done for name, others in waiting.items() if name not in done}
    assert waiting == {}


def test_the_root_stays_small():
    assert len(list(PACKAGE.glob("*.py"))) <= 20  # the commands train .. client, two handles, the pure functions


@pytest.mark.parametrize("name", ["evaluation", "weights", "model", "devices", "encoders"])
def test_the_library_prints_nothing_by_itself(name):
    """What people see is said by commands, `processes` and the training loop."""
    for path in (PACKAGE / name).rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        printing = [node for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"]
        assert not printing or path.name == "processes.py", path
