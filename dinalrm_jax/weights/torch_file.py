"""Reads and writes `torch.save`'s file of a flat state dict, without torch.

The file is a ZIP of stored members: `data.pkl`, a pickle whose tensors refer to storages by
number, and `data/<number>`, their raw bytes. Reading resolves only the few names such a pickle
needs, as `torch.load(weights_only=True)` does; what is written loads that way. A few bytes that claim to
be many (compressed members, expanded tensors) and many that are of no tensor are refused.
"""

import collections
import dataclasses
import io
import math
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Mapping

import ml_dtypes
import numpy as np

STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "BoolStorage": np.dtype(np.bool_),
}


MOST = 16  # times that tensors may have a storage's values (tied weights), or it theirs (parts of a fused weight)
MAX_PICKLE = 2**24  # bytes of `data.pkl`; a tensor takes some 200


class TorchFileError(ValueError):
    """A file that is not a `torch.save`d flat dict of dense tensors."""


@dataclasses.dataclass
class _Storage:
    """Values that tensors are views of, and how many of them the tensors so far have."""

    key: str
    values: np.ndarray
    used: int = 0


def read(path: str | pathlib.Path, key: str | None = None) -> dict[str, np.ndarray]:
    """The state dict's arrays by name.

    Args:
        key: where the file holds the state dict in another dict, under this key.

    Raises:
        TorchFileError: not such a file, or a pickle that asks for anything but tensors.
    """
    path = pathlib.Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            (member,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            unpickler = _Unpickler(archive, member.removesuffix("data.pkl"))
            state = unpickler.load()
        unpickler.check_storages()
    except OSError:
        raise
    except Exception as error:  # a pickle can raise anything
        raise TorchFileError(f"{path} is not a torch.save file of plain tensors: {error}") from error
    if key is not None:
        if not isinstance(state, Mapping) or key not in state:
            raise TorchFileError(f"{path} holds no {key!r}")
        state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(array, np.ndarray) for array in state.values()):
        raise TorchFileError(f"{path} does not hold a flat state dict (name -> tensor)")
    return dict(state)


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, root: str):
        self.archive, self.root = archive, root
        self.storages: dict[str, _Storage] = {}
        super().__init__(io.BytesIO(self._member("data.pkl", MAX_PICKLE)))

    def find_class(self, module: str, name: str):
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no plain state dict needs")

    def persistent_load(self, reference) -> _Storage:
        kind, dtype, key, _, count = reference
        if kind != "storage":
            raise pickle.UnpicklingError(f"unknown persistent reference {kind!r}")
        if key not in self.storages:
            data = self._member(f"data/{key}", count * dtype.itemsize)
            if len(data) != count * dtype.itemsize:
                raise pickle.UnpicklingError(
                    f"storage {key} holds {len(data)} bytes, expected {count} values of {dtype}"
                )
            self.storages[key] = _Storage(key, np.frombuffer(data, dtype))
        return self.storages[key]

    def check_storages(self) -> None:
        """Raises UnpicklingError for a storage that is much larger than the tensors that view it."""
        for storage in self.storages.values():
            if MOST * storage.used < len(storage.values):
                raise pickle.UnpicklingError(
                    f"storage {storage.key} holds {len(storage.values)} values, its tensors {storage.used}: they are "
                    "views of a larger tensor; save clones of them"
                )

    def _member(self, name: str, limit: int) -> bytes:
        """A member of the archive, of at most `limit` bytes, which stand in the file as they are."""
        info = self.archive.getinfo(self.root + name)
        if info.compress_type != zipfile.ZIP_STORED:
            raise pickle.UnpicklingError(f"{name} is compressed, which torch.save never does")
        if info.file_size > limit:
            raise pickle.UnpicklingError(f"{name} has {info.file_size} bytes, expected {limit} at most")
        return self.archive.read(info)


def _rebuild_tensor(storage: _Storage, offset: int, size: tuple, stride: tuple, *_) -> np.ndarray:
    values = storage.values
    last = offset + sum((length - 1) * step for length, step in zip(size, stride)) if all(size) else offset - 1
    if len(size) != len(stride) or min((offset, *stride, *size), default=0) < 0 or last >= len(values):
        raise pickle.UnpicklingError(f"a tensor of shape {size} reaches beyond its storage")
    reach = 0  # of the axes so far, from the innermost
    for step, length in sorted((step, length) for length, step in zip(size, stride) if length > 1):
        if step <= reach:
            raise pickle.UnpicklingError(
                f"a tensor of shape {size} and strides {stride} has values more than once, as expand() makes them; "
                "save a contiguous() one"
            )
        reach += (length - 1) * step
    storage.used += math.prod(size)
    if storage.used > MOST * len(values):
        raise pickle.UnpicklingError(f"storage {storage.key} is shared by more than {MOST} tensors; save clones")
    strides = tuple(step * values.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(values[offset:], size, strides, writeable=False).copy()


def write(path: str | pathlib.Path, state: Mapping[str, np.ndarray]) -> None:
    """Writes arrays as `torch.save` writes an OrderedDict of contiguous CPU tensors."""
    names = {dtype: name for name, dtype in STORAGES.items()}
    arrays = {name: np.ascontiguousarray(array).reshape(np.shape(array)) for name, array in state.items()}
    for name, array in arrays.items():
        if array.dtype not in names:
            raise TorchFileError(f"{name} has dtype {array.dtype}, which has no torch storage here")
    body = io.BytesIO()
    body.write(pickle.PROTO + b"\x02" + _EMPTY_ORDERED_DICT + pickle.MARK)
    for number, (name, array) in enumerate(arrays.items()):
        body.write(_text(name) + _global("torch._utils", "_rebuild_tensor_v2") + pickle.MARK)
        storage = _global("torch", names[array.dtype]) + _text(str(number)) + _text("cpu") + _int(array.size)
        body.write(pickle.MARK + _text("storage") + storage + pickle.TUPLE + pickle.BINPERSID)
        strides = [step // array.itemsize for step in array.strides]
        body.write(_int(0) + _tuple(array.shape) + _tuple(strides) + pickle.NEWFALSE + _EMPTY_ORDERED_DICT)
        body.write(pickle.TUPLE + pickle.REDUCE)
    body.write(pickle.SETITEMS + pickle.STOP)
    root = pathlib.Path(path).stem
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{root}/data.pkl", body.getvalue())
        archive.writestr(f"{root}/byteorder", "little")
        for number, array in enumerate(arrays.values()):
            archive.writestr(f"{root}/data/{number}", array.tobytes())
        archive.writestr(f"{root}/version", "3\n")


def _text(text: str) -> bytes:
    data = text.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(data)) + data


def _int(value: int) -> bytes:
    return pickle.BININT + struct.pack("<i", value)


def _tuple(values) -> bytes:
    return pickle.MARK + b"".join(_int(value) for value in values) + pickle.TUPLE


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


_EMPTY_ORDERED_DICT = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
