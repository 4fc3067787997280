"""The parser of the command line: no abbreviations, errors of one line, examples in the help."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn

from plop_ext.errors import InputError


class Parser(argparse.ArgumentParser):
    """A parser whose errors are `InputError`, so that they look and end like all other errors of the command.

    An abbreviation such as --sam would change its meaning, or become ambiguous, with every new option.
    """

    def __init__(self, *, examples: Sequence[str] = (), **kwargs: Any) -> None:
        """Make a parser; `examples` are command lines for the end of the help."""
        kwargs |= {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
        if examples:
            kwargs["epilog"] = "\n  ".join(("examples:", *examples))
        super().__init__(**kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise the error that argparse would print after the usage."""
        raise InputError(f"{message.removeprefix('argument ')}; see {self.prog} --help")

    def refuse_unknown(self, words: Sequence[str]) -> None:
        """Raise an error if a command line has words that this parser does not know."""
        # A word behind an option that does not exist is that option's value.
        options = [word for word in words if word.startswith("-")]
        if options:
            known = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(options[0].partition("=")[0], known, 1)
            self.error(f"there is no option {options[0]}" + (f"; did you mean {near[0]}?" if near else ""))
        if words:
            self.error(f"{words[0]} is one argument too many; quote names with spaces, give files as a folder")


def whole(text: str) -> int:
    """Parse a whole number, which may have underscores between digits."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None


def number(text: str) -> float:
    """Parse a number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
