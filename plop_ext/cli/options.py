"""Options that several subcommands share, and the loading of the models and data that they name."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.text import Text

from plop_ext.cli.logs import say_what_is_read
from plop_ext.cli.parsing import whole
from plop_ext.cli.wording import command_words
from plop_ext.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from plop_ext.data import Encoded


# Names of files, modules and types are printed as they are, also where they look like markup: [/b], :smile:.
# Without a terminal rich assumes 80 columns and wraps the tables.
class _Console(Console):
    """A console whose reader may leave early, as in `plop score ... | head`, without ending the command."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


console = _Console(width=None if Console().is_terminal else 120, markup=False, emoji=False)
# For all messages other than results, so that the results on stdout can be piped.
messages = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)


@contextmanager
def status(text: str, quiet: bool) -> Iterator[None]:
    """Show `text` on stderr while the block runs: with a spinner on a terminal, otherwise as one line."""
    if quiet:
        yield
    elif messages.is_terminal:
        with messages.status(Text(text)):
            yield
    else:
        messages.print(f"{text} ...")
        yield


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add MODEL and the options for loading it."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "model",
        metavar="MODEL",
        help="model or adapter folder, GGUF file, name on the hub, or plop-tiny, which ships with plop_ext",
    )
    group.add_argument(
        "--dtype",
        default="auto",
        help="type of the weights: auto (default; the checkpoint's type), float32, bfloat16, ...",
    )
    group.add_argument("--device", default=None, help="device of the model (default: cuda if available, else cpu)")
    group.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run code that comes with the checkpoint; read it first, it can do anything that you can do",
    )


def add_data(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Add DATA, of which there may be several, and the options for reading it."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "data",
        metavar="DATA",
        nargs="+" if several else None,
        help=".jsonl, .json, .csv, .tsv, .parquet, .arrow or .txt file, possibly compressed; folder of such files; "
        "data set on the hub; or arithmetic or prose, which ship with plop_ext",
    )
    group.add_argument(
        "--columns",
        type=_columns,
        default=None,
        metavar="NAME=COLUMN,...",
        help="columns to read, as in text=body or prompt=question,completion=answer (default: recognized by name)",
    )
    group.add_argument(
        "--split", default="train", help="split of a folder or of a data set on the hub (default: train)"
    )
    group.add_argument(
        "--max-length", type=whole, default=1024, help="truncate samples to this many tokens (default: 1024)"
    )


def _columns(text: str) -> dict[str, str]:
    """Parse `NAME=COLUMN,...`; a column alone is that of plain text."""
    pairs = (part.rpartition("=") if "=" not in part else part.partition("=") for part in text.split(","))
    return {name or "text": column for name, _, column in pairs}


def add_force(parser: argparse._ActionsContainer) -> None:
    """Add --force."""
    parser.add_argument("--force", action="store_true", help="replace output files that exist; inputs never are")


def add_seed(parser: argparse._ActionsContainer) -> None:
    """Add --seed."""
    parser.add_argument("--seed", type=whole, default=0, help="seed of all random choices (default: 0)")


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add what every command has: --json, --quiet, --verbose and --config."""
    group = parser.add_argument_group("what is printed, and options from a file")
    group.add_argument(
        "--json", action="store_true", help="print the result as JSON on stdout, and everything else on stderr"
    )
    group.add_argument(
        "-q", "--quiet", action="count", default=0, help="show no progress; -qq shows no tables and warnings either"
    )
    group.add_argument("-v", "--verbose", action="count", default=0, help="say what is done; -vv says it in detail")
    group.add_argument(
        "--config", default=None, metavar="FILE", help="TOML file with options (default: plop.toml, if there is one)"
    )


def shows_tables(args: argparse.Namespace) -> bool:
    """Return whether tables are printed."""
    return int(args.quiet) < 2


def load_model(
    args: argparse.Namespace, for_training: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model and tokenizer that `args` names, unless it is clear already that they will not be used."""
    with status(f"loading {args.model}", args.quiet):  # the imports take a second
        from plop_ext import models
        from plop_ext.cli.parallel import distributed_config

        _check_data(args)
        _check_graph(args)
        shared = distributed_config(getattr(args, "parallel", "dp"), args.launch.size)
        return models.load_model(
            args.model,
            dtype=args.dtype,
            device=args.launch.device or args.device,
            for_training=for_training,
            trust_remote_code=args.trust_remote_code,
            distributed_config=shared,
        )


