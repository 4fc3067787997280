"""`plop compare MODEL DATA --scores SCORES`: compare placements at equal trainable parameters."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from plop_ext.arguments import check_whole
from plop_ext.cli import options, outputs
from plop_ext.cli.finetune import add_training, check_training
from plop_ext.cli.options import console
from plop_ext.errors import InputError
from plop_ext.files import save_or_rescue


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("compare", help="finetune several placements at equal trainable parameters")
    options.add_model(parser)
    options.add_data(parser)
    parser.add_argument("--scores", required=True, metavar="FILE", help="file written by plop score")
    parser.add_argument("-o", "--output", default=None, metavar="FILE", help="write the comparison as JSON")
    parser.add_argument("--plot", default=None, metavar="FILE", help="draw the comparison (.png, .svg, .pdf)")
    parser.add_argument(
        "--strategies",
        default="lowest,inverse",
        help="comma-separated: lowest, inverse, attention, mlp, all, random, or random:1 for random with seed 1 "
        "(default: lowest,inverse); all-linear is always added",
    )
    parser.add_argument(
        "--types", type=int, default=None, help="number of module types of lowest, inverse and random (default: 3)"
    )
    parser.add_argument(
        "--max-params",
        type=int,
        default=None,
        help="trainable parameters of each placement (default: those of the first placement at --rank)",
    )
    parser.add_argument(
        "--rates", default="5e-4,2e-3,8e-3", help="comma-separated learning rates to try (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds of the final runs (default: 3)")
    add_training(parser, rank="LoRA rank of the first placement, if --max-params is not given (default: 16)")
    options.add_force(parser)
    options.add_common(parser)
    parser.set_defaults(run=run, words={"strategy": "--strategies"})


def run(args: argparse.Namespace) -> None:
    from plop_ext.finetuning.compare import compare
    from plop_ext.report import plots, tables
    from plop_ext.scores import Scores

    check_training(args)
    check_whole(seeds=args.seeds, max_params=args.max_params)
    read = {"MODEL": args.model, "DATA": args.data, "--scores": args.scores, "--eval": args.eval}
    outputs.check(read, {"--output": args.output, "--plot": args.plot}, force=args.force)
    if args.plot is not None:
        plots.picture_format(args.plot)
    scores = Scores.load(args.scores)
    placements = [_place(scores, name, args.types) for name in args.strategies.split(",")]
    model, tokenizer = options.load_model(args, for_training=True)
    train, held_out = options.train_and_held_out(args, tokenizer)
    comparison = compare(
        model,
        tokenizer,
        scores,
        train,
        held_out,
        placements,
        max_params=args.max_params,
        r=16 if args.rank is None else args.rank,
        learning_rates=_rates(args.rates),
        seeds=range(args.seed, args.seed + args.seeds),
        max_steps=args.steps,
        batch_size=args.batch_size,
        progress=not args.quiet,
    )
    console.print(tables.comparison_table(comparison))
    if args.output:
        save_or_rescue(partial(comparison.save, overwrite=args.force), args.output)
        console.print(f"comparison: {args.output}", highlight=False)
    if args.plot:
        save_or_rescue(partial(plots.comparison_plot, comparison), args.plot)
        console.print(f"plot: {args.plot}", highlight=False)


def _place(scores: Any, name: str, types: int | None) -> Any:
    strategy, _, seed = name.strip().partition(":")
    if seed and not (strategy == "random" and seed.isdigit()):
        raise InputError(f"`--strategies`: {name!r} is not a strategy; only random takes a seed, as in random:1")
    count = None if strategy in ("attention", "mlp", "all") else types
    return scores.place(types=count, strategy=strategy, seed=int(seed or 0))


def _rates(text: str) -> list[float]:
    try:
        return [float(rate) for rate in text.split(",")]
    except ValueError:
        raise InputError(f"`--rates` must be numbers separated by commas, got {text!r}") from None
