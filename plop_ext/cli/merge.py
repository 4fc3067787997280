"""`plop merge SCORES SCORES ... -o FILE`: put runs over different samples of one model together."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from plop_ext.cli import options, outputs, summary
from plop_ext.cli.options import console
from plop_ext.cli.result import Result
from plop_ext.errors import InputError
from plop_ext.files import save_or_rescue


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "merge",
        help="put runs over different samples of one model together",
        examples=["plop merge code.json maths.json -o both.json", "plop merge shard-*.json -o all.json"],
    )
    parser.add_argument("scores", nargs="+", metavar="SCORES", help="files written by plop score")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="write the merged scores as JSON")
    options.add_force(parser)
    options.add_common(parser)
    parser.set_defaults(run=run, words={"data_name": "DATA"})


def run(args: argparse.Namespace) -> Result:
    from plop_ext.report import tables
    from plop_ext.scores import Scores

    read = {f"SCORES {path}": path for path in args.scores}
    outputs.check(read, {"--output": args.output}, force=args.force)
    parts = [Scores.load(path) for path in args.scores]
    try:
        scores = Scores.merge(parts, order="ids")
    except InputError as error:
        numbered = ", ".join(f"{number}: {path}" for number, path in enumerate(args.scores, start=1))
        raise InputError(f"{error} (scores {numbered})") from error
    save_or_rescue(partial(scores.save, overwrite=args.force), args.output)
    chosen = scores.types[:3] if scores.placeable else ()
    if options.shows_tables(args):
        console.print(tables.scores_table(scores, chosen=chosen))
        for line in tables.confidence_lines(scores):
            console.print(line, highlight=False)
    console.print(f"scores: {args.output}; next: plop place {args.output}", highlight=False)
    return Result(summary.of_scores(scores, args.output))
