"""`plop report SCORES`: tables, figures and a page on the certainty of the ranking."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING, Any

from plop_ext.cli import options, outputs
from plop_ext.cli.options import console
from plop_ext.errors import InputError
from plop_ext.files import make_folder, save_or_rescue

if TYPE_CHECKING:
    from plop_ext.placement import Placement
    from plop_ext.placement.cost import Cost
    from plop_ext.scores import Scores


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("report", help="show how certain a ranking is: tables, figures, a page")
    parser.add_argument("scores", metavar="SCORES", help="file written by plop score")
    parser.add_argument("-o", "--output", default=None, metavar="FILE", help="write a self-contained HTML page")
    parser.add_argument("--figures", default=None, metavar="FOLDER", help="write each figure as PNG and SVG")
    parser.add_argument(
        "--against", default=None, metavar="SCORES", help="second file written by plop score, to compare with"
    )
    parser.add_argument("--types", default=None, help="number of types to mark as chosen (default: 3), or auto")
    parser.add_argument("--rank", "-r", type=int, default=16, help="LoRA rank, to predict costs (default: 16)")
    parser.add_argument(
        "--batch-size", type=int, default=8, help="samples per training step, to predict costs (default: 8)"
    )
    parser.add_argument("--seq", type=int, default=1024, help="tokens per sample, to predict costs (default: 1024)")
    options.add_force(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from plop_ext.report import page, plots, tables
    from plop_ext.report.against import compare_scores
    from plop_ext.report.figures import drawings
    from plop_ext.report.recommendation import recommend
    from plop_ext.scores import Scores

    read = {"SCORES": args.scores, "--against": args.against}
    figures = {} if args.figures is None else {"--figures": (args.figures, plots.drawing_files())}
    outputs.check(read, {"--output": args.output}, inside=figures, force=args.force)
    scores = Scores.load(args.scores)
    other = None if args.against is None else Scores.load(args.against)
    with options.status("computing how certain the ranking is", quiet=False):
        placements = _placements(scores, args)
        chosen = placements[0][0].types if placements else ()
        statistics = None if scores.paper_script else scores.statistics(len(chosen) or None)
        comparison = None if other is None else compare_scores(scores, other, len(chosen) or 3)
    recommendation = recommend(scores, placements, statistics, path=args.scores)
    console.print(recommendation.headline, style="bold", highlight=False)
    for line in recommendation.lines:
        console.print(line, highlight=False)
    for command in recommendation.commands:
        console.print(f"  {command}", highlight=False, soft_wrap=True)
    console.print(tables.scores_table(scores, chosen=chosen))
    for line in [*tables.confidence_lines(scores, len(chosen) or None), *tables.left_out_lines(scores)]:
        console.print(line, highlight=False)
    step = args.batch_size, args.seq
    if placements:
        console.print(tables.cost_table(placements, step))
    if comparison is not None:
        console.print(tables.against_table(comparison))
        for line in tables.against_lines(comparison):
            console.print(line, highlight=False)
    if not (args.output or args.figures):
        return
    with options.status("drawing", quiet=False):
        found = drawings(scores, chosen, statistics, comparison)
        if args.figures:
            plots.save_drawings(found, make_folder(args.figures))
        if args.output:
            write = partial(
                page.write_page,
                scores=scores,
                statistics=statistics,
                recommendation=recommendation,
                drawings=found,
                placements=placements,
                step=step,
                comparison=comparison,
            )
            save_or_rescue(write, args.output)
    if args.figures:
        console.print(f"figures: {args.figures}", highlight=False)
    if args.output:
        console.print(f"report: {args.output}", highlight=False)


def _placements(scores: Scores, args: argparse.Namespace) -> list[tuple[Placement, Cost | None]]:
    """Return the chosen placement, the placement of automatic k and all-linear, each once; none without a signal.

    Each placement comes with its cost, or with None if the type of the model's values is unknown.
    """
    from plop_ext.placement.cost import WIDTHS

    if args.rank < 1:
        raise InputError(f"`--rank` must be at least 1, got {args.rank}")
    dtype = scores.provenance["model"].get("dtype")
    if not scores.placeable:
        return []
    wanted: list[int | str | None] = [_count(args.types)]
    if not scores.paper_script:
        wanted.append("auto")
    found = [scores.place(types=types, r=args.rank) for types in wanted]
    found.append(scores.place(strategy="all", r=args.rank))
    distinct = {placement.modules: placement for placement in reversed(found)}
    costed = dtype in WIDTHS
    return [
        (item, item.cost(dtype, args.batch_size, args.seq) if costed else None) for item in reversed(distinct.values())
    ]


def _count(text: str | None) -> int | str | None:
    if text is None or text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise InputError(f"`--types` must be a number or auto, got {text!r}") from None
