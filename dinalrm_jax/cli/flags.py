"""Command lines from frozen dataclasses: a field is a flag, and its line in the docstring is the flag's help.

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Options:
        '''What the command is told.

        sigma: Noise level in [0, 1].
        '''

        sigma: float = 0.4

gives `--sigma`. A field that is a dataclass itself, an existing config, gives a flag for each of its own fields, with
the help of its own docstring where the outer one says nothing about them. Nothing slow is imported here.
"""

import dataclasses
import difflib
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

from dinalrm_jax.mapping import ConfigError

T = TypeVar("T")
NONE = dataclasses.MISSING
TRUE, FALSE = ("true", "1", "yes"), ("false", "0", "no")
WIDTH = 100  # of help's lines


class UsageError(ConfigError):
    """A command line that cannot be understood."""


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag, or an argument without a name.

    path: of the field, through the dataclasses around it.
    metavar: what help writes for the value.
    default: `dataclasses.MISSING` where one must be given.
    aliases: further names.
    positional: it takes the arguments that have no name.
    prefix: it takes all flags whose name begins like this, as they stand.
    whole: a list whose values may hold commas, and are given one by one.
    """

    name: str
    path: tuple[str, ...]
    hint: Any
    default: Any
    help: str
    metavar: str
    aliases: tuple[str, ...] = ()
    positional: bool = False
    prefix: str | None = None
    whole: bool = False

    @property
    def is_list(self) -> bool:
        return typing.get_origin(self.hint) is tuple

    @property
    def label(self) -> str:
        """How messages call it."""
        return self.metavar if self.positional else f"--{self.name}"


def flag(
    default: Any = NONE,
    *,
    metavar: str | None = None,
    aliases: Sequence[str] = (),
    positional: bool = False,
    prefix: str | None = None,
    whole: bool = False,
    names: Mapping[str, str] | None = None,
) -> Any:
    """A field with more to it than name, type and default; see `Flag`.

    Args:
        names: of a config's fields whose flags are called otherwise, by their path in it ("encoders.kind").
    """
    told = {"metavar": metavar, "aliases": tuple(aliases), "positional": positional, "prefix": prefix, "whole": whole}
    return dataclasses.field(default=default, metadata=told | {"names": names or {}})


def flags_of(options: type) -> tuple[Flag, ...]:
    """The flags of a dataclass, in its fields' order, those that must be given first."""
    found = list(_flags(options, (), NONE, documented(options), {}))
    return tuple(sorted(found, key=lambda flag: (flag.positional, flag.default is not NONE)))


def _flags(cls: Any, path: tuple[str, ...], instance: Any, helps: Mapping[str, str], names) -> Iterator[Flag]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint, inner = hints[field.name], (*path, field.name)
        default = field.default if instance is NONE else getattr(instance, field.name)
        if dataclasses.is_dataclass(hint):
            told = field.metadata.get("names", {}) if not path else names
            # What is said about a field further out goes before what its own class says.
            yield from _flags(hint, inner, default, {**documented(hint), **helps}, told)
            continue
        name = names.get(".".join(inner[1:]), field.name).replace("_", "-")
        kind = _without_none(hint)
        yield Flag(
            name,
            inner,
            kind,
            default,
            _sentence(helps.get(name.replace("-", "_"), helps.get(field.name, ""))),
            field.metadata.get("metavar") or _metavar(kind),
            field.metadata.get("aliases", ()),
            field.metadata.get("positional", False),
            field.metadata.get("prefix"),
            field.metadata.get("whole", False),
        )


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = [arg for arg in typing.get_args(hint) if arg is not type(None)]
    return hint


