"""Which training pairs several scores agree on with people: multi-preference consistent filtering (arXiv 2502.01051).

A pair with a winner is kept where the winner's every score exceeds the loser's by more than a rule asks, a tie where
all scores are near each other. Scores come from CSV files, joined by the images' names.
"""

import csv
import dataclasses
import math
import os
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence

from dinalrm_jax.data.config import Rule, parse_rules
from dinalrm_jax.data.preferences import Preference, Source
from dinalrm_jax.data.records import RecordsError


def without_disagreement(
    source: Source, directory: pathlib.Path, scores: Sequence[str], agree: Sequence[str], ties: bool
) -> Source:
    """The source with the training pairs that pass, and without ties among those held out.

    Args:
        source: read from `directory`.
        scores: CSV files, each a path, or NAME=path of one whose column "score" is called NAME: what
            `python -m dinalrm_jax.judge --csv` writes.
        agree: see `parse_rules`; none: all pairs pass.
        ties: keep training pairs that people tied, with the label 1/2.

    Raises:
        RecordsError: ties are asked for and there are none; a score file that is not there, has no such column or
            lacks an image.
    """
    counts, kept = Counter(source.counts), {}
    for split, rows in source.preferences.items():
        strict = [row for row in rows if row.label != 0.5]
        keeps_ties = ties and split == "train"
        if keeps_ties and len(strict) == len(rows):
            raise RecordsError(
                f"{directory} gives no training pair that people tied, which jsonl and hpdv2's rankings can; leave "
                "ties (--ties) out"
            )
        counts["tied pair"] += 0 if keeps_ties else len(rows) - len(strict)
        kept[split] = rows if keeps_ties else strict
    if agree:
        rules = parse_rules(agree)
        if "train" not in kept:
            raise RecordsError(f"{directory} has no training pairs, which agree (--agree) selects from; leave it out")
        root = pathlib.Path(os.path.abspath(directory / source.images))
        found = read_scores(root, scores, [rule.column for rule in rules])
        kept["train"] = _agreeing(kept["train"], rules, found, counts)
    return dataclasses.replace(source, preferences=kept, counts=counts)


Scores = Mapping[str, Mapping[tuple[str | None, str], float]]  # column -> (prompt, or None for any; image) -> score


def read_scores(root: pathlib.Path, files: Sequence[str], columns: Sequence[str]) -> Scores:
    """Scores by column, of images named within `root`, an absolute path; arguments and errors as above."""
    found: dict[str, dict[tuple[str | None, str], float]] = {}
    present: list[str] = []
    for given in files:
        name, _, path = given.rpartition("=")
        try:
            with open(path, newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                header = list(reader.fieldnames or ())
                if "image" not in header or (name and "score" not in header):
                    needed = "image and score" if name else "image"
                    raise RecordsError(f"{path} has the columns {', '.join(header)}; it needs {needed}")
                renamed = {"score": name} if name else {}
                present += [renamed.get(column, column) for column in header]
                wanted = [column for column in header if renamed.get(column, column) in columns]
                for number, row in enumerate(reader, 2):
                    key = row.get("prompt") or None, _within(root, row["image"])
                    for column in wanted:
                        score = _number(row[column], f"{path}, line {number}: {column}")
                        found.setdefault(renamed.get(column, column), {})[key] = score
        except OSError as error:
            raise RecordsError(f"cannot read the scores {path}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise RecordsError(f"{path} is not text in UTF-8: {error.reason}") from None
    if missing := [column for column in columns if column not in found]:
        raise RecordsError(f"no score file has {', '.join(missing)}; their columns are {', '.join(present) or 'none'}")
    return found


def _within(root: pathlib.Path, image: str) -> str:
    """An image's name below `root`, which a file that was named on a command line has in front, in whatever form."""
    path = pathlib.Path(os.path.abspath(image))
    return str(path.relative_to(root)) if path.is_relative_to(root) else image


def _number(text: str | None, where: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise RecordsError(f"{where} is {text!r}, expected a number; score this image again, or leave its row out")
    return value


def _agreeing(rows: Sequence[Preference], rules: Sequence[Rule], scores: Scores, counts: Counter) -> list[Preference]:
    kept, lacking = [], []

    def score(column: str, prompt: str, image: str) -> float:
        of_column = scores[column]
        value = of_column.get((prompt, image), of_column.get((None, image)))
        if value is None:
            lacking.append(f"{column} of {image}")
        return math.nan if value is None else value

    for row in rows:
        gaps = [score(r.column, row.prompt, row.chosen) - score(r.column, row.prompt, row.rejected) for r in rules]
        tied = row.label == 0.5
        against = [rule.column for rule, gap in zip(rules, gaps) if not rule.keeps(gap, tied)]
        if against:  # counted at the first rule that it fails
            counts[f"{'tie' if tied else 'pair'} that {against[0]} does not agree with"] += 1
        else:
            kept.append(row)
    if lacking:
        shown = ", ".join(lacking[:3])
        known = next(iter(next(iter(scores.values()))))
        raise RecordsError(
            f"the score files lack {len(lacking)} scores of training pairs, for instance {shown}; what they have is "
            f"named like {known[1]}"
        )
    return kept
