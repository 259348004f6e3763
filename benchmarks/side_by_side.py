"""A sweep's runs by noise level: held-out accuracy, and with prompts exchanged, mean and spread over the seeds.

    python -m benchmarks.side_by_side --sweep runs/quickstart_lrm

Prints a table of what the runs' reports hold.
"""

import collections
import json
import pathlib

import numpy as np
from absl import app, flags

WANTED = ("0", "0.2", "0.4", "0.6", "0.8")  # of these, the ones that the reports have


def main(argv: list[str]) -> None:
    found = collections.defaultdict(list)
    for path in sorted(pathlib.Path(flags.FLAGS.sweep).glob("seed*/*/report/results.json")):
        found[path.parents[1].name].append(json.loads(path.read_text()))
    if not found:
        raise app.UsageError(f"{flags.FLAGS.sweep} holds no runs of a sweep: no seed*/*/report/results.json")
    first = next(iter(found.values()))[0]
    levels = [level for level in WANTED if level in first]
    columns = [column for column in first[levels[0]] if column != "all, shared noise"]
    print(f"| {len(next(iter(found.values())))} seeds | " + " | ".join(f"sigma {level}" for level in levels) + " |")
    print("|---" * (len(levels) + 1) + "|")
    for name, seeds in found.items():
        for column in columns:
            values = 100 * np.array([[seed[level][column] for level in levels] for seed in seeds])
            spread = values.std(axis=0, ddof=min(1, len(seeds) - 1))
            cells = [f"{mean:.1f} ± {s:.1f}" for mean, s in zip(values.mean(axis=0), spread)]
            print(f"| {name}, {column} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    flags.DEFINE_string("sweep", "runs/quickstart_lrm", "Workdir of the sweep.")
    app.run(main)
