"""The results of record, shown: every table that docs/measured.md and README have between marks, from `results/*.json`.

    python -m benchmarks.measured

A file is {"command", "conditions", "measured" or "recorded", "columns", "rows"}: the commit that was measured, or where
nobody noted it, the one that last wrote the numbers down. `benchmarks.speed` measures, and shows, the files named after
a processor, and `benchmarks.gpu` those named after a card; where there is none, no section of one.
"""

import json
import pathlib
import re

from absl import app

from benchmarks import speed
from benchmarks.gpu import tables

RESULTS = speed.RESULTS
DOCUMENT, README = speed.DOCUMENT, speed.HERE.parent / "README.md"
GPU = re.compile(r"(<!-- gpu: python -m benchmarks.gpu -->\n).*?(<!-- end of gpu -->)", flags=re.DOTALL)
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", flags=re.DOTALL)
# README's selection of `summary`: beginnings of the first column.
SELECTION = (
    "quickstart, from installed",
    "held-out pairs at sigma 0.2",
    "parity with the released code",
    "two processes x four",
    "reward server, 20 rounds",
    "a generator tuned by DiffusionNFT",
)


def load(name: str) -> dict:
    """A file of results."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def as_markdown(result: dict) -> str:
    """The table, then where it comes from."""
    lines = [result["columns"], ["---"] * len(result["columns"]), *result["rows"]]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    source = [f"`{result['command']}`"] if result["command"] else []
    source.append(result["conditions"])
    source += [f"measured at commit {result['measured']}"] if result.get("measured") else []
    source += [f"written down in commit {result['recorded']}"] if result.get("recorded") else []
    return f"{table}\n\n({'; '.join(source)}.)"


def selection(summary: dict) -> dict:
    """README's rows of the summary, without commits, and with links from where README lies."""
    rows = [
        [cell.replace("](", "](docs/") for cell in row[:-1]]
        for beginning in SELECTION
        for row in summary["rows"]
        if row[0].startswith(beginning)
    ]
    return {**summary, "columns": summary["columns"][:-1], "rows": rows}


def with_tables(text: str) -> str:
    """A document with every marked table anew."""

    def render(match: re.Match) -> str:
        name = match[2]
        result = selection(load("summary")) if name == "selection" else load(name)
        return f"{match[1]}{as_markdown(result)}\n{match[3]}"

    cards = tables.all_markdown()
    return GPU.sub(lambda match: f"{match[1]}{cards}{chr(10) if cards else ''}{match[2]}", MARKED.sub(render, text))


def write(path: pathlib.Path) -> None:
    path.write_text(with_tables(path.read_text()))


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    write(README)
    write(DOCUMENT)
    DOCUMENT.write_text(speed.with_section(DOCUMENT.read_text(), speed.all_markdown()))


if __name__ == "__main__":
    app.run(main)