def _check_data(args: argparse.Namespace) -> None:
    """Check that the data may exist, before the model is loaded."""
    from plop_ext.data.sources import check_source

    check_source(args.data)
    if getattr(args, "eval", None) is not None:
        with _about_eval():
            check_source(args.eval)


def _check_graph(args: argparse.Namespace) -> None:
    """Check that there is a CUDA device for --graph."""
    from plop_ext.models.device import parse_device

    if getattr(args, "graph", False) and parse_device(args.device).type != "cuda":
        raise InputError("`--graph` needs a CUDA device, and there is none, or another was named; leave it out")


@contextmanager
def _about_eval() -> Iterator[None]:
    """Name --eval in errors about data within the block."""
    try:
        yield
    except InputError as error:
        raise InputError(command_words(str(error), {"source": "--eval", "rows": "--eval"})) from error


def load_data(
    args: argparse.Namespace,
    tokenizer: PreTrainedTokenizerBase,
    samples: int | None,
    *,
    source: str | None = None,
    split: str | None = None,
    mask: Literal["attention", "completion"] = "attention",
) -> list[Encoded]:
    """Return encoded samples of the data that `args` names."""
    from plop_ext.data import encode, load_rows

    if not args.quiet:
        say_what_is_read()
    with status(f"reading {source or args.data}", args.quiet):
        rows = load_rows(source or args.data, split=split or args.split, max_samples=samples, seed=args.seed)
        columns = args.columns if source is None or source == args.data else None
        return encode(rows, tokenizer, columns=columns, mask=mask, max_length=args.max_length)


def scoring(args: argparse.Namespace) -> dict[str, Any]:
    """Return what `plop score` passes on to scoring in memory and to streaming alike."""
    from plop_ext.score_data.settings import NAMES

    # `--samples` has limited the data already, and streamed runs cannot follow the published script.
    names = [name for name in NAMES if name not in ("max_samples", "compat")]
    return {
        **{name: getattr(args, name) for name in names},
        "resume": args.resume,
        "data_name": data_name(args),
        "progress": not args.quiet,
    }


def data_name(args: argparse.Namespace) -> str:
    """Return the name of the data for the provenance, with the split unless it is the default or DATA is a file."""
    name = str(args.data)
    return name if args.split == "train" or Path(name).is_file() else f"{name} ({args.split})"


def train_and_held_out(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Encoded], list[Encoded]]:
    """Return training and held-out samples, each with a token to predict; no held-out sample is in both.

    Held-out samples are those of `--eval`, the test split of a packaged data set, or a part split off from DATA. Equal
    samples stay on one side, and those of `--eval` that are in DATA too are left out.
    """
    from plop_ext.data.held_out import apart, distinct, split_off
    from plop_ext.demo_assets import DATASETS
    from plop_ext.finetuning.evaluation import learnable

    source = args.eval or (args.data if args.data in DATASETS else None)
    samples = learnable(load_data(args, tokenizer, None), args.data)
    if source is not None:
        split = args.eval_split or ("test" if source in DATASETS else args.split)
        with _about_eval():
            held_out = load_data(args, tokenizer, args.eval_samples, source=source, split=split)
        return samples, apart(samples, learnable(held_out, source), "eval")
    known = len(distinct(samples))
    count = min(args.eval_samples, known // 5)
    if count < 1:
        raise InputError(
            f"`{args.data}` has {known} different samples with a token to predict, too few to hold some out; give"
            " --eval"
        )
    return split_off(samples, count, args.seed)
