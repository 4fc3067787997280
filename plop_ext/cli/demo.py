"""`plop demo`: score, place and finetune the model that ships with the package, offline, on a CPU."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from plop_ext.cli import options
from plop_ext.cli.options import console
from plop_ext.cli.result import Result
from plop_ext.errors import InputError

_SAMPLES = 64
_RANK = 16
_STEPS = 300
_RATE = 3e-3


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="score, place and finetune plop-tiny, offline, in under 3 minutes",
        examples=["plop demo", "plop demo -o runs/demo"],
    )
    parser.add_argument(
        "-o", "--output", default="runs/demo", metavar="FOLDER", help="folder of the results (default: runs/demo)"
    )
    parser.add_argument("--steps", type=int, default=_STEPS, help=f"optimizer steps per placement (default: {_STEPS})")
    options.add_common(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> Result:
    from rich.table import Table
    from rich.text import Text

    from plop_ext.data import batches, encode, load_rows
    from plop_ext.finetuning.finetune import finetune
    from plop_ext.models import load_model
    from plop_ext.report import plots, tables
    from plop_ext.scoring.score import score

    folder = Path(args.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"`--output` {folder}: {error.strerror}; name a folder that can be written") from error

    model, tokenizer = load_model("plop-tiny", for_training=True, device="cpu")
    train = encode(load_rows("arithmetic"), tokenizer)
    held_out = encode(load_rows("arithmetic", split="test", max_samples=256), tokenizer)
    console.print(
        Text.assemble(("1. Score", "bold"), " a pretrained byte-level Llama on worked arithmetic it has not seen")
    )
    scores = score(
        model,
        batches(train[:_SAMPLES], pad_token_id=tokenizer.pad_token_id),
        max_samples=None,
        data_name="arithmetic",
        progress=not args.quiet,
    )
    placement, inverse = scores.place(types=3), scores.place(types=3, strategy="inverse")
    console.print(tables.scores_table(scores, chosen=placement.types))
    scores.save(folder / "scores.json")
    plots.heatmap(scores, folder / "heatmap.png", chosen=placement.types)
    console.print(f"heatmap: {folder / 'heatmap.png'}", highlight=False)

    console.print(Text.assemble(("2. Place", "bold"), " LoRA on the three types that respond least to their input"))
    for line in tables.placement_lines(placement, _RANK):
        console.print(line, highlight=False)
    placement.save(folder / "placement.json")

    console.print(
        Text.assemble(
            ("3. Finetune", "bold"), " with PEFT, beside the inverse placement at equal trainable parameters"
        )
    )
    budget = placement.num_parameters(_RANK)
    table = Table(title="Held-out loss, nats per token")
    for column in ("placement", "types", "r", "parameters", "before", "after"):
        table.add_column(column, justify="left" if column in ("placement", "types") else "right")
    before = None
    for candidate in (placement, inverse):
        rank = candidate.rank_for(budget)
        result = finetune(
            model,
            tokenizer,
            train,
            held_out,
            candidate,
            r=rank,
            lora_alpha=2 * rank,
            learning_rate=_RATE,
            max_steps=args.steps,
            loss_before=before,
            progress=not args.quiet,
        )
        before = result.loss_before
        losses = f"{result.loss_before:.3f}", f"{result.loss_after:.3f}"
        cells = candidate.label, ", ".join(candidate.types), str(rank), f"{result.trainable_params:,}"
        table.add_row(*cells, *losses)
    console.print(table)
    console.print(
        "One seed at one learning rate does not show which placement is better: "
        "plop compare tunes the rate of each placement and repeats each run with several seeds.",
        style="dim",
    )
    return Result({"folder": str(folder)})
