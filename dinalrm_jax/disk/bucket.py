"""A bucket of Google's object storage, where `disk` has a file system: gs://BUCKET/DIRECTORY.

An object appears whole or not at all. But several do not appear at once, so the last one of a whole directory is a
marker; none can be appended to, so a file that grows is uploaded anew; and there are no locks, but leases.
"""

import contextlib
import fnmatch
import hashlib
import importlib.util
import json
import os
import pathlib
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from dinalrm_jax.disk.holder import held, holder
from dinalrm_jax.mapping import ConfigError

SCHEME = "gs://"
MARKER = ".whole"
RENEWED, STALE = 15.0, 60.0  # seconds: how often a lease is renewed, and after which it is its dead holder's


def open_path(name: str) -> epath.Path:
    """A path in a bucket.

    Raises:
        ConfigError: a whole bucket, or gcsfs is missing.
    """
    path = epath.Path(name)
    if len(path.parts) < 4:  # "/", "gs", bucket
        raise ConfigError(f"{name} is a whole bucket; name a directory in it, {name.rstrip('/')}/runs/NAME say")
    if importlib.util.find_spec("gcsfs") is None:
        raise ConfigError(f"{name} is read and written with gcsfs, which is missing: pip install -e '.[gcs]'")
    import fsspec

    # Other processes, and tensorstore in this one, write there too.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return path


def _objects() -> Any:
    """The file system that `epath` uses; made by the same arguments, it is the same object."""
    import fsspec

    return fsspec.filesystem("gcs", finalize_on_close=True)


