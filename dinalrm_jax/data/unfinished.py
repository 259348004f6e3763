"""Work that a killed run leaves, and that the same command continues.

It lies in OUTPUT.unfinished, cut into parts with a file as result; see `data.preparation`. The first
process holds the output's lock (`disk.lock`) while it is worked on.
"""

import json
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
from tqdm import tqdm

from dinalrm_jax.data.config import PreparationConfig
from dinalrm_jax.data.preferences import Preference, stable_hash
from dinalrm_jax.data.records import RecordsError
from dinalrm_jax.devices import processes
from dinalrm_jax.disk import write_json
from dinalrm_jax.mapping import to_mapping

T = TypeVar("T")


def work_directory(output: pathlib.Path) -> pathlib.Path:
    """Where the work for an output is kept until that is whole."""
    return output.with_name(f"{output.name}.unfinished")


def check_output(output: pathlib.Path) -> None:
    """Raises FileExistsError if the output exists.

    What a kill after the output had its name left of its work is removed: that is work without records, as they
    are the output now.
    """
    if not output.exists():
        return
    work = work_directory(output)
    if processes.is_first() and work.is_dir() and not (work / "records").exists():
        shutil.rmtree(work)
    raise FileExistsError(f"{output} exists already; choose another output or remove it first")


def what_counts(config: PreparationConfig) -> dict[str, Any]:
    """The configuration without what changes no byte."""
    values = json.loads(json.dumps(to_mapping(config)))
    del values["threads"]
    return values


def claim(
    work: pathlib.Path,
    config: PreparationConfig,
    preferences: Mapping[str, Sequence[Preference]],
    made_by: Mapping[str, str | None],
) -> None:
    """Makes the working directory, or checks that the one there is of the same work and rids it of half files.

    Args:
        work: the directory.
        config, preferences: what is done there.
        made_by: what computes it, with "backend" and "precision".

    Raises:
        RecordsError: it is of other work; the message names what differs.
    """
    rows = [
        (split, row.prompt, row.chosen, row.rejected, row.label)
        for split in sorted(preferences)
        for row in preferences[split]
    ]
    plan: dict[str, Any] = {"config": what_counts(config), **made_by, "preferences": stable_hash(*rows).hex()}
    path = work / "plan.json"
    if processes.is_first():
        for name in ("parts", "records/images", "records/prompts"):
            (work / name).mkdir(parents=True, exist_ok=True)
        for half in work.rglob(".*.partial-*"):
            half.unlink()
        if not path.exists():
            write_json(path, plan)
    processes.barrier("plan")
    found = json.loads(path.read_text())
    for key in ("backend", "precision"):
        if plan[key] != found.get(key, plan[key]):
            raise RecordsError(
                f"{work} was begun with the {key} {found[key]}, this process has {plan[key]}: latents would differ "
                f"from image to image; go on with {found[key]}, or remove it to start anew"
            )
    if found != plan:
        changed = [key for key in plan["config"] if plan["config"][key] != found.get("config", {}).get(key)]
        changed += [key for key in plan if key != "config" and plan[key] != found.get(key)]
        raise RecordsError(
            f"{work} holds unfinished work of another configuration (changed: {', '.join(changed)}); restore these "
            "values to go on with it, or remove it to start anew"
        )


def share(
    parts: Sequence[T], result: Callable[[T], pathlib.Path], weight: Callable[[T], int], description: str, unit: str
) -> tuple[list[T], tqdm]:
    """This process's parts that have no result yet, and a bar over its share, shown by the first process."""
    mine = [part for index, part in enumerate(parts) if index % jax.process_count() == jax.process_index()]
    todo = [part for part in mine if not result(part).exists()]
    total = sum(map(weight, mine))
    done = total - sum(map(weight, todo))
    bar = processes.progress(total=total, initial=done, desc=description, unit=unit)
    return todo, bar
