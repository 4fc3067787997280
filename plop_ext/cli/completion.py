"""`plop --print-completion SHELL`: a script that completes commands, options, choices and file names."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

SHELLS = ("bash", "zsh", "fish", "tcsh")
_FILES, _FOLDERS = ("DATA", "FILE", "MODEL", "PLACEMENT", "SCORES"), ("FOLDER",)


class PrintCompletion(argparse.Action):
    """Print the script for a shell and exit."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, choices=SHELLS, metavar="SHELL", default=argparse.SUPPRESS)

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, shell: Any, option: str | None = None) -> None:
        import shtab  # not before, for it is rarely needed

        for action in _actions(parser):
            if action.metavar in (*_FILES, *_FOLDERS):
                action.complete = shtab.FILE if action.metavar in _FILES else shtab.DIRECTORY  # type: ignore[attr-defined]
        print(shtab.complete(parser, shell))
        parser.exit()


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the options and arguments of a parser and of its commands."""
    for action in parser._actions:  # argparse has no public list
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
