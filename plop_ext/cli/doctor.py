"""`plop doctor`: print which kernels run on this machine, and why."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from plop_ext.cli import options
from plop_ext.cli.exit_codes import ExitCode
from plop_ext.cli.options import console
from plop_ext.cli.result import Result


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="print which kernels run on this machine, and why",
        examples=["plop doctor", "plop doctor --json > machine.json"],
    )
    options.add_common(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> Result:
    from rich.table import Table
    from rich.text import Text

    with options.status("importing torch and trying the kernels", args.quiet):  # seconds, in which nothing else shows
        from plop_ext.doctor import examine

        findings = examine()
    table = Table(box=None, show_header=False)
    for finding in findings:
        mark = Text("ok", style="green") if finding.good else Text("no", style="red")
        table.add_row(mark, finding.what, finding.value)
    console.print(table)
    good = all(finding.good for finding in findings)
    content = {"good": good, "findings": [dataclasses.asdict(finding) for finding in findings]}
    return Result(content, ExitCode.DONE if good else ExitCode.DEFECT)
