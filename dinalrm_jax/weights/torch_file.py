"""Reads and writes `torch.save`'s file of a flat state dict, without torch.

The file is a ZIP of stored members: `data.pkl`, a pickle whose tensors refer to storages by
number, and `data/<number>`, their raw bytes. Reading resolves only the few names such a pickle
needs, as `torch.load(weights_only=True)` does; what is written loads that way.
"""

import collections
import io
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


class TorchFileError(ValueError):
    """A file that is not a `torch.save`d flat dict of dense tensors."""


def read(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """The state dict's arrays by name.

    Raises:
        TorchFileError: not such a file, or a pickle that asks for anything but tensors.
    """
    path = pathlib.Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            (member,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            state = _Unpickler(archive, member.removesuffix("data.pkl")).load()
    except (zipfile.BadZipFile, pickle.UnpicklingError, ValueError, KeyError, EOFError) as error:
        raise TorchFileError(f"{path} is not a torch.save file of plain tensors: {error}") from error
    if not isinstance(state, Mapping) or not all(isinstance(array, np.ndarray) for array in state.values()):
        raise TorchFileError(f"{path} does not hold a flat state dict (name -> tensor)")
    return dict(state)


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(io.BytesIO(archive.read(root + "data.pkl")))
        self.archive, self.root = archive, root

    def find_class(self, module: str, name: str):
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no plain state dict needs")

    def persistent_load(self, reference) -> np.ndarray:
        kind, dtype, key, _, count = reference
        if kind != "storage":
            raise pickle.UnpicklingError(f"unknown persistent reference {kind!r}")
        storage = np.frombuffer(self.archive.read(f"{self.root}data/{key}"), dtype)
        if len(storage) != count:
            raise pickle.UnpicklingError(f"storage {key} holds {len(storage)} values, expected {count}")
        return storage


def _rebuild_tensor(storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_) -> np.ndarray:
    strides = tuple(step * storage.itemsize for step in stride)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride)) if all(size) else offset - 1
    if min((offset, *stride, *size), default=0) < 0 or last >= len(storage):
        raise pickle.UnpicklingError(f"a tensor of shape {size} reaches beyond its storage")
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False).copy()


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
