"""`plop demo`: `plop run` on the model and the data that ship with the package, offline, on a CPU."""

from __future__ import annotations

import argparse
from typing import Any

from plop_ext.arguments import check_seed, check_whole
from plop_ext.cli import options
from plop_ext.cli.options import console
from plop_ext.cli.parsing import whole
from plop_ext.cli.result import Result
from plop_ext.cli.run import result_of, say_verdict
from plop_ext.cli.trials import say_estimate

# Minutes on two cores: few rows, few steps, and a final of two. A run on your own data has more of each. Finetuning
# gains 1.6 nats per token here; the margin is 3 % of that. At higher rates, trials this short scatter over their seeds
# by more than the margin, and at five seeds no run could decide.
_TRAIN_ROWS = 1000
_TEST_ROWS = 128
_SETTINGS: dict[str, Any] = {
    "r": 8,
    "learning_rates": (2e-3, 4e-3),
    "margin": 0.05,
    "batch_size": 8,
    "validation": 0.05,
    "finalists": 2,
    "widen": 0,
}
_STEPS = 30
_SEEDS = 5


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="plop run on plop-tiny, offline, in under 3 minutes",
        examples=["plop demo", "plop demo -o runs/other --seed 1"],
    )
    parser.add_argument(
        "-o", "--output", default="runs/demo", metavar="FOLDER", help="new folder for the run (default: runs/demo)"
    )
    parser.add_argument("--resume", action="store_true", help="continue an interrupted demo; a finished one is left")
    parser.add_argument("--steps", type=whole, default=_STEPS, help=f"optimizer steps of a trial (default: {_STEPS})")
    options.add_seed(parser)
    options.add_common(parser)
    parser.set_defaults(run=run, alone=True, words={"folder": "--output"})


def run(args: argparse.Namespace) -> Result:
    from plop_ext.data import encode, load_rows
    from plop_ext.files import make_folder, resolve
    from plop_ext.models import load_model
    from plop_ext.runs.folder import check_folder
    from plop_ext.runs.run import run_experiment

    check_whole(max_steps=args.steps)
    check_seed(seed=args.seed)
    check_folder(args.output, args.resume)
    make_folder(resolve(args.output).parent)
    console.print("plop-tiny, a pretrained byte-level Llama, on worked arithmetic that it has not seen")
    model, tokenizer = load_model("plop-tiny", for_training=True, device="cpu")
    train = encode(load_rows("arithmetic", max_samples=_TRAIN_ROWS, seed=args.seed), tokenizer)
    held_out = encode(load_rows("arithmetic", split="test", max_samples=_TEST_ROWS, seed=args.seed), tokenizer)
    comparison = run_experiment(
        model,
        tokenizer,
        train,
        held_out,
        args.output,
        seeds=tuple(range(args.seed, args.seed + _SEEDS)),
        max_steps=args.steps,
        resume=args.resume,
        data_name="arithmetic",
        progress=not args.quiet,
        on_estimate=None if args.quiet else say_estimate,
        **_SETTINGS,
    )
    assert comparison is not None
    say_verdict(comparison, args.output)
    console.print("on your own model and data:", style="bold")
    console.print("  plop run MODEL DATA -o FOLDER --max-time 2h", highlight=False)
    return result_of(comparison, args.output)
