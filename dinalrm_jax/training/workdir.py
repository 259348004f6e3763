"""A run's directory: which run it belongs to, and whether a command may go on with it.

WORKDIR/config.json    the whole configuration, a name of the run, fingerprints of what it reads
"""

import dataclasses
import json
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dinalrm_jax.config import AlignConfig, SweepConfig, TrainConfig
from dinalrm_jax.devices import processes
from dinalrm_jax.disk import AnyPath, is_whole, remove_leftovers, write_json
from dinalrm_jax.mapping import ConfigError, from_mapping, to_mapping

RunConfig = TrainConfig | SweepConfig | AlignConfig
# What may change between two starts on a workdir: it says how a run is computed, spread, watched and saved, or where
# its inputs lie (fingerprints say what they are). Everything else decides the result.
FREE = (
    r"name",
    r"data",
    r"mixture\.\d+\.data",
    r"base_model",
    r"init_from",
    r"mesh\..*",
    r"execution\.(attention|layers|remat)",
    r"reward\.checkpoint",
    r"prompts",
    r"(generator|reward|tuning)\.(log_every|checkpoint_every)",
    r"(generator|reward)\.(evaluate_every|micro_batches)",  # of an alignment both decide what it ends in
    r"evaluation\.(batch_size|levels|ensemble)(\.\d+)?",
    r"rehearsal\.preparation\.threads",
    r"wandb_project",
    r"profile\..*",
)
PLACES = ("base_model", "init_from")
STEPS = re.compile(r"(generator|reward|tuning)\.(steps|epochs)")


@dataclasses.dataclass(frozen=True)
class Claim:
    """What identifies the run of a workdir.

    Attributes:
        run: a name of its own, which no other run has.
        config: its configuration.
        inputs: fingerprints of records and weights, by what they are.
        image_sizes: (height, width) in pixels of the images it trains on; none where an earlier version began it.
    """

    run: str
    config: RunConfig
    inputs: Mapping[str, str]
    image_sizes: tuple[tuple[int, int], ...] = ()


def read_claim(workdir: AnyPath) -> Claim | None:
    """What the directory was claimed for, or None.

    Raises:
        ConfigError: a file of another version, or none of ours.
    """
    path = workdir / "config.json"
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
        marks = {"runs": SweepConfig, "tuning": AlignConfig}
        kind: type[RunConfig] = next((kind for mark, kind in marks.items() if mark in found["config"]), TrainConfig)
        sizes = tuple((height, width) for height, width in found.get("image_sizes", ()))
        return Claim(found["run"], from_mapping(kind, found["config"]), found["inputs"], sizes)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not the configuration of a run that this version can continue; choose another --workdir "
            f"({type(error).__name__}: {error})"
        ) from None


def check_workdir(workdir: AnyPath, config: RunConfig, inputs: Mapping[str, str]) -> None:
    """Raises ConfigError if the directory holds a run that would end otherwise; says what changed.

    Args:
        inputs: fingerprints of what the run reads; none before it is opened.
    """
    if (claim := read_claim(workdir)) is None:
        return
    changed = [
        f"{name} ({old!r} -> {new!r})"
        for name, old, new in _differences(to_mapping(claim.config), to_mapping(config))
        if not _may_change(name, old, new, workdir, config)
    ]
    changed += [f"the contents of {name}" for name, digest in inputs.items() if claim.inputs.get(name) != digest]
    if changed:
        raise ConfigError(
            f"{workdir} holds a run that would end otherwise; changed: {', '.join(changed)}. Choose another --workdir, "
            "or restore these to continue that run"
        )


def claim_workdir(
    workdir: AnyPath,
    config: RunConfig,
    inputs: Mapping[str, str],
    image_sizes: Sequence[tuple[int, int]] = (),
) -> str:
    """Makes the run's directory and writes there whose it is, see `check_workdir`.

    Returns:
        The run's name, to the process that writes.
    """
    check_workdir(workdir, config, inputs)
    claim = read_claim(workdir)
    run = uuid.uuid4().hex[:12] if claim is None else claim.run
    if processes.is_first():
        workdir.mkdir(parents=True, exist_ok=True)
        remove_leftovers(workdir / "config.json")
        for lock in (*workdir.glob(".*.lock"), *workdir.glob("generator/.*.lock")):
            if lock.name != ".lock":
                lock.unlink()  # of a process that was killed: the workdir is this one's
        known = {} if claim is None else claim.inputs
        values: dict[str, Any] = {"run": run, "config": to_mapping(config), "inputs": {**known, **inputs}}
        values["image_sizes"] = [list(size) for size in image_sizes]
        write_json(workdir / "config.json", values, indent=1)
    return run


def _may_change(name: str, old: Any, new: Any, workdir: AnyPath, config: RunConfig) -> bool:
    """Whether a value may differ between two starts on a workdir."""
    if isinstance(config, SweepConfig):
        if re.fullmatch(r"seeds\.\d+", name):
            return old is None  # one more
        name = re.sub(r"^runs\.\d+\.(?!name$)", "", name)
    if name in PLACES and None in (old, new):
        return False  # weights that a run did not start from, or did
    if any(re.fullmatch(pattern, name) for pattern in FREE):
        return True
    if (match := STEPS.fullmatch(name)) and not isinstance(config, SweepConfig):
        # A longer run passes through a shorter one, unless its learning rate knows the end; a finished
        # generator is what the reward stage stands on.
        stage = getattr(config, match[1])
        finished = match[1] == "generator" and is_whole(workdir / "generator" / "backbone")
        return stage is not None and stage.optimizer.schedule == "constant" and not finished
    return False


def _differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The leaves that differ, with their dotted names."""
    if isinstance(old, (dict, list)) and type(old) is type(new):
        old, new = (value if isinstance(value, dict) else dict(enumerate(value)) for value in (old, new))
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    elif old != new:
        yield path, old, new
