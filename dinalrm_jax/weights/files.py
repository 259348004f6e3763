"""safetensors on disk: single files and sharded directories, read lazily."""

import json
import pathlib
from collections.abc import Iterator, Mapping

import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy, which safetensors needs
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dinalrm_jax.config import ConfigError
from dinalrm_jax.weights.rules import WeightsError


class SafetensorsDirectory(Mapping[str, np.ndarray]):
    """The tensors of `<stem>.safetensors`, or of the shards that `<stem>.safetensors.index.json` names.

    Memory-mapped: a tensor is read when it is asked for.

    Raises:
        FileNotFoundError: neither file is there, or a shard is not.
        WeightsError: a file that is not safetensors, or a tensor that stands in two shards.
    """

    def __init__(self, directory: str | pathlib.Path, stem: str):
        directory = pathlib.Path(directory)
        single, index = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
        if index.exists():
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        elif single.exists():
            shards = [single.name]
        else:
            raise FileNotFoundError(f"{directory} holds neither {single.name} nor {index.name}")
        self._files = {}
        for shard in shards:
            try:
                file = safe_open(directory / shard, framework="np")
            except SafetensorError as error:
                raise WeightsError(f"{directory / shard} is not a whole safetensors file: {error}") from error
            for name in file.keys():  # noqa: SIM118  a safe_open is no mapping
                if name in self._files:
                    raise WeightsError(f"{name} stands in two shards of {directory}")
                self._files[name] = file

    def __getitem__(self, name: str) -> np.ndarray:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def save_safetensors(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes one safetensors file, with the metadata PyTorch's readers expect."""
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path, {"format": "pt"})
    path.chmod(0o644)  # safetensors creates files that only their owner can read


def resolve(name: str | pathlib.Path, patterns: tuple[str, ...]) -> pathlib.Path:
    """A local directory as it is, or what matches `patterns` of a hub repository, downloaded.

    Raises:
        FileNotFoundError: neither.
    """
    path = pathlib.Path(name).expanduser()
    if path.is_dir():
        return path
    if isinstance(name, str) and name.count("/") == 1 and not name.startswith((".", "/", "~")):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            return pathlib.Path(snapshot_download(name, allow_patterns=list(patterns)))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise FileNotFoundError(
                f"{name!r} is neither a directory nor a hub repository that can be downloaded: {error}"
            ) from error
    raise FileNotFoundError(f"no directory {path}")


def read_json(path: pathlib.Path) -> dict:
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
