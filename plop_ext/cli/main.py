"""Entry point of the `plop` command. Whatever ends a command early gives one line on stderr and an exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from plop_ext._version import __version__
from plop_ext.cli import compare, demo, doctor, export, finetune, merge, place, report, run, score
from plop_ext.cli.completion import SHELLS, PrintCompletion
from plop_ext.cli.config import with_config
from plop_ext.cli.endings import explain
from plop_ext.cli.launch import Idle, Launch, only_first_prints, rank_and_size
from plop_ext.cli.logs import logs_on_stderr
from plop_ext.cli.outputs import check_stdout
from plop_ext.cli.parsing import Parser
from plop_ext.cli.result import Result, stdout_for
from plop_ext.cli.streams import every_character_printable
from plop_ext.errors import InputError

# In the order in which they are used.
_COMMANDS = (run, score, report, place, export, finetune, compare, merge, demo, doctor)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Command line without the program's name; default `sys.argv`.

    Returns:
        Exit code, one of `plop_ext.cli.exit_codes.ExitCode`.
    """
    words, launch = None, Launch()
    with every_character_printable(), only_first_prints():
        try:
            parser, commands = build_parser()
            given = sys.argv[1:] if arguments is None else arguments
            args, unknown = parser.parse_known_args(with_config(given, commands))
            commands[args.command].refuse_unknown(unknown)
            words = args.words
            if rank_and_size()[0]:  # the first process says everything
                args.quiet, args.verbose = 2, 0
            results_only = check_stdout(args) or args.json
            verbosity = args.verbose - max(0, args.quiet - 1)
            with logs_on_stderr(verbosity), stdout_for(results_only), _launch_of(args) as launch:
                args.launch = launch
                result: Result = Result() if launch.idle else args.run(args)
            if args.json and launch.first:
                print(result.to_json())
            return result.code
        except (Exception, KeyboardInterrupt) as error:
            tells = launch.tells(error) if launch.size > 1 else rank_and_size()[0] == 0
            code = explain(error, words, tell=tells)
            if tells:
                launch.told(error)
            return code


@contextmanager
def _launch_of(args: argparse.Namespace) -> Iterator[Launch]:
    """Join the other processes of a command, if a launcher started several and the command runs in them."""
    rank, size = rank_and_size()
    if size == 1:
        yield Launch()
    elif getattr(args, "alone", False):
        raise InputError(f"`plop {args.command}` runs in one process; start it without torchrun or accelerate launch")
    elif not getattr(args, "in_ranks", False):
        yield Idle() if rank else Launch()
    else:
        from plop_ext.cli.launched import joined

        with joined(args, rank) as launch:
            yield launch


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """Make the parser of the command, and those of its subcommands by name."""
    parser = Parser(
        prog="plop",
        description="Where in this model should LoRA go for this task?",
        examples=[
            "plop run MODEL DATA -o FOLDER --max-time 2h",
            "plop score MODEL DATA -o scores.json",
            "plop report scores.json -o report.html",
            "plop place scores.json -o placement.json",
            "plop export placement.json --to axolotl -o lora.yaml",
            "plop finetune MODEL DATA --placement placement.json -o adapter",
        ],
    )
    parser.add_argument("--version", action="version", version=f"plop_ext {__version__}")
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        help=f"print a script for {', '.join(SHELLS[:-1])} or {SHELLS[-1]} that completes this command, and exit",
    )
    commands = parser.add_subparsers(
        title="commands", dest="command", required=True, metavar="COMMAND", parser_class=Parser
    )
    for command in _COMMANDS:
        command.add_parser(commands)
    parser.set_defaults(words=None)
    return parser, dict(commands.choices)
