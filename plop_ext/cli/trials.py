"""The options of an experiment, which `plop compare` and `plop run` share."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

from plop_ext.cli.finetune import add_training, check_training
from plop_ext.cli.options import messages
from plop_ext.cli.parsing import number, whole
from plop_ext.errors import InputError
from plop_ext.experiment.settings import MARGIN, RATES, SEEDS

if TYPE_CHECKING:
    from plop_ext.experiment.estimate import Estimate

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def add_trials(parser: argparse.ArgumentParser, finalists: int | None = None) -> None:
    """Add the options of the trials and of the held-out data; `finalists` is the default of --finalists."""
    group = parser.add_argument_group("trials")
    group.add_argument(
        "--max-params",
        default=None,
        help="largest number of trainable parameters of each placement (default: those of all-linear at --rank)",
    )
    group.add_argument(
        "--rates",
        default=",".join(f"{rate:g}" for rate in RATES),
        help="comma-separated learning rates to try (default: %(default)s)",
    )
    group.add_argument(
        "--seeds", type=whole, default=len(SEEDS), help="number of seeds of the final trials (default: %(default)s)"
    )
    group.add_argument(
        "--finalists",
        type=whole,
        default=finalists,
        help=f"placements in the final, with all-linear (default: {finalists or 'all'})",
    )
    group.add_argument(
        "--margin",
        type=number,
        default=MARGIN,
        help="largest difference that counts as none, in nats per token (default: %(default)s)",
    )
    group.add_argument(
        "--max-time",
        default=None,
        metavar="TIME",
        help="time for all trials, as in 90s, 30m or 2h; the schedule is shortened to fit before the first trial",
    )
    add_training(parser, rank="LoRA rank of all-linear, if there is no budget (default: 16)")


def arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options as keyword arguments of `plop_ext.compare`, checked before anything slow runs.

    Raises:
        InputError: If one is out of range.
    """
    from plop_ext.arguments import check_whole
    from plop_ext.experiment.settings import Settings
    from plop_ext.quantities import count_or_share

    check_training(args)
    check_whole(seeds=args.seeds)
    chosen: dict[str, Any] = {
        "r": 16 if args.rank is None else args.rank,
        "learning_rates": _rates(args.rates),
        "seeds": tuple(range(args.seed, args.seed + args.seeds)),
        "max_steps": args.steps,
        "finalists": args.finalists,
        "margin": args.margin,
    }
    if args.max_params is not None:
        count_or_share(args.max_params, "max_params")
    chosen |= {
        "batch_size": args.batch_size,
        "max_seconds": None if args.max_time is None else seconds(args.max_time),
    }
    Settings(**chosen)
    return chosen | {"max_params": args.max_params, "progress": not args.quiet}


def say_estimate(estimate: Estimate) -> None:
    """Print what the trials will take."""
    for line in estimate.lines():
        messages.print(line)


def place(scores: Any, name: str, types: int | None) -> Any:
    """Return the placement of a strategy, such as `mlp` or `random:1`."""
    strategy, _, seed = name.strip().partition(":")
    if seed and not (strategy == "random" and seed.isdigit()):
        raise InputError(f"`--strategies`: {name!r} is not a strategy; only random takes a seed, as in random:1")
    count = None if strategy in ("attention", "mlp", "all") else types
    return scores.place(types=count, strategy=strategy, seed=int(seed or 0))


def seconds(text: str) -> float:
    """Read a time such as `90s`, `30m`, `1.5h` or `1h30m`.

    Raises:
        InputError: If it is none.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text.strip().lower())
    if not parts or "".join(number + unit for number, unit in parts) != text.strip().lower():
        raise InputError(f"`--max-time` must be a time such as 90s, 30m or 2h, got {text!r}")
    total = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if total <= 0:
        raise InputError(f"`--max-time` must be above 0, got {text!r}")
    return total


def _rates(text: str) -> list[float]:
    try:
        return [float(rate) for rate in text.split(",")]
    except ValueError:
        raise InputError(f"`--rates` must be numbers separated by commas, got {text!r}") from None
