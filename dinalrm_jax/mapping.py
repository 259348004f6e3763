"""Frozen, typed configurations from plain mappings, and back.

A config file (`configs/*.py`) returns an `ml_collections.ConfigDict`, a native checkpoint holds JSON, a command
line text; all pass through `from_mapping`, which checks every key and type and names the nearest valid key where
one is unknown.
"""

import abc
import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from ml_collections import ConfigDict  # needed by training only

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be used as it stands."""


class Variants(abc.ABC):
    """Base of configurations that come in several kinds, each a dataclass of its own."""

    @classmethod
    @abc.abstractmethod
    def variant(cls, values: Mapping[str, Any]) -> tuple[type, dict[str, Any]]:
        """The kind that a mapping describes, and the mapping without what tells the kinds apart.

        Raises:
            ConfigError: a kind that there is not.
        """

    @classmethod
    @abc.abstractmethod
    def kinds(cls) -> tuple[type, ...]:
        """All of them."""

    @abc.abstractmethod
    def marks(self) -> dict[str, Any]:
        """What a mapping of this kind has beside its fields."""


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str = "config") -> T:
    """Builds the frozen dataclass `cls` from a plain mapping, checking keys and types.

    Args:
        cls: a dataclass, or a base of `Variants`; nested ones are built from nested mappings.
        values: a mapping, for instance an `ml_collections.ConfigDict` or parsed JSON.
        where: what error messages call the mapping.

    Raises:
        ConfigError: an unknown key (the nearest valid one is named), a missing one, or a value of
            the wrong type.
    """
    kind, values = _kind(cls, values, where)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = [key for key in values if key not in fields]
    if unknown:
        raise ConfigError("; ".join(_unknown_key(f"{where}.{key}", key, fields) for key in unknown))
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)} (needed by {kind.__name__})")
    hints = typing.get_type_hints(kind)
    try:
        return kind(**{key: _convert(hints[key], value, f"{where}.{key}") for key, value in values.items()})
    except ConfigError as error:
        # A dataclass's own check knows its fields but not where it stands; say it once.
        if str(error).startswith("config") or str(error).startswith(where):
            raise
        raise ConfigError(f"{where}: {error}") from None


def from_known(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """`from_mapping` of the keys that `cls` has, for files of others that say more than a model's shape."""
    known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    return from_mapping(cls, {key: value for key, value in values.items() if key in known}, where)


def with_defaults(cls: type, values: Mapping[str, Any]) -> "ConfigDict":
    """`values` with every default of the dataclass `cls` filled in, for `configs/*.py` to return.

    What stands in a ConfigDict can be overridden on the command line, so nothing may be left out.
    Values are not checked here: `from_mapping` does that when the overrides are in.
    """
    from ml_collections import ConfigDict, config_dict

    out = ConfigDict()
    cls, _ = _kind(cls, values, "config")
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        inner = [arg for arg in typing.get_args(hint) if arg is not type(None)] or [hint]
        value = values.get(field.name, field.default)
        if value is dataclasses.MISSING:
            continue  # from_mapping names it
        if dataclasses.is_dataclass(value):
            value = to_mapping(value)
        if value is None and inner[0] in (str, int, float):
            out[field.name] = config_dict.placeholder(inner[0])
        elif _is_config(inner[0]) and hasattr(value, "keys"):
            out[field.name] = with_defaults(inner[0], value)
        else:
            out[field.name] = tuple(value) if isinstance(value, list) else value
    for key in values:
        if key not in out:
            out[key] = values[key]
    return out


def to_mapping(config: Any) -> dict[str, Any]:
    """The inverse of `from_mapping`: nested plain dicts, tuples as lists, ready for JSON."""
    marks = config.marks() if isinstance(config, Variants) else {}
    return marks | {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def at_least(config: Any, least: float, names: Sequence[str]) -> None:
    """Raises ConfigError where one of these fields, None left aside, is below `least`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise ConfigError(f"{name} must be at least {least}, got {value}")


def refuse_ignored(config: Any, names: Sequence[str], reason: str) -> None:
    """Raises ConfigError where one of these fields is not at its default, but the others leave it without effect."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    given = [name for name in names if getattr(config, name) != defaults[name]]
    if given:
        values = ", ".join(f"{name} = {getattr(config, name)!r}" for name in given)
        raise ConfigError(
            f"{values} would have no effect: {reason}; leave it at {', '.join(repr(defaults[name]) for name in given)}"
        )


def check_types(config: Any) -> None:
    """Raises ConfigError where a field of a dataclass is nothing that `from_mapping` would take."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        _convert(hints[field.name], getattr(config, field.name), field.name)


def keys_below(cls: Any) -> set[str]:
    """Every key of a configuration and of those in it, for "did you mean"."""
    if not dataclasses.is_dataclass(cls):
        return set().union(*map(keys_below, cls.kinds()))
    found = set()
    for name, hint in typing.get_type_hints(cls).items():
        found.add(name)
        for kind in (hint, *typing.get_args(hint)):
            if _is_config(kind):
                found |= keys_below(kind)
    return found


def _is_config(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint) or (isinstance(hint, type) and issubclass(hint, Variants))


def _kind(cls: Any, values: Mapping[str, Any], where: str) -> tuple[Any, Mapping[str, Any]]:
    if dataclasses.is_dataclass(cls):
        return cls, values
    try:
        return cls.variant({key: values[key] for key in values})  # a ConfigDict is no Mapping
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_mapping(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _unknown_key(path: str, key: str, valid: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(sorted(valid))}"
    return f"{path} is not a known key; {hint}"


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (inner,) = [arg for arg in args if arg is not type(None)]
        return _convert(inner, value, where)
    if origin is Literal:
        if value not in args:
            near = difflib.get_close_matches(str(value), [str(arg) for arg in args], n=1)
            hint_text = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(map(repr, args))}"
            raise ConfigError(f"{where} is {value!r}; {hint_text}")
        return value
    if origin is tuple:
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise ConfigError(f"{where} must be a sequence, got {value!r}")
        return tuple(_convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if _is_config(hint):
        if isinstance(value, hint):
            return value
        if not hasattr(value, "keys"):
            raise ConfigError(f"{where} must be a mapping of {hint.__name__}'s keys, got {value!r}")
        return from_mapping(hint, value, where)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{where} must be {hint.__name__}, got {type(value).__name__} {value!r}")
    return value
