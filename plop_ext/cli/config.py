"""Options from a file: `plop.toml` in the current folder, or the file that --config names.

A table `[score]` has options of `plop score`, named as on the command line without the dashes; the table `[plop]` has
options of every command that knows them. The command line wins over the command's table, and this over `[plop]`.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from plop_ext.errors import InputError, first_line, reason
from plop_ext.files import read_whole

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]

DEFAULT = "plop.toml"
_COMMON = "plop"
# A file that comes with somebody's repository must neither run code nor replace files.
_COMMAND_LINE_ONLY = ("trust-remote-code", "force", "config", "help")


def with_config(arguments: Sequence[str], commands: Mapping[str, argparse.ArgumentParser]) -> list[str]:
    """Return the command line with the options of the file inserted after the command's name.

    Args:
        arguments: The command line without the program's name.
        commands: The parsers of the commands, by name.

    Raises:
        InputError: If the file is missing, is no TOML, or has an option that the command does not know.
    """
    place = next((i for i, word in enumerate(arguments) if word in commands), None)
    if place is None:
        return list(arguments)
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", default=None)
    named = finder.parse_known_args([word for word in arguments if word != "--help"])[0].config
    path = Path(DEFAULT if named is None else named)
    if named is None and not path.is_file():
        return list(arguments)
    command = arguments[place]
    words = list(_words(path, _tables(path, commands), command, commands, arguments))
    if words:  # a file in the current folder must not change results without a word
        print(f"plop: from {path}: {shlex.join(words)}", file=sys.stderr)
    return [*arguments[: place + 1], *words, *arguments[place + 1 :]]


def _tables(path: Path, commands: Mapping[str, argparse.ArgumentParser]) -> dict[str, Any]:
    try:
        tables = tomllib.loads(read_whole(path).decode())
    except OSError as error:
        raise InputError(f"cannot read `{path}`: {reason(error)}; name a TOML file") from error
    except ValueError as error:
        raise InputError(f"`{path}` is no TOML: {first_line(error)}; correct it") from error
    unknown = [name for name in tables if name not in (*commands, _COMMON) or not isinstance(tables[name], dict)]
    if unknown:
        raise InputError(f"`{path}`: `{unknown[0]}` is no table of options; there are {_listed([_COMMON, *commands])}")
    return tables


def _words(
    path: Path,
    tables: Mapping[str, Mapping[str, Any]],
    command: str,
    commands: Mapping[str, argparse.ArgumentParser],
    given: Sequence[str],
) -> Iterator[str]:
    """Yield the options of one command as words of a command line, except those that are given there."""
    own = tables.get(command, {})
    values = {**tables.get(_COMMON, {}), **own}
    everywhere = {name for parser in commands.values() for name in _options(parser)}
    options = _options(commands[command])
    for name, value in values.items():
        if name in _COMMAND_LINE_ONLY:
            raise InputError(f"`{path}`: `{name}` can only be given on the command line; remove it from the file")
        if name not in options:
            if name in everywhere and name not in own:
                continue
            raise InputError(f"`{path}`: plop {command} has no option `{name}`; see plop {command} --help")
        action = options[name]
        if not any(word.partition("=")[0] in action.option_strings for word in given):
            yield from _option_words(path, name, value, action)


def _options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Return the options of a parser by their long names, without the dashes."""
    return {
        option.removeprefix("--"): action
        for action in parser._actions  # argparse has no public list
        for option in action.option_strings
        if option.startswith("--")
    }


def _option_words(path: Path, name: str, value: Any, action: argparse.Action) -> list[str]:
    option = f"--{name}"
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise InputError(f"`{path}`: `{name}` must be true or false, got {value!r}")
        if isinstance(action, argparse.BooleanOptionalAction):
            return [option if value else f"--no-{name}".replace("--no-no-", "--")]
        return [option] if value else []
    if isinstance(value, bool) or value is None:
        raise InputError(f"`{path}`: `{name}` needs a value, got {value!r}")
    if isinstance(value, dict):
        return [f"{option}={','.join(f'{key}={item}' for key, item in value.items())}"]
    if not isinstance(value, list):
        return [f"{option}={value}"]
    if action.nargs in ("+", "*"):
        return [option, *map(str, value)]
    if type(action).__name__ == "_AppendAction":
        return [f"{option}={item}" for item in value]
    return [f"{option}={','.join(map(str, value))}"]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"[{name}]" for name in names)
