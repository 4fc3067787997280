"""The templates of the pages, and how they write numbers and sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plop_ext.report.recommendation import listed


def render(template: str, /, **values: Any) -> str:
    """Render a template of this folder."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).resolve().parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["mib"] = lambda value: f"{value / 2**20:,.1f}"
    environment.filters["span"] = lambda pair: "" if pair is None else f"{pair[0]:.3f} to {pair[1]:.3f}"
    environment.filters["listed"] = listed
    environment.filters["sentence"] = lambda line: f"{line[:1].upper()}{line[1:]}."
    return str(environment.get_template(template).render(**values))
