"""Figures as inline SVG, for readers who see them and for readers who do not."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

from plop_ext.report.figures import style
from plop_ext.report.quietly import without_glyph_warnings

if TYPE_CHECKING:
    from plop_ext.report.figures import Drawing


def inline(drawing: Drawing) -> Any:
    """Return the wide and the narrow form of a figure; the page shows the one that fits the screen.

    Both have a title and a description, ids of their own, the colours and fonts of the page, and no fixed size.
    """
    import markupsafe

    return markupsafe.Markup("").join(
        _form(drawing, name, width) for name, width in (("wide", style.WIDE), ("narrow", style.NARROW))
    )


def _form(drawing: Drawing, form: str, width: float) -> Any:
    import markupsafe
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context(style.settings()), without_glyph_warnings():
        drawing.draw(width).savefig(stream, format="svg", transparent=True, metadata={"Date": None}, dpi=150)
    text = stream.getvalue()
    opening, _, rest = text[text.index("<svg") :].partition(">")
    opening = re.sub(r' (width|height)="[^"]*"', "", opening)
    rest = re.sub(r"<metadata>.*?</metadata>", "", rest, flags=re.DOTALL)
    rest = rest.replace(style.INK, "currentColor").replace(style.CHOSEN, "var(--chosen)")
    # Older versions of matplotlib write size and family in one property.
    rest = re.sub(r"(font-family: |font: (?:bold |700 )?[\d.]+px )[^;\"]*", r"\g<1>var(--sans)", rest)
    # matplotlib counts its ids from 1 in every figure, and a page holds several.
    prefix = f"{drawing.name}-{form}-"
    rest = re.sub(r'(\bid="|xlink:href="#|\bhref="#|url\(#)', rf"\g<1>{prefix}", rest)
    words = markupsafe.Markup(
        '<title id="{prefix}title">{title}</title><desc id="{prefix}description">{description}</desc>'
    ).format(prefix=prefix, title=drawing.title, description=drawing.description)
    labels = f'class="{form}" role="img" aria-labelledby="{prefix}title" aria-describedby="{prefix}description"'
    return markupsafe.Markup(f"{opening} {labels}>{words}{rest}")
