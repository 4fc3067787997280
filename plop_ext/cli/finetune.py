"""`plop finetune MODEL DATA`: train a LoRA adapter on a placement."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from plop_ext.arguments import check_seed, check_whole
from plop_ext.cli import options, outputs
from plop_ext.cli.exit_codes import ExitCode
from plop_ext.cli.options import console
from plop_ext.cli.parsing import number, whole
from plop_ext.cli.result import Result


def add_training(parser: argparse.ArgumentParser, rank: str) -> None:
    """Add the options for held-out data and training, which `plop compare` has too; `rank` is the help of --rank."""
    group = parser.add_argument_group("held-out data")
    group.add_argument(
        "--eval",
        default=None,
        metavar="DATA",
        help="held-out data (default: the test split of arithmetic or prose, a part of any other DATA)",
    )
    group.add_argument(
        "--eval-split",
        default=None,
        metavar="SPLIT",
        help="split of --eval (default: that of --split; for arithmetic and prose: test)",
    )
    group.add_argument("--eval-samples", type=whole, default=256, help="limit on the held-out samples (default: 256)")
    group = parser.add_argument_group("training")
    group.add_argument("-r", "--rank", type=whole, default=None, help=rank)
    group.add_argument("--steps", type=whole, default=300, help="optimizer steps (default: 300)")
    group.add_argument("--batch-size", type=whole, default=16, help="samples per step (default: 16)")
    options.add_seed(group)


def check_training(args: argparse.Namespace) -> None:
    """Check sizes before anything slow runs."""
    check_whole(r=args.rank, max_steps=args.steps, batch_size=args.batch_size, max_length=args.max_length)
    check_whole(**{"--eval-samples": args.eval_samples})
    check_seed(seed=args.seed)


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "finetune",
        help="train a LoRA adapter on a placement",
        examples=[
            "plop finetune MODEL data.jsonl --placement placement.json -o adapter",
            "plop finetune MODEL data.jsonl --placement placement.json --eval held_out.jsonl --lr 3e-4 -o adapter",
        ],
    )
    options.add_model(parser)
    options.add_data(parser)
    parser.add_argument("--placement", required=True, metavar="FILE", help="file written by plop place")
    parser.add_argument("-o", "--output", default=None, metavar="FOLDER", help="new folder for the adapter")
    add_training(parser, rank="LoRA rank (default: the rank of the placement)")
    parser.add_argument("--alpha", type=whole, default=None, help="lora_alpha (default: 2 x rank)")
    parser.add_argument(
        "--lr", type=number, default=1e-3, help="peak learning rate (default: 1e-3); plop compare finds a good one"
    )
    options.add_common(parser)
    parser.set_defaults(run=run, in_ranks=True)


def run(args: argparse.Namespace) -> Result:
    from plop_ext.finetuning.finetune import finetune
    from plop_ext.placement import Placement
    from plop_ext.report import tables

    check_training(args)
    read = {"MODEL": args.model, "DATA": args.data, "--placement": args.placement, "--eval": args.eval}
    args.launch.on_first(lambda: outputs.check(read, {}, folders={"--output": args.output}))
    placement = Placement.load(args.placement)
    model, tokenizer = options.load_model(args, for_training=True)
    placement.check_model(model)
    train, held_out = options.train_and_held_out(args, tokenizer)
    for line in tables.placement_lines(placement, args.rank):
        console.print(line, highlight=False)
    result = finetune(
        model,
        tokenizer,
        train,
        held_out,
        placement,
        r=args.rank,
        lora_alpha=args.alpha,
        learning_rate=args.lr,
        max_steps=args.steps,
        batch_size=args.batch_size,
        seed=args.seed,
        output_dir=args.output,
        progress=not args.quiet,
    )
    state = "; the run diverged, try a lower --lr" if result.diverged else ""
    console.print(f"held-out loss {result.loss_before:.4f} -> {result.loss_after:.4f}{state}", highlight=False)
    if result.output_dir:
        console.print(f"adapter: {result.output_dir}", highlight=False)
    elif args.output is None:
        console.print("no adapter written; give -o FOLDER to keep it", highlight=False)
    return Result(dataclasses.asdict(result), ExitCode.DIVERGED if result.diverged else ExitCode.DONE)
