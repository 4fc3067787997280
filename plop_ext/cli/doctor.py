"""`plop doctor`: print which kernels run on this machine, and why."""

from __future__ import annotations

import argparse
from typing import Any

from plop_ext.cli.options import console


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("doctor", help="print which kernels run on this machine, and why")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from rich.table import Table
    from rich.text import Text

    from plop_ext.doctor import examine

    table = Table(box=None, show_header=False)
    findings = examine()
    for finding in findings:
        mark = Text("ok", style="green") if finding.good else Text("no", style="red")
        table.add_row(mark, finding.what, finding.value)
    console.print(table)
    return 0 if all(finding.good for finding in findings) else 1
