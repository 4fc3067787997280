"""`plop place SCORES`: choose the modules that get LoRA."""

from __future__ import annotations

import argparse
import json
from functools import partial
from typing import Any

from plop_ext.cli import options, outputs, summary
from plop_ext.cli.options import console
from plop_ext.cli.parsing import number, whole
from plop_ext.cli.result import Result
from plop_ext.files import save_or_rescue


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "place",
        help="choose where LoRA goes, from scores",
        examples=[
            "plop place scores.json -o placement.json",
            "plop place scores.json --types auto --max-params 10M",
            "plop place scores.json --types v_proj,o_proj --rank 8",
            "plop place scores.json --modules 25% --ranks inverse-nfn",
        ],
    )
    parser.add_argument("scores", metavar="SCORES", help="file written by plop score")
    group = parser.add_argument_group("outputs")
    group.add_argument("-o", "--output", default=None, metavar="FILE", help="write the placement as JSON")
    options.add_force(group)
    group = parser.add_argument_group("what is chosen")
    group.add_argument(
        "--types",
        default=None,
        help="number of module types (default: 3), auto, or names such as v_proj,o_proj; a name without its role "
        "(q_proj for q_proj@linear_attention) stands for all roles",
    )
    group.add_argument(
        "--modules",
        default=None,
        help="choose single modules instead of types: a number (24) or a share of all (0.25, 25%%)",
    )
    group.add_argument(
        "--max-nfn", type=number, default=None, help="choose all single modules whose NFN is at most MAX_NFN"
    )
    group.add_argument(
        "--strategy",
        choices=("lowest", "inverse", "attention", "mlp", "all", "random"),
        default="lowest",
        help="lowest (default): lowest NFN first; inverse: highest first; attention, mlp or all: by kind of module; "
        "random",
    )
    group.add_argument("--seed", type=whole, default=0, help="seed of --strategy random (default: 0)")
    group.add_argument(
        "--ignore-nonfinite", action="store_true", help="place although the model has NaN or infinite values"
    )
    group.add_argument(
        "--serve",
        choices=("vllm", "sglang", "llama.cpp"),
        default=None,
        help="place what this engine can serve: experts with both halves, one rank where it applies one, no heads; "
        "what changes is said",
    )
    group = parser.add_argument_group("rank and budget")
    group.add_argument(
        "-r", "--rank", type=whole, default=None, help="LoRA rank (default: 16, or the largest within the budget)"
    )
    group.add_argument(
        "--ranks",
        choices=("inverse-nfn",),
        default=None,
        help="inverse-nfn: a separate rank for each module, in proportion to 1 / NFN",
    )
    group.add_argument(
        "--max-params",
        default=None,
        help="limit on the trainable parameters: a number (10M, 1e7) or a share of the model's (0.01, 1%%)",
    )
    group.add_argument(
        "--max-memory",
        default=None,
        help="limit on the memory that training adds: a size (6GiB) or a share of the model's weights (0.2, 20%%)",
    )
    group.add_argument(
        "--batch-size", type=whole, default=8, help="samples per training step, to predict memory (default: 8)"
    )
    group.add_argument("--seq", type=whole, default=1024, help="tokens per sample, to predict memory (default: 1024)")
    options.add_common(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> Result:
    from plop_ext.placement.cost import WIDTHS
    from plop_ext.report import tables
    from plop_ext.scores import Scores

    outputs.check({"SCORES": args.scores}, {"--output": args.output}, force=args.force)
    scores = Scores.load(args.scores)
    placement = scores.place(
        types=_types(args.types),
        modules=args.modules,
        max_nfn=args.max_nfn,
        strategy=args.strategy,
        seed=args.seed,
        r=args.rank,
        ranks=args.ranks,
        max_params=args.max_params,
        max_memory=args.max_memory,
        batch=args.batch_size,
        seq=args.seq,
        ignore_nonfinite=args.ignore_nonfinite,
        serve=args.serve,
    )
    # Without an output file, the targets are the result, and stdout holds nothing else.
    prose = console if args.output else options.messages
    for line in tables.placement_lines(placement):
        prose.print(line, highlight=False)
    if args.serve:
        served = placement.servable(args.serve)
        for line in served.options:
            prose.print(f"to serve it with {served.engine}: {line}", highlight=False)
    dtype = scores.provenance["model"].get("dtype")
    cost = placement.cost(dtype, args.batch_size, args.seq) if dtype in WIDTHS else None
    if cost is not None:
        prose.print(tables.cost_line(cost), highlight=False)
    if args.output:
        save_or_rescue(partial(placement.save, overwrite=args.force), args.output)
        next_step = f"plop finetune MODEL DATA --placement {args.output} -o ADAPTER"
        console.print(f"placement: {args.output}; next: {next_step}", highlight=False)
    elif not args.json:
        console.print(json.dumps(placement.targets()), soft_wrap=True, highlight=False)
    return Result(summary.of_placement(placement, cost, args.output))


def _types(text: str | None) -> int | str | list[str] | None:
    if text is None or text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        return [name.strip() for name in text.split(",") if name.strip()]
