"""`plop compare MODEL DATA --scores SCORES`: compare placements at equal trainable parameters."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plop_ext.cli import options, outputs, trials
from plop_ext.cli.exit_codes import ExitCode
from plop_ext.cli.inputs import check_same, inputs_hash, say_finished
from plop_ext.cli.options import console
from plop_ext.cli.parsing import whole
from plop_ext.cli.result import Result
from plop_ext.errors import InputError
from plop_ext.files import save_or_rescue

if TYPE_CHECKING:
    from plop_ext.experiment.result import Comparison

# Entry of the inputs of a comparison: the hash of the command that made it.
_COMMAND = "command"


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        help="finetune several placements at equal trainable parameters",
        examples=[
            "plop compare MODEL data.jsonl --scores scores.json -o comparison.json --plot comparison.png",
            "plop compare MODEL data.jsonl --scores scores.json --strategies lowest,mlp,random:1 --steps 100",
        ],
    )
    options.add_model(parser)
    options.add_data(parser)
    parser.add_argument("--scores", required=True, metavar="FILE", help="file written by plop score")
    parser.add_argument("-o", "--output", default=None, metavar="FILE", help="write the comparison as JSON")
    parser.add_argument(
        "--resume", action="store_true", help="continue an interrupted comparison with -o; a finished one is left"
    )
    parser.add_argument("--plot", default=None, metavar="FILE", help="draw the comparison (.png, .svg, .pdf)")
    parser.add_argument(
        "--strategies",
        default="lowest,inverse",
        help="comma-separated: lowest, inverse, attention, mlp, all, random, or random:1 for random with seed 1 "
        "(default: lowest,inverse); all-linear is always added",
    )
    parser.add_argument(
        "--types", type=whole, default=None, help="number of module types of lowest, inverse and random (default: 3)"
    )
    trials.add_trials(parser)
    options.add_force(parser)
    options.add_common(parser)
    parser.set_defaults(run=run, alone=True, words={"strategy": "--strategies", "max_seconds": "--max-time"})


def run(args: argparse.Namespace) -> Result:
    from plop_ext.experiment.compare import compare
    from plop_ext.report import plots
    from plop_ext.scores import Scores

    chosen = trials.arguments(args)
    if args.resume and not args.output:
        raise InputError("`--resume` needs `--output`, the file of the comparison to continue")
    inputs = inputs_hash(args, "model", "data", "eval", "scores")
    finished = _finished(args, inputs)
    journal = None if finished else outputs.beside(args.output, ".partial")
    read = {"MODEL": args.model, "DATA": args.data, "--scores": args.scores, "--eval": args.eval}
    if finished is not None:
        read["--output"] = args.output
    written = {"--output": None if finished else args.output, "--plot": args.plot}
    outputs.check(read, written, traces={"the journal of --output": journal}, force=args.force)
    if args.plot is not None:
        plots.picture_format(args.plot)
    if finished is not None:
        say_finished(args.output)
        return _show(args, finished)
    scores = Scores.load(args.scores)
    placements = [trials.place(scores, name, args.types) for name in args.strategies.split(",")]
    model, tokenizer = options.load_model(args, for_training=True)
    train, held_out = options.train_and_held_out(args, tokenizer)
    comparison = compare(
        model,
        tokenizer,
        scores,
        train,
        held_out,
        placements,
        journal=journal,
        resume=args.resume,
        on_estimate=None if args.quiet else trials.say_estimate,
        **chosen,
    )
    comparison = replace(comparison, inputs={**comparison.inputs, _COMMAND: inputs})
    if args.output:  # first, because later steps may fail and the trials are expensive
        save_or_rescue(partial(comparison.save, overwrite=args.force), args.output)
    if journal is not None:
        journal.unlink(missing_ok=True)
    return _show(args, comparison)


def _finished(args: argparse.Namespace, inputs: str | None) -> Comparison | None:
    """Return an earlier, finished comparison of the same inputs that `--resume` asks for, or None."""
    from plop_ext.experiment.result import Comparison

    if not args.resume or args.force or not Path(args.output).is_file():
        return None
    comparison = Comparison.load(args.output)
    check_same(args.output, comparison.inputs.get(_COMMAND), inputs)
    return comparison


def _show(args: argparse.Namespace, comparison: Comparison) -> Result:
    """Print a comparison, draw it if that is asked for, and return it for --json."""
    from plop_ext.report import plots, tables

    console.print(tables.comparison_table(comparison))
    for line in tables.comparison_lines(comparison):
        console.print(line, highlight=False)
    if args.output:
        console.print(f"comparison: {args.output}", highlight=False)
    if args.plot:
        save_or_rescue(partial(plots.comparison_plot, comparison), args.plot)
        console.print(f"plot: {args.plot}", highlight=False)
    code = ExitCode.DIVERGED if comparison.verdict.winner is None else ExitCode.DONE
    return Result(comparison.to_dict() | {"comparison": args.output, "plot": args.plot}, code)
