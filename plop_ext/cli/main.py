"""Entry point of the `plop` command. Invalid input gives one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from plop_ext._version import __version__
from plop_ext.cli import compare, demo, doctor, finetune, place, report, score
from plop_ext.cli.logs import logs_on_stderr
from plop_ext.cli.wording import command_words
from plop_ext.errors import InputError, SetupError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Command line without the program's name; default `sys.argv`.

    Returns:
        Exit code: 0, 2 for invalid input, 130 if interrupted.
    """
    parser = argparse.ArgumentParser(prog="plop", description="Where in this model should LoRA go for this task?")
    parser.add_argument("--version", action="version", version=f"plop_ext {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (score, place, report, finetune, compare, demo, doctor):
        command.add_parser(commands)
    parser.set_defaults(words=None)
    args = parser.parse_args(arguments)

    try:
        with logs_on_stderr():
            return int(args.run(args) or 0)
    except (InputError, SetupError) as error:
        print(f"plop: {command_words(str(error), args.words)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "plop: interrupted; no incomplete result was written, and plop score --resume continues a run with -o",
            file=sys.stderr,
        )
        return 130
