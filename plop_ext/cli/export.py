"""`plop export PLACEMENT`: write a placement as the configuration of a training stack."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from plop_ext.cli import options, outputs
from plop_ext.cli.options import console
from plop_ext.cli.parsing import number, whole
from plop_ext.cli.result import Result
from plop_ext.files import save_or_rescue, write_text_atomic


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "export",
        help="write a placement as the configuration of a training stack",
        examples=[
            "plop export placement.json --to axolotl -o lora.yaml",
            "plop export placement.json --to llama-factory --rank 8 >> train.yaml",
            "plop export placement.json --to torchtune --lossy",
        ],
    )
    parser.add_argument("placement", metavar="PLACEMENT", help="file written by plop place")
    group = parser.add_argument_group("outputs")
    group.add_argument(
        "--to",
        required=True,
        metavar="STACK",
        help="training stack: axolotl, trl, verl, ...; `--to list` names them all",
    )
    group.add_argument("-o", "--output", default=None, metavar="FILE", help="write to FILE (default: stdout)")
    options.add_force(group)
    group.add_argument(
        "--lossy",
        action="store_true",
        help="write also what the stack cannot say exactly; each difference is said, and is a comment in the output",
    )
    group = parser.add_argument_group("rank and scale")
    group.add_argument(
        "-r", "--rank", type=whole, default=None, help="LoRA rank of all modules (default: as in PLACEMENT)"
    )
    group.add_argument(
        "--alpha", type=number, default=None, help="alpha of modules with the common rank (default: 2 * rank)"
    )
    options.add_common(parser)
    parser.set_defaults(run=run, words={"stack": "--to"})


def run(args: argparse.Namespace) -> Result:
    from plop_ext.placement import Placement, exports

    if args.to == "list":
        return _list()
    outputs.check({"PLACEMENT": args.placement}, {"--output": args.output}, force=args.force)
    placement = Placement.load(args.placement)
    plan = exports.plan(placement, args.to, r=args.rank, lora_alpha=args.alpha, lossy=args.lossy)
    text = exports.written(plan)
    if options.shows_tables(args):
        for line in plan.losses:
            options.messages.print(f"not as placed: {line}")
        for line in plan.remarks:
            options.messages.print(line)
    if args.output:
        save_or_rescue(partial(write_text_atomic, text=text), args.output)
        console.print(f"{plan.stack.title}: {args.output}", highlight=False)
    elif not args.json:
        console.print(text, end="", soft_wrap=True, highlight=False)
    return Result(
        {
            "stack": args.to,
            "file": args.output,
            "text": text,
            "modules": plan.placed,
            "losses": plan.losses,
            "notes": plan.remarks,
        }
    )


def _list() -> Result:
    """Print the names of the stacks with their titles and forms."""
    from plop_ext.placement import exports

    found = {name: exports.stack_named(name) for name in exports.stacks()}
    for name, stack in found.items():
        console.print(f"{name:16} {stack.title} {stack.release}: {stack.form}", highlight=False, soft_wrap=True)
    return Result({"stacks": list(found)})
