"""Directories that appear whole or not at all."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator


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
