"""`plop report SCORES`: tables, figures and a page on the certainty of the ranking."""

from __future__ import annotations

import argparse
from pathlib import Path
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
    from plop_ext.report import html, tables
    from plop_ext.report.against import compare_scores
    from plop_ext.scores import Scores

    read = {"SCORES": args.scores, "--against": args.against}
    outputs.check(read, {"--output": args.output}, inside=_figures(args.figures), force=args.force)
    scores = Scores.load(args.scores)
    placements = _placements(scores, args)
    chosen = placements[0][0].types if placements else ()
    comparison = None
    if args.against is not None:
        comparison = compare_scores(scores, Scores.load(args.against), len(chosen) or 3)
    console.print(tables.scores_table(scores, chosen=chosen))
    for line in [*tables.confidence_lines(scores), *tables.unscored_lines(scores)]:
        console.print(line, highlight=False)
    if placements:
        console.print(tables.cost_table(placements, (args.batch_size, args.seq)))
    if comparison is not None:
        console.print(tables.against_table(comparison))
        for line in tables.against_lines(comparison):
            console.print(line, highlight=False)
    if not (args.output or args.figures):
        return
    with options.status("drawing", quiet=False):
        found = html.make_figures(scores, chosen, comparison)
        if args.figures:
            html.save_figures(found, make_folder(args.figures))
        if args.output:
            step = args.batch_size, args.seq

            def write(path: Path) -> None:
                html.write_report(path, scores, found, placements, step, comparison)

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
    if not (scores.paper_script or scores.signal.found):
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


def _figures(folder: str | None) -> dict[str, str]:
    """Return the files of `--figures`, by a name for messages."""
    from plop_ext.report import html

    return {} if folder is None else {f"--figures {name}": str(Path(folder, name)) for name in html.figure_files()}
