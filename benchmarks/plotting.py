"""Command line of the scripts that draw a result file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from plop_ext.report import plots
from plop_ext.report.figures import style


def draw(description: str | None, source: str, figure: Callable[[Any], Any], argv: Sequence[str] | None) -> None:
    """Draw the figure of a result file.

    Args:
        description: The script's docstring.
        source: Module that writes the file.
        figure: Makes the figure from the content of the file.
        argv: The command line; None: that of the process.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help=f"what {source} wrote")
    parser.add_argument("--output", type=Path, required=True, help=f"{', '.join(plots.FORMATS)}")
    args = parser.parse_args(argv)
    import matplotlib

    with matplotlib.rc_context(style.settings()):
        plots.save(figure(json.loads(args.result.read_text(encoding="utf-8"))), args.output)