@contextlib.contextmanager
def _failing(what: str) -> Iterator[None]:
    """Whatever the storage's libraries raise, as one line."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        first = (str(error).splitlines() or [""])[0][:300]
        raise OSError(
            f"cannot {what}: {type(error).__name__}: {first}; is the bucket's name right, and may you use it "
            "(gcloud auth application-default login)?"
        ) from error


# ------------------------------------------------------------------------------------ directories


@contextlib.contextmanager
def whole_directory(target: epath.Path) -> Iterator[pathlib.Path]:
    """A local directory to write into, which is uploaded at the end; its marker is the last object."""
    with tempfile.TemporaryDirectory(prefix="dinalrm_jax-") as local:
        yield pathlib.Path(local)
        remove(target)  # what a process left that was killed while it uploaded
        upload(pathlib.Path(local), files_of(pathlib.Path(local)), target)
        _mark(target)


def is_whole(directory: epath.Path) -> bool:
    """Whether a directory that `whole_directory` makes is there."""
    return (directory / MARKER).exists()


def _mark(directory: epath.Path) -> None:
    (directory / MARKER).write_text("Every file of this directory is here.\n")


def remove(directory: epath.Path) -> None:
    """Removes a directory where it is there, its marker first."""
    (directory / MARKER).unlink(missing_ok=True)
    directory.rmtree(missing_ok=True)


def move(directory: epath.Path, target: epath.Path) -> None:
    """Renames a whole directory: at every moment one of the two is whole."""
    remove(target)  # a copy that was interrupted
    names = [name for name in _listed(directory, ["*"]) if name != MARKER]
    with _failing(f"copy {directory} to {target}"):
        _objects().copy([str(directory / name) for name in names], [str(target / name) for name in names])
    _mark(target)
    remove(directory)


def files_of(local: pathlib.Path) -> dict[str, tuple[int, int]]:
    """The files of a local directory, with what changes when they do."""
    return {
        str(path.relative_to(local)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in local.rglob("*")
        if path.is_file()
    }


def upload(local: pathlib.Path, names: Sequence[str] | Mapping[str, Any], target: epath.Path) -> None:
    """Copies files of a local directory into one of a bucket."""
    with _failing(f"write {target}"):
        _objects().put([str(local / name) for name in names], [str(target / name) for name in names])


def download(directory: epath.Path, patterns: Sequence[str], local: pathlib.Path) -> None:
    """Copies the files whose names match into a local directory."""
    for name in _listed(directory, patterns):
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        with _failing(f"read {directory / name}"):
            _objects().get_file(str(directory / name), str(local / name))


def cached_copy(directory: epath.Path, patterns: Sequence[str]) -> pathlib.Path:
    """Where a local copy of the files whose names match belongs: another place for every version of them.

    Raises:
        FileNotFoundError: there are none.
    """
    found = _listed(directory, patterns)
    if not found:
        raise FileNotFoundError(f"there is no directory {directory}, or no file of a model in it")
    version = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "dinalrm_jax" / "buckets"
    return cache.joinpath(str(directory).removeprefix(SCHEME), version)


def _listed(directory: epath.Path, patterns: Sequence[str]) -> dict[str, str]:
    """The names of objects below a directory that match a pattern, with their generations."""
    with _failing(f"list {directory}"):
        found = _objects().find(str(directory), detail=True)
    prefix = str(directory).removeprefix(SCHEME) + "/"
    files = {name: info for name, info in found.items() if info["type"] == "file"}
    names = {name.removeprefix(prefix): str(info["generation"]) for name, info in files.items()}
    return {
        name: generation
        for name, generation in sorted(names.items())
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    }


# ----------------------------------------------------------------------------------------- leases


@contextlib.contextmanager
def lease(target: epath.Path, say: Callable[[str], None]) -> Iterator[None]:
    """Keeps a directory to this process, as `disk.lock` does.

    The holder writes the object `.NAME.lock` anew every RENEWED seconds, and removes it at the end. Who finds it
    watches it: if it changes, the holder lives; if for STALE seconds it does not, the holder is dead, and the lease is
    taken over. So no two hosts' clocks are compared. Each write names the generation that it replaces: of two
    processes one succeeds.

    Raises:
        Locked: another process holds it.
        OSError: the bucket is not there, or not ours to write.
    """
    import tensorstore as ts  # gcsfs knows no generations to replace

    patience = ts.Context({"gcs_request_retries": {"max_retries": 4}})
    said = json.dumps({**holder(), "lease": uuid.uuid4().hex}).encode()
    ended = threading.Event()
    with _failing(f"write {target}"):
        store = ts.KvStore.open(f"{target.parent}/", context=patience).result()
        key = f".{target.name}.lock"
        generation = _take(store, key, said, target, say)
    generations = [generation]
    renewing = threading.Thread(target=_renew, args=(store, key, said, target, generations, ended), daemon=True)
    renewing.start()
    try:
        yield
    finally:
        ended.set()
        renewing.join()
        with contextlib.suppress(Exception):  # where the network fails, it is stale in a minute
            store.write(key, None, if_equal=generations[-1]).result()


def _take(store: Any, key: str, said: bytes, target: epath.Path, say: Callable[[str], None]) -> bytes:
    """Writes the lease; its generation."""
    watched, since = None, time.monotonic()
    while True:
        found = store.read(key).result()
        generation = found.stamp.generation
        if found.state == "missing" or (generation == watched and time.monotonic() - since > STALE):
            taken = store.write(key, said, if_equal=generation).result().generation
            if taken:
                return taken
        elif watched is None:
            watched, since = generation, time.monotonic()
            say(f"{target} is held, or was when its process died: watching for at most {STALE:.0f} s whether it lives")
        elif generation != watched:
            raise held(target, found.value)
        time.sleep(RENEWED / 15)


def _renew(
    store: Any, key: str, said: bytes, target: epath.Path, generations: list[bytes], ended: threading.Event
) -> None:
    """Keeps the lease until `ended`; the last of `generations` is its own."""
    while not ended.wait(RENEWED):
        try:
            written = store.write(key, said, if_equal=generations[-1]).result().generation
            found = None if written else store.read(key).result()
        except Exception:
            continue  # the network's matter; the lease lasts STALE seconds
        if found is not None and found.value == said:
            written = found.stamp.generation  # an answer was lost on its way: the write was repeated, and refused
        if not written:
            # At once, and not by an exception: whatever this process writes now goes into another's run.
            sys.stderr.write(f"error: {target} was taken over by another process, as this one seemed dead; it ends\n")
            sys.stderr.flush()
            os._exit(1)
        generations.append(written)
