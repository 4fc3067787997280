"""`plop run MODEL DATA -o FOLDER`: from data to a verdict on where LoRA goes, with the winner's adapter."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from plop_ext.cli import options, outputs, trials
from plop_ext.cli.exit_codes import ExitCode
from plop_ext.cli.options import console
from plop_ext.cli.result import Result
from plop_ext.errors import InputError

if TYPE_CHECKING:
    from plop_ext.experiment.result import Comparison


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "run",
        help="score, finetune with several placements, and keep what held-out data favours",
        examples=[
            "plop run MODEL data.jsonl -o run --max-time 2h",
            "plop run MODEL data.jsonl --eval test.jsonl -o run --strategies mlp,attention",
            "plop run MODEL data.jsonl --dry-run",
        ],
    )
    options.add_model(parser)
    options.add_data(parser)
    parser.add_argument("-o", "--output", default=None, metavar="FOLDER", help="new folder for the run")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in -o; a finished one of the same inputs is not touched",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="score, measure a few steps, print the estimate, and write nothing"
    )
    parser.add_argument(
        "--strategies",
        default="",
        help="further candidates, comma-separated: attention, mlp, inverse, random (default: none)",
    )
    parser.add_argument(
        "--max-memory", default=None, help="limit on the memory that training adds, as in 6GiB or 0.2 of the weights"
    )
    trials.add_trials(parser, finalists=3)
    options.add_common(parser)
    words = {"strategy": "--strategies", "max_seconds": "--max-time", "folder": "--output"}
    parser.set_defaults(run=run, alone=True, words=words)


def run(args: argparse.Namespace) -> Result:
    from plop_ext.runs.folder import check_folder
    from plop_ext.runs.run import run_experiment

    chosen = trials.arguments(args)
    if args.output is None and not args.dry_run:
        raise InputError("`--output` is missing; name a new folder for the run, or give --dry-run")
    if args.output is not None:
        outputs.check({"MODEL": args.model, "DATA": args.data, "--eval": args.eval}, {})
        check_folder(args.output, args.resume)
    model, tokenizer = options.load_model(args, for_training=True)
    train, held_out = options.train_and_held_out(args, tokenizer)
    comparison = run_experiment(
        model,
        tokenizer,
        train,
        held_out,
        args.output,
        strategies=[name.strip() for name in args.strategies.split(",") if name.strip()],
        max_memory=args.max_memory,
        resume=args.resume,
        dry_run=args.dry_run,
        data_name=options.data_name(args),
        on_estimate=None if args.quiet and not args.dry_run else trials.say_estimate,
        **chosen,
    )
    if comparison is None:
        return Result()
    say_verdict(comparison, args.output)
    return result_of(comparison, args.output)


def result_of(comparison: Comparison, folder: str) -> Result:
    """Return what a program reads: the comparison, and the folder of the run."""
    code = ExitCode.DIVERGED if comparison.verdict.winner is None else ExitCode.DONE
    return Result(comparison.to_dict() | {"run": folder}, code)


def say_verdict(comparison: Comparison, folder: str) -> None:
    """Print the table, the verdict, and where the files are."""
    from plop_ext.report import tables

    console.print(tables.comparison_table(comparison))
    for line in tables.comparison_lines(comparison):
        console.print(line, highlight=False)
    files = ["result.json", "report.html"] + (["adapter/"] if comparison.adapter else [])
    console.print(f"run: {folder} ({', '.join(files)})", highlight=False)
