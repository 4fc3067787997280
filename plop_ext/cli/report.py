"""`plop report SCORES`: tables, figures and a page on the certainty of the ranking."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from plop_ext.arguments import check_whole
from plop_ext.cli import options, outputs, summary
from plop_ext.cli.options import console
from plop_ext.cli.parsing import whole
from plop_ext.cli.result import Result
from plop_ext.errors import InputError
from plop_ext.files import make_folder, save_or_rescue

if TYPE_CHECKING:
    from plop_ext.report.report import Report


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "report",
        help="say what to do, and show how certain it is: tables, figures, a page",
        examples=[
            "plop report scores.json",
            "plop report scores.json -o report.html --figures figures",
            "plop report code.json --against maths.json -o report.html",
        ],
    )
    parser.add_argument("scores", metavar="SCORES", help="file written by plop score")
    group = parser.add_argument_group("outputs")
    group.add_argument("-o", "--output", default=None, metavar="FILE", help="write a self-contained HTML page")
    group.add_argument("--figures", default=None, metavar="FOLDER", help="write each figure as PNG and SVG")
    options.add_force(group)
    group = parser.add_argument_group("what is shown")
    group.add_argument(
        "--against", default=None, metavar="SCORES", help="second file written by plop score, to compare with"
    )
    group.add_argument("--types", default=None, help="number of types to mark as chosen (default: 3), or auto")
    group.add_argument("-r", "--rank", type=whole, default=16, help="LoRA rank, to predict costs (default: 16)")
    group.add_argument(
        "--batch-size", type=whole, default=8, help="samples per training step, to predict costs (default: 8)"
    )
    group.add_argument("--seq", type=whole, default=1024, help="tokens per sample, to predict costs (default: 1024)")
    options.add_common(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> Result:
    from plop_ext.report import plots
    from plop_ext.report.report import make_report
    from plop_ext.scores import Scores

    read = {"SCORES": args.scores, "--against": args.against}
    figures = {} if args.figures is None else {"--figures": (args.figures, plots.drawing_files())}
    outputs.check(read, {"--output": args.output}, inside=figures, force=args.force)
    check_whole(r=args.rank, batch=args.batch_size, seq=args.seq)
    scores = Scores.load(args.scores)
    against = None if args.against is None else Scores.load(args.against)
    with options.status("computing how certain the ranking is", args.quiet):
        report = make_report(
            scores,
            args.scores,
            types=_count(args.types),
            r=args.rank,
            batch=args.batch_size,
            seq=args.seq,
            against=against,
        )
    _print(report, tables_too=options.shows_tables(args))
    if args.output or args.figures:
        with options.status("drawing", args.quiet):
            if args.figures:
                report.save_figures(make_folder(args.figures))
            if args.output:
                save_or_rescue(report.write, args.output)
    for name in ("figures", "output"):
        if path := getattr(args, name):
            console.print(f"{'report' if name == 'output' else name}: {path}", highlight=False)
    return Result(
        {"report": args.output, "figures": args.figures, "recommendation": dataclasses.asdict(report.recommendation)}
        | {"placements": [summary.of_placement(placement, cost, None) for placement, cost in report.placements]}
        | summary.of_scores(scores, args.scores)
    )


def _print(report: Report, tables_too: bool) -> None:
    from plop_ext.report import tables

    console.print(report.recommendation.headline, style="bold", highlight=False)
    for line in report.recommendation.lines:
        console.print(line, highlight=False)
    for command in report.recommendation.commands:
        console.print(f"  {command}", highlight=False, soft_wrap=True)
    if not tables_too:
        return
    scores, chosen = report.scores, report.chosen
    console.print(tables.scores_table(scores, chosen=chosen))
    for line in [*tables.confidence_lines(scores, len(chosen) or None), *tables.left_out_lines(scores)]:
        console.print(line, highlight=False)
    if report.placements:
        console.print(tables.cost_table(report.placements, report.step))
    if report.comparison is not None:
        console.print(tables.against_table(report.comparison))
        for line in tables.against_lines(report.comparison):
            console.print(line, highlight=False)


def _count(text: str | None) -> int | str | None:
    if text is None or text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise InputError(f"`--types` must be a number or auto, got {text!r}") from None
