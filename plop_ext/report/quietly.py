"""Drawing text in scripts that matplotlib's font does not have."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_glyph_warnings() -> Iterator[None]:
    """Hide one warning per glyph: an SVG keeps text as text, which the reader's browser has fonts for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield
