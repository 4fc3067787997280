"""Renders result files as Markdown tables, so that no figure is copied by hand.

python -m benchmarks.to_markdown benchmarks/results/*.json                       prints the tables
python -m benchmarks.to_markdown benchmarks/results/*.json --update README.md    puts them between their markers
python -m benchmarks.to_markdown benchmarks/results/*.json --check README.md     fails if the file says something else

The markers of `results/NAME.json` are `<!-- benchmark: NAME -->` and `<!-- /benchmark: NAME -->`; those of `summary`
hold the headline figures of all files.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.headlines import HEADLINES
from benchmarks.markdown import Result, table
from benchmarks.renderers import RENDERERS
from plop_ext.files import write_text_atomic


def caption(result: Result) -> str:
    """Return where the figures come from, one line per run."""
    quick = "**quick run, figures mean nothing**; " if result["quick"] else ""
    runs = [*result.get("earlier_environments", []), result["environment"]]
    return "\n\n".join(quick + _origin(env) for env in runs)


def _origin(env: Mapping[str, Any]) -> str:
    device = f"{env['gpu']}, driver {env['driver']}" if env["gpu"] else f"{env['cpu']}, {env['threads']} threads"
    commit = (env["commit"] or "unknown commit").split("-")
    origin = "-".join([commit[0][:10], *commit[1:]])
    parts = [device, f"torch {env['torch']}", f"transformers {env['transformers']}", f"backend {env['backend']}"]
    return f"{', '.join(parts)}; {origin}, {env['date'][:10]}; `{env['command']}`"


def summary(results: Mapping[str, Result]) -> str:
    """Return the headline figures of all results, one line each."""
    rows = [line for name, lines in HEADLINES.items() if name in results for line in lines(results[name])]
    return table(["figure", "measured", "on"], [[*line] for line in rows])


def render(result: Result) -> str:
    """Return the tables of one result file and where they come from."""
    return f"{RENDERERS[result['benchmark']](result)}\n\n{caption(result)}\n"


def place(text: str, name: str, content: str) -> str:
    """`text` with `content` between the markers of `name`; unchanged where it has none."""
    begin, end = f"<!-- benchmark: {name} -->", f"<!-- /benchmark: {name} -->"
    return re.sub(
        f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}\n{content}{end}", text, flags=re.DOTALL
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="files that the benchmarks wrote")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--update", type=Path, metavar="FILE")
    target.add_argument("--check", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in args.results}
    tables = {name: render(result) for name, result in results.items()}
    tables["summary"] = f"{summary(results)}\n"
    document = args.update or args.check
    if document is None:
        print("\n".join(f"## {name}\n\n{content}" for name, content in tables.items()), end="")
        return
    before = after = document.read_text(encoding="utf-8")
    for name, content in tables.items():
        after = place(after, name, content)
    if args.update is not None:
        write_text_atomic(document, after)
    elif after != before:
        raise SystemExit(f"{document} does not show these results; run with --update {document}")


if __name__ == "__main__":
    main()
