"""One self-contained page: everything inline, no network, light or dark by the reader's colour scheme."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plop_ext._version import __version__
from plop_ext.files import write_text_atomic
from plop_ext.report import figures, plots, tables
from plop_ext.report.against import Against

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from plop_ext.placement import Placement
    from plop_ext.placement.cost import Cost
    from plop_ext.scores import Scores

_TEMPLATE = "report.html.j2"
_SUFFIXES = (".png", ".svg")
CAPTIONS = {
    "heatmap": "NFN by type and layer. Grey: NFN 1, the response to random inputs; red: above 1; blue: below 1.",
    "intervals": "The uncertainty of each type's NFN. Layers differ by much more than the uncertainty over the data. "
    "Two types whose thin lines overlap are still distinguishable if they change together from layer to layer.",
    "layers": "NFN over the depth of the model. The first layer often differs from all others.",
    "stability": "The number of samples that the choice needs.",
    "against": "The two score files, type by type.",
}


def make_figures(scores: Scores, chosen: Sequence[str], comparison: Against | None = None) -> dict[str, Figure]:
    """Draw all figures of a report, by name."""
    import matplotlib

    with matplotlib.rc_context(figures.style()):
        found = {"heatmap": figures.heatmap(scores, chosen)}
        if not scores.paper_script:
            found["intervals"] = figures.intervals(scores, chosen)
        found["layers"] = figures.layers(scores, chosen)
        if not scores.paper_script and len(scores.sample_ids) > 1:
            found["stability"] = figures.stability(scores, len(chosen) or min(3, len(scores.types)))
        if comparison is not None:
            found["against"] = figures.against(comparison)
    return found


def figure_files() -> list[str]:
    """Return the names of all files that `save_figures` may write."""
    return [f"{name}{suffix}" for name in CAPTIONS for suffix in _SUFFIXES]


def save_figures(found: Mapping[str, Figure], folder: str | os.PathLike[str]) -> list[Path]:
    """Write each figure as PNG and as SVG; returns the files."""
    import matplotlib

    paths = []
    with matplotlib.rc_context(figures.style()):
        for name, figure in found.items():
            for suffix in _SUFFIXES:
                paths.append(Path(folder) / f"{name}{suffix}")
                plots.save(figure, paths[-1])
    return paths


def write_report(
    path: str | os.PathLike[str],
    scores: Scores,
    found: Mapping[str, Figure],
    placements: Sequence[tuple[Placement, Cost | None]],
    step: tuple[int, int],
    comparison: Against | None = None,
) -> None:
    """Write the page.

    Args:
        path: File to write, atomically.
        scores: The scores to report.
        found: The figures that `make_figures` returned.
        placements: Placements with their cost, or None if it is unknown; figures and tables mark the first.
        step: Samples and tokens per sample of the training step whose cost is shown.
        comparison: Comparison with a second score file.
    """
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
    chosen = placements[0][0].types if placements else ()
    statistics = None if scores.paper_script else scores.statistics(len(chosen) or None)
    ranked = sorted(zip(scores.modules, scores.nfn.tolist(), strict=True), key=lambda pair: pair[1])
    page = environment.get_template(_TEMPLATE).render(
        version=__version__,
        name=scores.provenance["model"].get("name") or scores.provenance["model"]["class"],
        data=scores.provenance["data"],
        provenance=scores.provenance,
        details=json.dumps(dict(scores.provenance), indent=1),
        tokens=scores.tokens,
        signal=None if statistics is None else statistics.signal,
        lines=tables.confidence_lines(scores),
        statistics=statistics,
        by_name={} if statistics is None else {item.type: item for item in statistics.types},
        by_type=scores.by_type(),
        modules=[(module, value) for module, value in ranked],
        chosen=set(chosen),
        figures=[(name, CAPTIONS[name], inline(figure)) for name, figure in found.items()],
        placements=placements,
        step=step,
        unscored=tables.unscored_lines(scores),
        comparison=comparison,
        comparison_lines=[] if comparison is None else tables.against_lines(comparison),
    )
    write_text_atomic(path, page)


def inline(figure: Figure) -> Any:
    """Return the figure as inline SVG, with the colour and fonts of the page's text and no fixed size."""
    import markupsafe
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context(figures.style()):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    opening, _, rest = text[text.index("<svg") :].partition(">")
    opening = re.sub(r' (width|height)="[^"]*"', "", opening)
    rest = re.sub(r"<metadata>.*?</metadata>", "", rest, flags=re.DOTALL).replace(figures.INK, "currentColor")
    rest = re.sub(r"font: ((?:bold |700 )?)([\d.]+)px [^;\"]*", r"font: \1\2px var(--sans)", rest)
    return markupsafe.Markup(f"{opening}>{rest}")
