"""Directories and files that appear whole or not at all."""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def whole_directory(target: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """A directory to write into that becomes `target` at the end, or vanishes on an error.

    Raises:
        FileExistsError: `target` is there already; nothing is ever overwritten.
    """
    target = pathlib.Path(target)
    if target.exists():
        raise FileExistsError(f"{target} exists already; choose another output or remove it first")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_writable(path: str | pathlib.Path) -> None:
    """Makes the directory that `path` is to be written into; raises OSError unless that can be written."""
    if pathlib.Path(path).is_dir():
        raise IsADirectoryError(f"{path} is a directory; name a file in it")
    parent = pathlib.Path(path).parent
    parent.mkdir(parents=True, exist_ok=True)
    if not os.access(parent, os.W_OK):
        raise PermissionError(f"cannot write into {parent}")


def write_json(path: pathlib.Path, value: Any, indent: int | None = None) -> None:
    """Writes a JSON file, keys sorted, whole or not at all; when this returns it is on disk."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("w") as file:
            file.write(json.dumps(value, sort_keys=True, indent=indent) + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
