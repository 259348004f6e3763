"""Tables that map the names and layouts of files to those of a model's parameters, in both directions.

A table is a tuple of `Row`s; the first row that matches a name decides. Loading reports every
unknown, missing and misshapen name in one error.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping

import jax
import numpy as np

from dinalrm_jax.noise import AnyArray

Transform = Callable[[np.ndarray], np.ndarray]


class WeightsError(ValueError):
    """Weights that do not fit the model; the message lists every name that does not."""


def _identity(array: np.ndarray) -> np.ndarray:
    return array


@dataclasses.dataclass(frozen=True)
class Row:
    """A name in the file and ours, with `{}` for a part that both share.

    Attributes:
        file, ours: name templates, at most one `{}` each.
        load, dump: the array's change of layout on the way in and its inverse.
    """

    file: str
    ours: str
    load: Transform = _identity
    dump: Transform = _identity


Table = tuple[Row, ...]
IDENTITY: Table = (Row("{}", "{}"),)  # for files that carry our names and layouts


def load(
    tensors: Mapping[str, np.ndarray],
    table: Table,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    *,
    source: str,
    unused: str | None = None,
) -> dict[str, np.ndarray]:
    """Reads the parameters named in `shapes`.

    Args:
        tensors: the file's arrays by name; read one at a time.
        table: see above.
        shapes: what the model needs.
        source: the file or directory, for the error message.
        unused: a pattern of file names that this model leaves alone (layers beyond its depth).

    Raises:
        WeightsError: listing all that is unknown, missing or of another shape.
    """
    loaded, problems, seen = {}, [], set()
    for name in tensors:
        if unused is not None and re.fullmatch(unused, name):
            continue
        ours, row = _translate(name, table, "file", "ours")
        if ours not in shapes:
            problems.append(f"unknown: {name}")
            continue
        seen.add(ours)
        try:
            array = row.load(tensors[name])
        except ValueError as error:
            problems.append(f"unreadable: {name}: {error}")
            continue
        if array.shape != shapes[ours].shape:
            problems.append(f"misshapen: {name} gives {array.shape}, the model takes {shapes[ours].shape}")
            continue
        loaded[ours] = array
    problems += [f"missing: {_translate(name, table, 'ours', 'file')[0]}" for name in shapes if name not in seen]
    if problems:
        listing = "\n  ".join(problems)
        raise WeightsError(f"{source} does not hold this model's weights, {len(problems)} problems:\n  {listing}")
    return loaded


def dump(params: Mapping[str, AnyArray], table: Table) -> dict[str, np.ndarray]:
    """The inverse of `load`: arrays under the file's names and in its layout."""
    out = {}
    for name, array in params.items():
        file, row = _translate(name, table, "ours", "file")
        out[file] = np.asarray(row.dump(np.asarray(array)), order="C")
    return out


def _translate(name: str, table: Table, source: str, target: str) -> tuple[str, Row]:
    for row in table:
        match = re.fullmatch(re.escape(getattr(row, source)).replace(r"\{\}", "(.+)"), name)
        if match:
            return getattr(row, target).format(*match.groups()), row
    return name, Row(name, name)
