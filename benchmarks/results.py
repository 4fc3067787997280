"""Command line and result file that all benchmarks share."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment
from plop_ext.files import write_text_atomic

Row = dict[str, Any]


def parser(description: str | None, device: str | None = None) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark.

    Args:
        description: The module's docstring.
        device: Default device; None takes CUDA where there is one.
    """
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--output", type=Path, help="write the result here as JSON; without it only print")
    result.add_argument("--quick", action="store_true", help="tiny sizes: does the script run? Figures mean nothing")
    result.add_argument("--device", default=device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return result


def parse(result: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse, and refuse a device that is not there and an output of another kind before anything is measured."""
    args = result.parse_args(argv)
    try:
        args.device = torch.device(args.device)
    except RuntimeError as error:
        result.error(f"--device: {str(error).splitlines()[0]}")
    if args.device.type == "cuda" and not torch.cuda.is_available():
        result.error("--device cuda: torch sees no CUDA device; use --device cpu")
    if args.output is not None and args.output.suffix != ".json":
        result.error(f"--output: must end in .json, got {args.output.name}")
    args.argv = list(sys.argv[1:] if argv is None else argv)
    return args


def add_append(result: argparse.ArgumentParser) -> None:
    """Add the option of benchmarks whose figures may come from several runs."""
    result.add_argument(
        "--append", action="store_true", help="keep the rows of --output that this run does not measure"
    )


def earlier(args: argparse.Namespace, result: argparse.ArgumentParser) -> Mapping[str, Any] | None:
    """Return the result that `--append` goes on with, if there is one; refuses that of another device or library."""
    if not args.append:
        return None
    if args.output is None:
        result.error("--append: needs --output")
    if not args.output.exists():
        return None
    found: Mapping[str, Any] = json.loads(args.output.read_text(encoding="utf-8"))
    here = {**environment.describe(args.device, ""), "quick": args.quick}
    there = {**found["environment"], "quick": found["quick"]}
    for name in ("gpu", "torch", "transformers", "quick"):
        if here[name] != there[name]:
            result.error(f"--append: {args.output.name} has {name} {there[name]}, this run {here[name]}")
    return found


def save(
    args: argparse.Namespace,
    benchmark: str,
    rows: Sequence[Row],
    *,
    earlier: Mapping[str, Any] | None = None,
    key: Sequence[str] = (),
    order: Callable[[Row], Any] | None = None,
    **settings: Any,
) -> Mapping[str, Any]:
    """Write the result of `benchmark` to `args.output`, if there is one.

    Args:
        args: What `parse` returned.
        benchmark: Name of the script.
        rows: One dict per figure.
        earlier: A result whose rows are kept where `rows` has none of the same `key`.
        key: Fields that tell which rows replace earlier ones.
        order: What the rows are sorted by; default: as measured, after earlier ones.
        **settings: What the rows have in common.
    """
    result = {
        "benchmark": benchmark,
        "quick": args.quick,
        "environment": environment.describe(args.device, _command(args, benchmark)),
        "settings": settings,
        "rows": list(rows),
    }
    if key:
        result["environment"]["measured"] = _keys(rows, key)
    if earlier is not None:
        kept = [row for row in earlier["rows"] if _key(row, key) not in result["environment"]["measured"]]
        result["rows"] = sorted(kept + result["rows"], key=order) if order else kept + result["rows"]
        runs = _runs_of(_keys(kept, key), [*earlier.get("earlier_environments", []), earlier["environment"]])
        if runs:
            result["earlier_environments"] = runs
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(args.output, json.dumps(result, indent=1) + "\n")
        print(f"wrote {args.output}")
    return result


def _key(row: Row, key: Sequence[str]) -> list[Any]:
    return [row[name] for name in key]


def _keys(rows: Sequence[Row], key: Sequence[str]) -> list[list[Any]]:
    """Return the keys of the rows, each once."""
    return [list(found) for found in dict.fromkeys(tuple(_key(row, key)) for row in rows)]


def _runs_of(keys: Sequence[list[Any]], runs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the environments of the rows of `keys`, oldest first, each with the keys that no later one measured."""
    left, found = list(keys), list[Mapping[str, Any]]()
    for run in reversed(runs):
        own = [each for each in run["measured"] if each in left]
        left = [each for each in left if each not in own]
        if own:
            found.append({**run, "measured": own})
    return found[::-1]


def _command(args: argparse.Namespace, benchmark: str) -> str:
    """Return the command line, with the output file's name for its path."""
    output = None if args.output is None else str(args.output)
    words = [part if output is None else part.replace(output, args.output.name) for part in args.argv]
    return shlex.join(["python", "-m", f"benchmarks.{benchmark}", *words])
