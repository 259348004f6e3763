"""Applies every mutant to a copy of the tree and runs the tests that should notice it.

    python -m benchmarks.mutants [--only server] [--workers 2] [--output benchmarks/mutants.json]

A mutant is killed when its tests fail. Its tests pass on the code as it is, which is checked first. The exit
status is 1 where a mutant survives.
"""

import collections
import importlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

from absl import app, flags
from tqdm import tqdm

from benchmarks.mutants import Mutant

ROOT = pathlib.Path(__file__).parents[2]
PARTS = ("method", "training", "data", "weights", "scoring", "server", "cli", "alignment", "lrm", "ratings")
LIMIT = 600  # seconds; a mutant that hangs is noticed too


def mutants_of(part: str) -> list[Mutant]:
    """The mutants of one part of the project."""
    return importlib.import_module(f"benchmarks.mutants.{part}").MUTANTS


def copy_tree(target: pathlib.Path) -> None:
    """What git knows and does not ignore, as it stands."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)


def outcome(tree: pathlib.Path, tests: str) -> str:
    """ "passed", "failed" or "hung", of some tests in a tree; anything else pytest says is an error."""
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-p", "no:cacheprovider", "-m", "", *tests.split()]
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, errors="replace", timeout=LIMIT
        )
    except subprocess.TimeoutExpired:
        return "hung"
    if done.returncode in (0, 1, 2):  # 2: a test file could not even be imported
        return "failed" if done.returncode else "passed"
    raise RuntimeError(f"pytest {tests} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")


def apply(mutant: Mutant, tree: pathlib.Path) -> None:
    """Changes the tree; raises ValueError where the mutant no longer fits the code."""
    path = tree / mutant.path
    text = path.read_text()
    if (found := text.count(mutant.old)) != 1:
        raise ValueError(f"mutant {mutant.name!r}: its text stands {found} times in {mutant.path}")
    path.write_text(text.replace(mutant.old, mutant.new))


def judge(mutant: Mutant) -> str:
    """What became of the tests under a mutant."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as directory:
        tree = pathlib.Path(directory)
        copy_tree(tree)
        apply(mutant, tree)
        return outcome(tree, mutant.tests)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    values = flags.FLAGS
    mutants = {part: mutants_of(part) for part in values.only or PARTS}
    every = [(part, mutant) for part, some in mutants.items() for mutant in some]
    names = [mutant.name for _, mutant in every]
    if twice := [name for name, count in collections.Counter(names).items() if count > 1]:
        raise ValueError(f"mutants of one name: {twice}")
    started = time.time()
    with tempfile.TemporaryDirectory(prefix="mutant-") as directory:
        tree = pathlib.Path(directory)
        copy_tree(tree)
        for _, mutant in every:
            path = tree / mutant.path
            text = path.read_text()
            apply(mutant, tree)  # that it fits, before anything runs
            path.write_text(text)
        for tests in tqdm(sorted({mutant.tests for _, mutant in every}), desc="tests without a mutant", unit="set"):
            if (found := outcome(tree, tests)) != "passed":
                raise RuntimeError(f"{tests}: {found} on the code as it is; a mutant proves nothing there")
    with ThreadPoolExecutor(values.workers) as pool, tqdm(total=len(every), desc="mutants", unit="mutant") as bar:

        def one(entry: tuple[str, Mutant]) -> dict[str, str]:
            part, mutant = entry
            found = outcome_name(judge(mutant))
            bar.update()
            if found == "survived":
                tqdm.write(f"SURVIVED  {part}: {mutant.name}  ({mutant.path}; {mutant.tests})")
            return {"part": part, "name": mutant.name, "path": mutant.path, "tests": mutant.tests, "outcome": found}

        results = list(pool.map(one, every))
    survived = [row for row in results if row["outcome"] == "survived"]
    for part in mutants:
        count = sum(row["part"] == part for row in results)
        print(f"{part:>9}: {count - sum(row['part'] == part for row in survived)} of {count} killed")
    minutes = (time.time() - started) / 60
    print(f"{len(results) - len(survived)} of {len(results)} mutants killed in {minutes:.0f} minutes")
    if values.output:
        pathlib.Path(values.output).write_text(json.dumps(results, indent=1) + "\n")
    sys.exit(bool(survived))


def outcome_name(found: str) -> str:
    """Of a mutant, by what became of its tests."""
    return {"passed": "survived", "failed": "killed", "hung": "killed (hung)"}[found]


if __name__ == "__main__":
    flags.DEFINE_list("only", [], f"Parts: {', '.join(PARTS)}; all if not given.")
    flags.DEFINE_integer("workers", 2, "Mutants at a time.", 1)
    flags.DEFINE_string("output", None, "JSON file for the results.")
    app.run(main)