def _metavar(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        one = _metavar(typing.get_args(kind)[0])
        return f"{one}[,{one}...]"
    if typing.get_origin(kind) is Literal:
        return "|".join(map(str, typing.get_args(kind)))
    return {int: "N", float: "X", str: "TEXT", bool: "true|false"}[kind]


def _sentence(text: str) -> str:
    text = text.strip()
    return text and text[0].upper() + text[1:] + "." * (text[-1] != ".")


def documented(cls: Any) -> dict[str, str]:
    """The `name: text` and `name, name: text` entries of a dataclass's docstring, and of those that it extends."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base) or not base.__dict__.get("__doc__"):
            continue
        fields = {field.name for field in dataclasses.fields(base)}
        fields |= {inner for field in dataclasses.fields(base) for inner in _inner_names(base, field)}
        names: list[str] = []
        indent = 0
        for line in inspect.cleandoc(base.__doc__).splitlines():
            depth = len(line) - len(line.lstrip())
            match = re.fullmatch(r"\s*(\w+(?:, \w+)*): (.*)", line)
            if names and line.strip() and depth > indent:
                for name in names:
                    found[name] += f" {line.strip()}"
            elif match and all(name in fields for name in match[1].split(", ")):
                names, indent = match[1].split(", "), depth
                found |= dict.fromkeys(names, match[2])
            else:
                names = []
    return found


def _inner_names(cls: Any, field: dataclasses.Field) -> set[str]:
    """Names that help may have for the fields of a config that is a field itself."""
    hint = typing.get_type_hints(cls)[field.name]
    if not dataclasses.is_dataclass(hint):
        return set()
    inner = {name for each in dataclasses.fields(hint) for name in (each.name, *_inner_names(hint, each))}
    return inner | {name.replace("-", "_") for name in field.metadata.get("names", {}).values()}


# ------------------------------------------------------------------------------------------------ reading


def parse(options: type[T], argv: Sequence[str]) -> T:
    """The options that a command line gives; names may have underscores for dashes.

    Raises:
        UsageError: an unknown flag (the nearest valid one is named), a value that it does not take, one that
            must be given and is not, or values that do not go together.
    """
    flags = flags_of(options)
    named = {name: flag for flag in flags if not flag.positional for name in (flag.name, *flag.aliases)}
    given: dict[tuple[str, ...], Any] = {}
    loose = _read(list(argv), flags, named, given)
    for flag in flags:
        if flag.positional and loose:
            given[flag.path] = tuple(_value(flag, text) for text in (loose if flag.is_list else loose[:1]))
            loose = [] if flag.is_list else loose[1:]
            if not flag.is_list:
                (given[flag.path],) = given[flag.path]
    if loose:
        raise UsageError(f"unexpected argument {loose[0]!r}")
    missing = [flag for flag in flags if flag.default is NONE and flag.path not in given]
    if missing:
        wanted = "; ".join(f"{flag.label} ({flag.help.rstrip('.')})" for flag in missing)
        raise UsageError(f"this command needs {wanted}")
    try:
        return _build(options, (), given)
    except UsageError:
        raise
    except ConfigError as error:
        raise UsageError(str(error)) from None


def asks_for_help(argv: Sequence[str]) -> bool:
    """Whether `--help` stands among the flags."""
    before = argv[: argv.index("--")] if "--" in argv else argv
    return any(argument in ("--help", "-h", "-help", "--helpfull", "--helpshort") for argument in before)


def _read(argv: list[str], flags, named: Mapping[str, Flag], given: dict) -> list[str]:
    """Takes the flags into `given`, and returns what has no name."""
    loose = []
    while argv:
        argument = argv.pop(0)
        if argument == "--":
            return loose + argv
        if not argument.startswith("--"):
            loose.append(argument)
            continue
        name, assigned, text = argument[2:].partition("=")
        taker = next((flag for flag in flags if flag.prefix and name.removeprefix("no").startswith(flag.prefix)), None)
        if taker is not None:
            if not assigned and argv and not argv[0].startswith("--"):
                argument += f"={argv.pop(0)}"
            given[taker.path] = (*given.get(taker.path, ()), argument)
            continue
        flag, value = _find(name.replace("_", "-"), named), text
        if flag.hint is bool and not assigned:
            given[flag.path] = name.replace("_", "-") in (flag.name, *flag.aliases)
            continue
        if not assigned:
            if not argv or argv[0].startswith("--"):
                raise UsageError(f"--{flag.name} needs a value: {_expected(flag)}")
            value = argv.pop(0)
        read = _value(flag, value) if not flag.is_list else _values(flag, value)
        given[flag.path] = (*given.get(flag.path, ()), *read) if flag.is_list else read
    return loose


def _find(name: str, named: Mapping[str, Flag]) -> Flag:
    if name in named:
        return named[name]
    for negated in (name.removeprefix("no-"), name.removeprefix("no")):
        if negated != name and negated in named and named[negated].hint is bool:
            return named[negated]
    near = difflib.get_close_matches(name, named, n=1, cutoff=0.5)
    raise UsageError(
        f"unknown flag --{name}; " + (f"did you mean --{near[0]}?" if near else "--help lists what there is")
    )


def _values(flag: Flag, text: str) -> tuple:
    if flag.whole:
        return (_value(flag, text),)
    return tuple(_value(flag, part.strip()) for part in text.split(",")) if text else ()


def _value(flag: Flag, text: str) -> Any:
    kind = typing.get_args(flag.hint)[0] if flag.is_list else flag.hint
    try:
        if typing.get_origin(kind) is Literal:
            return {str(choice): choice for choice in typing.get_args(kind)}[text]
        if kind is bool:
            return {**dict.fromkeys(TRUE, True), **dict.fromkeys(FALSE, False)}[text.lower()]
        return kind(text)
    except (KeyError, ValueError):
        pass
    choices = list(map(str, typing.get_args(kind))) if typing.get_origin(kind) is Literal else []
    near = difflib.get_close_matches(text, choices, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UsageError(f"{flag.label} takes {_expected(flag)}, got {text!r}{hint}")


def _expected(flag: Flag) -> str:
    kind = typing.get_args(flag.hint)[0] if flag.is_list else flag.hint
    if typing.get_origin(kind) is Literal:
        one = f"one of {', '.join(map(str, typing.get_args(kind)))}"
    else:
        one = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kind]
    many = {int: "whole numbers", float: "numbers", str: "texts"}
    return f"{many.get(kind, one)} between commas" if flag.is_list and not flag.positional else one


def _build(cls: type, path: tuple[str, ...], given: Mapping[tuple[str, ...], Any]) -> Any:
    """The dataclass with what is given; the rest has its defaults."""
    hints, values = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        inner = (*path, field.name)
        if inner in given:
            values[field.name] = given[inner]
        elif dataclasses.is_dataclass(hints[field.name]) and any(key[: len(inner)] == inner for key in given):
            if field.default is NONE:
                values[field.name] = _build(hints[field.name], inner, given)
            else:
                ours = {key: value for key, value in given.items() if key[: len(inner)] == inner}
                values[field.name] = _replaced(field.default, inner, ours)
    return cls(**values)


def _replaced(instance: Any, path: tuple[str, ...], given: Mapping[tuple[str, ...], Any]) -> Any:
    """A copy of a default with what is given."""
    changes = {key[len(path)]: value for key, value in given.items() if len(key) == len(path) + 1}
    return dataclasses.replace(instance, **changes)


# --------------------------------------------------------------------------------------------------- help


def help_text(command: str, doc: str, options: type) -> str:
    """What `--help` prints: usage, the command's docstring, and every flag with a sentence."""
    flags = flags_of(options)
    needed = [f"{flag.label} {flag.metavar}" for flag in flags if flag.default is NONE and not flag.positional]
    loose = [flag.metavar for flag in flags if flag.positional]
    lines = [" ".join(["usage:", command, *needed, "[flags]", *loose]), "", inspect.cleandoc(doc).strip(), ""]
    for flag in sorted(flags, key=lambda flag: not flag.positional):
        if flag.positional:
            head = flag.metavar
        elif flag.prefix:
            head = f"--{flag.prefix}{flag.metavar}"
        elif flag.hint is bool:
            head = f"--{flag.name}, --no-{flag.name}"
        else:
            head = ", ".join(f"--{name}" for name in (flag.name, *flag.aliases)) + f" {flag.metavar}"
        note = "required" if flag.default is NONE else _default(flag)
        lines.append(f"  {head}" + (f"  ({note})" if note else ""))
        lines += textwrap.wrap(flag.help, WIDTH, initial_indent=6 * " ", subsequent_indent=6 * " ")
    return "\n".join(lines)


def _default(flag: Flag) -> str:
    if flag.default is None or flag.default == ():
        return ""
    if isinstance(flag.default, tuple):
        return "default: " + ",".join(map(str, flag.default))
    return f"default: {str(flag.default).lower() if flag.hint is bool else flag.default}"
