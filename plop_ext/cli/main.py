"""Entry point of the `plop` command. Whatever ends a command early gives one line on stderr and an exit code."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from plop_ext._version import __version__
from plop_ext.cli import compare, demo, doctor, finetune, place, report, score
from plop_ext.cli.endings import explain
from plop_ext.cli.exit_codes import ExitCode
from plop_ext.cli.logs import logs_on_stderr
from plop_ext.cli.streams import every_character_printable


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Command line without the program's name; default `sys.argv`.

    Returns:
        Exit code, one of `plop_ext.cli.exit_codes.ExitCode`.
    """
    args = build_parser().parse_args(arguments)
    try:
        with every_character_printable(), logs_on_stderr():
            return int(args.run(args) or ExitCode.DONE)
    except (Exception, KeyboardInterrupt) as error:
        return explain(error, args.words)


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of the command and its subcommands."""
    parser = argparse.ArgumentParser(prog="plop", description="Where in this model should LoRA go for this task?")
    parser.add_argument("--version", action="version", version=f"plop_ext {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (score, place, report, finetune, compare, demo, doctor):
        command.add_parser(commands)
    parser.set_defaults(words=None)
    return parser
