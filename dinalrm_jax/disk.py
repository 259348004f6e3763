"""Directories and files that appear whole or not at all, and belong to one run at a time."""

import contextlib
import datetime
import fcntl
import getpass
import json
import os
import pathlib
import shutil
import socket
from collections.abc import Iterator
from typing import Any


class Locked(OSError):
    """Another run is writing the same directory."""


@contextlib.contextmanager
def lock(target: str | pathlib.Path) -> Iterator[None]:
    """Keeps `target`, a file or directory that need not exist yet, to this process; its parent is made.

    The lock is `flock`'s on `.NAME.lock` beside the target (within it, where nothing can be written beside it), so it
    ends with its process however that dies, and holds between the hosts of a file system that has such locks. The file
    says who holds it, and goes at the end.

    Raises:
        Locked: it is another process's; the message names owner, host and process.
        OSError: the file system has no locks.
    """
    target = pathlib.Path(target).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    within = target.is_dir() and not os.access(target.parent, os.W_OK)
    path = target / ".lock" if within else target.with_name(f".{target.name}.lock")
    file = _locked_file(path, target)
    try:
        try:
            owner = getpass.getuser()
        except (KeyError, OSError):  # a container's user without a name
            owner = f"user {os.getuid()}"
        holder = {"owner": owner, "host": socket.gethostname(), "pid": os.getpid()}
        holder["since"] = datetime.datetime.now().isoformat(timespec="seconds")
        file.truncate(0)
        file.write(json.dumps(holder))
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def _locked_file(path: pathlib.Path, target: pathlib.Path):
    while True:
        try:
            file = path.open("a+")
        except PermissionError:  # another user's
            raise _held(path, target) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise _held(path, target) from None
        except OSError as error:
            file.close()
            raise OSError(
                f"cannot lock {target}: {error.strerror}; choose a place on a file system that has locks"
            ) from error
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                return file
        file.close()  # its holder removed it between our opening and our locking it


def _held(path: pathlib.Path, target: pathlib.Path) -> Locked:
    try:
        holder = json.loads(path.read_text())
        who = f"{holder['owner']} on {holder['host']}, process {holder['pid']}, since {holder['since']}"
    except (OSError, ValueError, KeyError):
        who = "another process"
    return Locked(f"{target} is being written by {who}; wait for its end, or choose another place")


@contextlib.contextmanager
def whole_directory(target: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """A directory to write into that becomes `target` at the end, or vanishes on an error.

    What an earlier process that was killed left of it is removed.

    Raises:
        FileExistsError: `target` is there already; nothing is ever overwritten.
        Locked: another process is writing it.
    """
    target = pathlib.Path(target)
    with lock(target):
        if target.exists():
            raise FileExistsError(f"{target} exists already; choose another output or remove it first")
        remove_leftovers(target)
        partial = _partial(target)
        partial.mkdir()
        try:
            yield partial
            publish(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def publish(partial: pathlib.Path, target: pathlib.Path) -> None:
    """Renames a finished file or directory once all of it is on disk, and returns once the new name is."""
    for directory, _, names in os.walk(partial):
        for name in names:
            sync(os.path.join(directory, name))
        sync(directory)
    if partial.is_file():
        sync(partial)
    os.replace(partial, target)
    sync(target.parent)


def sync(path: str | os.PathLike) -> None:
    """Returns once a file or directory is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(target: pathlib.Path) -> None:
    """Removes what killed processes left of `target`; its lock is to be held."""
    for leftover in target.parent.glob(f".{target.name}.partial-*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def _partial(target: pathlib.Path) -> pathlib.Path:
    return target.with_name(f".{target.name}.partial-{os.getpid()}")


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
    partial = _partial(path)
    try:
        partial.write_text(json.dumps(value, sort_keys=True, indent=indent) + "\n")
        publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)
