"""`plop place SCORES`: choose the modules that get LoRA."""

from __future__ import annotations

import argparse
import json
from typing import Any

from plop_ext.cli import options
from plop_ext.cli.options import console
from plop_ext.errors import InputError


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("place", help="choose where LoRA goes, from scores")
    parser.add_argument("scores", metavar="SCORES", help="file written by plop score")
    parser.add_argument("-o", "--output", default=None, metavar="FILE", help="write the placement as JSON")
    parser.add_argument("--types", default=None, help="how many types (default: 3), or their names: v_proj,o_proj")
    parser.add_argument("--modules", default=None, help="single modules instead: a count (24) or a fraction (0.25)")
    parser.add_argument("--max-nfn", type=float, default=None, help="all single modules with at most this NFN")
    parser.add_argument(
        "--strategy", default="lowest", help="lowest (default), inverse, attention, mlp, all or random"
    )
    parser.add_argument("--rank", "-r", type=int, default=16, help="LoRA rank for the parameter count (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="seed of --strategy random (default: 0)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from plop_ext.report import tables
    from plop_ext.scores import Scores

    options.check_output(args.output)
    placement = Scores.load(args.scores).place(
        types=_types(args.types),
        modules=_modules(args.modules),
        max_nfn=args.max_nfn,
        strategy=args.strategy,
        seed=args.seed,
    )
    if args.rank < 1:
        raise InputError(f"`--rank` must be at least 1, got {args.rank}")
    for line in tables.placement_lines(placement, args.rank):
        console.print(line, highlight=False)
    if args.output:
        placement.save(args.output)
        next_step = f"plop finetune MODEL DATA --placement {args.output} -o ADAPTER"
        console.print(f"placement: {args.output}; next: {next_step}", highlight=False)
    else:
        console.print(json.dumps(placement.targets()), soft_wrap=True, highlight=False)


def _types(text: str | None) -> int | list[str] | None:
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        return [name.strip() for name in text.split(",") if name.strip()]


def _modules(text: str | None) -> int | float | None:
    if text is None:
        return None
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise InputError(f"`--modules` must be a count (24) or a fraction (0.25), got {text!r}") from None
