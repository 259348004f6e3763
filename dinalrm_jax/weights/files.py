"""safetensors on disk: single files and sharded directories, memory-mapped."""

import hashlib
import json
import pathlib
import textwrap
from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dinalrm_jax.disk import AnyPath, local_copy
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.tables import WeightsError

DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "BOOL": np.dtype(np.bool_),
    **{f"{kind}{bits}": np.dtype(f"{name}{bits}")
       for kind, name in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)},
}  # fmt: skip


class SafetensorsDirectory(Mapping[str, np.ndarray]):
    """The tensors of `<stem>.safetensors`, or of the shards that `<stem>.safetensors.index.json` names.

    Read-only views of the mapped files: nothing is read before its bytes are used, and nothing is copied.

    Raises:
        FileNotFoundError: neither file is there, or a shard is not.
        WeightsError: a file that is not safetensors, or a tensor that stands in two shards.
    """

    def __init__(self, directory: str | pathlib.Path, stem: str):
        directory = pathlib.Path(directory)
        single, index = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise WeightsError(f"{index} holds no weight_map, which says in which file a tensor is")
            shards = sorted(set(weight_map.values()))
        elif single.exists():
            shards = [single.name]
        else:
            raise FileNotFoundError(f"{directory} holds neither {single.name} nor {index.name}")
        self._tensors: dict[str, np.ndarray | str] = {}
        for shard in shards:
            for name, tensor in _map_file(directory / shard).items():
                if name in self._tensors:
                    raise WeightsError(f"{name} stands in two shards of {directory}")
                self._tensors[name] = tensor

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        if isinstance(tensor, str):
            raise WeightsError(f"{name} is of dtype {tensor}; this reads {', '.join(DTYPES)}")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _map_file(path: pathlib.Path) -> dict[str, np.ndarray | str]:
    """A safetensors file's tensors as views of it, or the dtypes of those that NumPy does not have.

    The library checks the file, but can only copy out of it.
    """
    try:
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        raise WeightsError(f"{path} is not a whole safetensors file: {error}") from error
    data = np.memmap(path, mode="r")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:start].tobytes())
    header.pop("__metadata__", None)
    return {
        name: np.ndarray(entry["shape"], DTYPES[entry["dtype"]], data, start + entry["data_offsets"][0])
        if entry["dtype"] in DTYPES
        else entry["dtype"]
        for name, entry in header.items()
    }


def save_safetensors(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes one safetensors file, with the metadata PyTorch's readers expect."""
    save_file({name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}, path, {"format": "pt"})
    path.chmod(0o644)  # safetensors creates files that only their owner can read


def resolve(name: str | AnyPath, patterns: tuple[str, ...], revision: str | None = None) -> pathlib.Path:
    """A local directory as it is, or what matches `patterns` of one in a bucket or of a hub repository, downloaded.

    Args:
        revision: of the repository: a commit, tag or branch; None: its main branch.

    Raises:
        FileNotFoundError: neither.
        ConfigError: a directory with a revision.
    """
    path = local_copy(name, patterns)
    if path.is_dir():
        if revision is not None:
            raise ConfigError(f"{path} is a local directory, which has no revision {revision!r}; leave it out")
        return path
    if isinstance(name, str) and name.count("/") == 1 and not name.startswith((".", "/", "~")):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            return pathlib.Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            pinned = "" if revision is None else f" at revision {revision!r}"
            first = next((line for line in str(error).splitlines() if line.strip()), "")  # the hub's are ten lines
            reason = textwrap.shorten(f"{type(error).__name__}: {first}", 160, placeholder=" ...").rstrip(".")
            raise FileNotFoundError(
                f"there is no directory {name}; as a hub id, {name!r}{pinned} could not be downloaded either ({reason})"
            ) from error
    raise FileNotFoundError(f"no directory {path}")


def fingerprint(tensors: Mapping[str, np.ndarray]) -> str:
    """Tells weights apart at the cost of a page or two a tensor: of names, dtypes, shapes and eight numbers of each."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name].reshape(-1)
        digest.update(f"{name} {array.dtype} {tensors[name].shape}\0".encode())
        digest.update(array[np.linspace(0, max(0, len(array) - 1), min(8, len(array))).astype(int)].tobytes())
    return digest.hexdigest()[:16]


def read_json(path: AnyPath) -> dict:
    """A model's JSON file.

    Raises:
        FileNotFoundError, ConfigError: it is not there, or not JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: {path.parent} is not a model directory") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
