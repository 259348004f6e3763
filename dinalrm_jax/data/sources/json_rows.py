"""Rows of JSON files that other people wrote."""

import ast
import json
import math
import pathlib
import re
import reprlib
import types
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from dinalrm_jax.data.files import patiently
from dinalrm_jax.data.preferences import Ranking
from dinalrm_jax.data.records import RecordsError

TEXT_KEYS = {"prompt", "path1", "path2", "chosen", "rejected"}
LONGEST_INTEGER = 18  # digits; longer ones become floating point, and infinity
MOST_VOTES = 10**9
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a pair; JSON can spell it, UTF-8 cannot
LONGEST_LITERAL = 10_000  # characters of Python in a field


def read_rows(path: pathlib.Path, keys: Sequence[str], dataset: str, counts: Counter | None) -> list[dict[str, Any]]:
    """The rows of a JSON array, or of JSON lines, each holding at least `keys`; errors count rows from 0.

    What is named "prompt", "path1", "path2", "chosen" or "rejected" must be text.

    Args:
        path: of the file.
        keys: that a row has.
        dataset: what errors call it.
        counts: of odd rows that are left out, by reason: of text that is no Unicode, or nested too deep. None
            where no row may be missing: they are errors.

    Raises:
        RecordsError: not that, naming file and row.
    """
    if not path.parent.is_dir():
        raise RecordsError(f"{path.parent} is not a directory")
    if not path.is_file():
        raise RecordsError(f"{path.parent} is not a directory of {dataset}: it has no {path.name}")
    try:
        text = patiently(path.read_bytes, path).decode()
    except UnicodeDecodeError as error:
        raise RecordsError(f"{path} is not text in UTF-8: {error.reason} at byte {error.start}") from None
    if text.lstrip().startswith("["):
        try:
            rows = list(enumerate(_parsed(text, str(path))))
        except RecursionError:
            raise RecordsError(f"{path} is nested too deep to be read as JSON") from None
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            try:
                rows += [(len(rows), _parsed(line, f"{path}, line {number}"))] if line.strip() else []
            except RecursionError:
                _leave_out(counts, "row nested too deep", f"{path}, line {number}, is nested too deep to be read")
    if not rows:
        raise RecordsError(f"{path} holds no rows")
    kept = []
    for index, row in rows:
        if not isinstance(row, dict) or any(key not in row for key in keys):
            found = reprlib.repr(sorted(row)) if isinstance(row, dict) else type(row).__name__
            raise RecordsError(f"{path}, row {index}: expected the keys {', '.join(keys)} of {dataset}, found {found}")
        for key in TEXT_KEYS & row.keys():
            if not isinstance(row[key], str):
                raise RecordsError(f"{path}, row {index}: {key} must be text, got {reprlib.repr(row[key])}")
        if all(_is_unicode(row[key]) for key in keys):
            kept.append(row)
        else:
            _leave_out(counts, "row of text that is no Unicode", f"{path}, row {index} holds text that is no Unicode")
    return kept


def _parsed(text: str, where: str) -> Any:
    """Raises RecordsError for what is not JSON, RecursionError for a line that is nested too deep."""
    try:
        return json.loads(text, parse_int=_integer)
    except json.JSONDecodeError as error:
        raise RecordsError(f"{where} is neither a JSON array nor JSON lines: {error}") from None


def _integer(digits: str) -> float:
    return int(digits) if len(digits) <= LONGEST_INTEGER else float(digits)


def _is_unicode(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_unicode, value))
    return not isinstance(value, str) or not SURROGATE.search(value)


def _leave_out(counts: Counter | None, reason: str, message: str) -> None:
    if counts is None:
        raise RecordsError(f"{message}; a benchmark must be whole: fetch the file again")
    counts[reason] += 1


def read_rankings(
    path: pathlib.Path, names: str, ranks: str, prefix: str, dataset: str, counts: Counter | None
) -> list[Ranking]:
    """The rankings of a JSON file.

    Args:
        path: of the file.
        names, ranks: the keys of a row's image names and of their ranks.
        prefix: of the image names.
        dataset: what errors call it.
        counts: as for `read_rows`; of ranks out of range too.

    Raises:
        RecordsError: rows of another form, naming the row.
    """
    rankings = []
    for index, row in enumerate(read_rows(path, ("prompt", names, ranks), dataset, counts)):
        if not list_of(row[names], str) or not list_of(row[ranks], int | float):
            raise RecordsError(f"{path}, row {index}: {names} must be a list of texts and {ranks} one of numbers")
        if len(row[names]) != len(row[ranks]):
            raise RecordsError(f"{path}, row {index}: {len(row[names])} {names} but {len(row[ranks])} ranks")
        if not all(map(math.isfinite, row[ranks])):
            _leave_out(counts, "row of ranks out of range", f"{path}, row {index}, has ranks out of range")
            continue
        images = tuple(prefix + name for name in row[names])
        shares = _shares(row.get("raw_annotations"), len(images))
        rankings.append(Ranking(row["prompt"], images, tuple(row[ranks]), shares))
    return rankings


def _shares(annotations: Any, images: int) -> tuple[tuple[float, ...], ...] | None:
    """Of HPDv2's rankings by single people: the share that ranks an image before another, a tie being half a share.

    None where they are not there, or not of all images.
    """
    if not isinstance(annotations, list):
        return None
    orders = [each.get("rank") for each in annotations if isinstance(each, dict)]
    if not orders or not all(list_of(order, int | float) and len(order) == images for order in orders):
        return None
    ranks = np.array(orders, float)
    if not np.isfinite(ranks).all():
        return None
    before = np.sign(ranks[:, None, :] - ranks[:, :, None])  # people, image, other: 1 where the image is before
    return tuple(map(tuple, ((before + 1) / 2).mean(axis=0).tolist()))


def list_of(values: Any, kind: type | types.UnionType) -> bool:
    """Whether it is a list of that kind, without NaN."""
    return isinstance(values, list) and all(isinstance(value, kind) and value == value for value in values)


def parse_votes(value: Any) -> tuple[int, int] | None:
    """[12, 7] or "[12, 7]"; None for null, [null, null] and whatever else is not two counts."""
    value = parse_literal(value) if isinstance(value, str) else value
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return None
    votes = tuple(parse_number(vote) for vote in value)
    return None if None in votes or max(map(abs, votes)) > MOST_VOTES else (int(votes[0]), int(votes[1]))


def parse_number(value: Any) -> float | None:
    """A finite number or its text; None for null, for other text and for NaN."""
    if not isinstance(value, (str, int, float)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def parse_literal(text: str) -> Any:
    """The Python value that a text spells; None for other text, and for one longer than such values are."""
    if len(text) > LONGEST_LITERAL:
        return None
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
