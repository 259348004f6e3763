"""Directories and files that appear whole or not at all, and belong to one run at a time.

Paths are local (`pathlib`) or in a bucket (`epath`); what differs there is in `disk.bucket`.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

from etils import epath

from dinalrm_jax.disk import bucket
from dinalrm_jax.disk.holder import Locked, held, holder
from dinalrm_jax.mapping import ConfigError

AnyPath: TypeAlias = pathlib.Path | epath.Path


def as_path(name: str | os.PathLike) -> AnyPath:
    """The path of a name: in a bucket where it begins with gs://, else local.

    Raises:
        ConfigError: as for `bucket.open_path`.
    """
    name = os.fspath(name)
    return bucket.open_path(name) if name.startswith(bucket.SCHEME) else pathlib.Path(name)


def resolved(name: str | os.PathLike) -> AnyPath:
    """The path without ~ and links, and whatever the working directory is."""
    path = as_path(name)
    return path.expanduser().resolve() if isinstance(path, pathlib.Path) else path


def mounted(name: str | os.PathLike) -> pathlib.Path:
    """The path of records, which are read from a file system; raises ConfigError for one in a bucket."""
    path = as_path(name)
    if isinstance(path, pathlib.Path):
        return path
    _, _, place, *rest = path.parts
    raise ConfigError(
        f"{path} is in a bucket, and records are read from a file system: mount the bucket (mkdir -p ~/{place} && "
        f"gcsfuse --implicit-dirs {place} ~/{place}) and set data to a directory there, {'/'.join(['~', place, *rest])}"
    )


@contextlib.contextmanager
def lock(target: str | os.PathLike, say: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """Keeps `target`, a file or directory that need not exist yet, to this process; its parent is made.

    The lock is `flock`'s on `.NAME.lock` beside the target (within it, where nothing can be written beside it), so it
    ends with its process however that dies, and holds between the hosts of a file system that has such locks. The file
    says who holds it, and goes at the end. In a bucket it is a `bucket.lease`, and `say` is told why that takes time.

    Raises:
        Locked: it is another process's; the message names owner, host and process.
        OSError: the file system has no locks.
    """
    target = as_path(target)
    if not isinstance(target, pathlib.Path):
        with bucket.lease(target, say):
            yield
        return
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    within = target.is_dir() and not os.access(target.parent, os.W_OK)
    path = target / ".lock" if within else target.with_name(f".{target.name}.lock")
    file = _locked_file(path, target)
    try:
        file.truncate(0)
        file.write(json.dumps(holder()))
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
    said = ""
    with contextlib.suppress(OSError):
        said = path.read_text()
    return held(target, said)


@contextlib.contextmanager
def whole_directory(target: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A local directory to write into that becomes `target` at the end, or vanishes on an error.

    What an earlier process that was killed left of it is removed.

    Raises:
        FileExistsError: `target` is there already; nothing is ever overwritten.
        Locked: another process is writing it.
    """
    target = as_path(target)
    with lock(target):
        if is_whole(target):
            raise FileExistsError(f"{target} exists already; choose another output or remove it first")
        filling = _filling(target) if isinstance(target, pathlib.Path) else bucket.whole_directory(target)
        with filling as directory:
            yield directory


@contextlib.contextmanager
def _filling(target: pathlib.Path) -> Iterator[pathlib.Path]:
    remove_leftovers(target)
    partial = _partial(target)
    partial.mkdir()
    try:
        yield partial
        publish(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def is_whole(directory: AnyPath) -> bool:
    """Whether a directory that `whole_directory` makes is there."""
    return directory.exists() if isinstance(directory, pathlib.Path) else bucket.is_whole(directory)


def move(directory: AnyPath, target: AnyPath) -> None:
    """Renames a whole directory within its file system or bucket."""
    if isinstance(directory, pathlib.Path):
        directory.rename(target)
    else:
        bucket.move(directory, target)


def remove(directory: AnyPath) -> None:
    """Removes a whole directory."""
    if isinstance(directory, pathlib.Path):
        shutil.rmtree(directory)
    else:
        bucket.remove(directory)


def local_copy(name: str | os.PathLike, patterns: Sequence[str]) -> pathlib.Path:
    """A local directory as it is, or of one in a bucket the files whose names match, kept in ~/.cache/dinalrm_jax.

    Raises:
        FileNotFoundError: a bucket has none.
    """
    path = as_path(name)
    if isinstance(path, pathlib.Path):
        return path.expanduser()
    copy = bucket.cached_copy(path, patterns)
    while not copy.exists():
        try:
            with whole_directory(copy) as partial:
                bucket.download(path, patterns, partial)
        except (Locked, FileExistsError):  # another process of this host is at it, or was faster
            time.sleep(0.2)
    return copy


class Mirror:
    """A local directory for code that writes local files, which become those of `directory`.

    It is `directory` itself where that is local, and made where it is not there. Of one in a bucket it is a temporary
    directory, from which `publish` uploads what has changed. As a context it gives the local directory.

    Args:
        directory: where the files belong.
        kept: patterns of names; a bucket's files of these names are in the local directory from the beginning.
    """

    def __init__(self, directory: AnyPath, kept: Sequence[str] = ()):
        self._bucket = None if isinstance(directory, pathlib.Path) else directory
        if isinstance(directory, pathlib.Path):
            directory.mkdir(parents=True, exist_ok=True)
            self.local = directory
        else:
            self.local = pathlib.Path(tempfile.mkdtemp(prefix="dinalrm_jax-"))
            bucket.download(directory, kept, self.local)
        self._published = {} if self._bucket is None else bucket.files_of(self.local)
        self._since = time.monotonic()

    def publish(self, every: float = 0.0) -> None:
        """Uploads what has changed since the last time, if that was `every` seconds ago."""
        if self._bucket is None or time.monotonic() - self._since < every:
            return
        found = bucket.files_of(self.local)
        changed = [name for name, state in found.items() if self._published.get(name) != state]
        bucket.upload(self.local, changed, self._bucket)
        self._published, self._since = found, time.monotonic()

    def close(self) -> None:
        """As `publish`, for good."""
        if self._bucket is not None:
            try:
                self.publish()
            finally:
                shutil.rmtree(self.local)

    def __enter__(self) -> pathlib.Path:
        return self.local

    def __exit__(self, *exception) -> None:
        self.close()


def free_space(directory: AnyPath) -> float:
    """Bytes that can still be written; a bucket has no end."""
    return shutil.disk_usage(directory).free if isinstance(directory, pathlib.Path) else float("inf")


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


def remove_leftovers(target: AnyPath) -> None:
    """Removes what killed processes left of `target`; its lock is to be held."""
    if not isinstance(target, pathlib.Path):
        return  # they leave nothing of an object
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


def write_json(path: AnyPath, value: Any, indent: int | None = None) -> None:
    """Writes a JSON file, keys sorted, whole or not at all; when this returns it is on disk."""
    text = json.dumps(value, sort_keys=True, indent=indent) + "\n"
    if not isinstance(path, pathlib.Path):
        path.write_text(text)
        return
    partial = _partial(path)
    try:
        partial.write_text(text)
        publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)
