"""Config files (`configs/*.py`) and their overrides, from the working directory or from the package."""

import difflib
import functools
import pathlib
import re
import sys
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

import dinalrm_jax
from dinalrm_jax.cli.flags import UsageError
from dinalrm_jax.config import AlignConfig, SweepConfig, TrainConfig
from dinalrm_jax.mapping import from_mapping, keys_below


def packaged() -> pathlib.Path | None:
    """The directory of the configs that come with the package: its own when installed, else the repository's."""
    package = pathlib.Path(dinalrm_jax.__file__).resolve().parent
    repository = package.parent / "configs" if (package.parent / "pyproject.toml").is_file() else None
    found = (path for path in (package / "shipped" / "configs", repository) if path is not None and path.is_dir())
    return next(found, None)


def find_config(file: str) -> str:
    """A config's file, with the variant that may follow it (`FILE:VARIANT`), as `ml_collections` loads it.

    Raises:
        FileNotFoundError: it is neither here nor among the packaged ones, which the message names.
    """
    name, colon, variant = file.partition(":")
    path, directory = pathlib.Path(name), packaged()
    if not path.is_file():
        ours = None if directory is None or path.is_absolute() else directory.parent / path
        if ours is None or ours.parent.resolve() != directory.resolve() or not ours.is_file():
            names = ", ".join(f"configs/{each}" for each in shipped_names())
            raise FileNotFoundError(f"no config file {name}; the packaged ones are {names}")
        print(f"{name} is not in this directory; taking the packaged {ours}", flush=True)
        path = ours
    if (path.parent / "__init__.py").is_file():
        # So that configs which import each other (`import configs.quickstart`) find the folder that they lie in.
        root = str(path.resolve().parent.parent)
        sys.path[:] = [root, *(entry for entry in sys.path if entry != root)]
    return f"{path}{colon}{variant}"


def shipped_names() -> list[str]:
    """The packaged configs' file names."""
    directory = packaged()
    return sorted(path.name for path in directory.glob("[a-z]*.py")) if directory is not None else []


def load_run(file: str, overrides: Sequence[str]) -> TrainConfig | SweepConfig:
    """The run or the sweep that a config file and the command line's overrides describe; errors as `load_config`'s.

    Raises:
        ConfigError: values that do not fit each other.
    """
    values = load_config(file, overrides, (TrainConfig, SweepConfig))
    kind: type[TrainConfig | SweepConfig] = SweepConfig if "runs" in values else TrainConfig
    return from_mapping(kind, values)


def load_align(file: str, overrides: Sequence[str]) -> AlignConfig:
    """The alignment that a config file and the command line's overrides describe; errors as `load_run`'s."""
    return from_mapping(AlignConfig, load_config(file, overrides, (AlignConfig,)))


def load_config(file: str, overrides: Sequence[str], kinds: Sequence[type]) -> ConfigDict:
    """A config file's values with the command line's overrides, each `--config.KEY=VALUE`, by `config_flags`.

    `--config.KEY=None` is taken for any value that may be None, a section among them.

    Args:
        kinds: the dataclasses that it may describe, whose keys are proposed for one that it has not.

    Raises:
        FileNotFoundError: there is no such file.
        UsageError: a variant that the file refuses, or an override that `config_flags` does.
    """
    nothing = [argument for argument in overrides if re.fullmatch(r"--config\.[\w.]+=None", argument)]
    argv = ["", f"--config={find_config(file)}", *(argument for argument in overrides if argument not in nothing)]
    values = flags.FlagValues()
    try:
        holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
        values(argv)
        config = holder.value
        for argument in nothing:
            *parents, key = argument.removeprefix("--config.").removesuffix("=None").split(".")
            section = functools.reduce(lambda node, name: node[name], parents, config)
            section[key]  # raises KeyError for an unknown one
            with section.ignore_type():
                section[key] = None
    except (AttributeError, KeyError, TypeError, ValueError, flags.Error) as error:
        raise UsageError(_told(error, file, kinds)) from error
    return config


# What `config_flags` makes of an error that a config file raises: a traceback, and the error.
REFUSED = re.compile(r"parsing config file:.*^(?:[\w.]+\.)?(?:ValueError|ConfigError): ", re.DOTALL | re.MULTILINE)


# And of a flag for what the file leaves None, or for a key below it.
NOTHING_THERE = re.compile(
    r"NoneType'> of field config\.([\w.]+) is not|Override ([\w.]+)\.\w+ can not be applied because"
)


def _told(error: Exception, file: str, kinds: Sequence[type]) -> str:
    if there := NOTHING_THERE.search(str(error)):
        return (
            f"config.{there[1] or there[2]} is None in {file}, and a flag cannot say what kind of value it is to have; "
            "set it in a config file of your own"
        )
    if said := REFUSED.search(str(error)):
        return f"{file}: {str(error)[said.end() :].strip()}"
    if "get_config() takes 0 positional arguments" in str(error):
        name, _, variant = file.partition(":")
        return f"{name} has no variants, and :{variant} names one"
    refused = re.search(r'instead of "(\w+)"', str(error))
    key = refused[1] if refused else str(error).strip("\"'")
    if wrong := re.match(r"flag --(config\.[\w.]+)=(.*): invalid literal", str(error), re.DOTALL):
        return f"{wrong[1]} must be an integer, got {wrong[2]!r}"
    if not re.fullmatch(r"\w+", key):
        return str(error)
    near = difflib.get_close_matches(key, set().union(*map(keys_below, kinds)), n=1)
    return f"unknown key {key!r}; " + (f"did you mean {near[0]!r}?" if near else "dinalrm_jax/config has them all")
