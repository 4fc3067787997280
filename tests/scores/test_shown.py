"""What notebooks, data frames and trackers show of scores and placements."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from plop_ext.lora_target import LoraTarget
from plop_ext.placement import Placement
from tests.support.saved_scores import ranked

# What MLflow accepts in the name of a metric; the other trackers accept more.
_NAMES = re.compile(r"[\w/. -]+", re.ASCII)


class Cells(HTMLParser):
    """The texts of the cells of all tables, and the tags that were opened and not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.cells.append(data)


def test_the_representation_of_scores_is_a_line() -> None:
    scores = ranked()
    lowest = scores.by_type()[0]
    text = repr(scores)
    assert len(text) < 300 and "\n" not in text
    assert f"{len(scores.modules)} modules" in text and f"{lowest.type} {lowest.nfn:.3f}" in text


def test_a_notebook_shows_each_type_and_each_layer() -> None:
    scores = ranked()
    shown = Cells(scores._repr_html_())
    assert not shown.open
    for score in scores.by_type():
        assert score.type in shown.cells and f"{score.nfn:.4f}" in shown.cells
    layers = {str(module.layer) for module in scores.modules if module.layer is not None}
    assert layers <= set(shown.cells)


def test_the_lowest_cell_is_the_darkest() -> None:
    text = ranked()._repr_html_().partition("<details>")[2]
    cells = re.findall(r"rgba\(230,120,20,([\d.]+)\)\">([\d.]+)<", text)
    assert len(cells) > 2
    darkest = max(cells, key=lambda cell: float(cell[0]))
    assert float(darkest[1]) == min(float(value) for _, value in cells)


def test_a_data_frame_has_a_row_for_each_module() -> None:
    scores = ranked()
    frame = scores.to_pandas()
    assert frame["module"].tolist() == list(scores.module_names)
    np.testing.assert_array_equal(frame["nfn"].to_numpy(), scores.nfn)
    by_type = frame.groupby("type")["nfn"].mean()
    assert by_type.to_dict() == pytest.approx({score.type: score.nfn for score in scores.by_type()})


def test_metrics_have_names_that_every_tracker_takes() -> None:
    metrics = ranked().metrics("before/")
    assert all(_NAMES.fullmatch(name) for name in metrics) and all(type(value) is float for value in metrics.values())
    lowest = ranked().by_type()[0]
    assert metrics[f"before/nfn/{lowest.type}"] == lowest.nfn


def placement(name: str = "a", **fields: object) -> Placement:
    targets = (LoraTarget.of_module(f"{name}.q", 8, 4), LoraTarget.of_module(f"{name}.<k>", 8, 4))
    return Placement((f"{name}.q", f"{name}.<k>"), ("q", "<k>"), "types", "lowest-2", "Model", targets, **fields)  # type: ignore[arg-type]


def test_equal_placements_have_equal_hashes() -> None:
    same, other, ranked_ = placement(), placement("b"), placement(ranks={"a.q": 2, "a.<k>": 3})
    assert placement() == same and hash(placement()) == hash(same)
    assert len({placement(), same, other, ranked_}) == 3


def test_a_placement_is_shown_with_its_ranks_and_parameters() -> None:
    shown = placement(ranks={"a.q": 2, "a.<k>": 3})
    assert repr(shown) == "<Placement lowest-2 of Model: q, <k>; 2 modules, r=2 to 3>"
    page = Cells(shown._repr_html_())
    assert not page.open and {"a.q", "a.<k>", "2", "3", "24", "36"} <= set(page.cells)
    assert any("60 parameters in 2 targets" in cell for cell in page.cells)
    frame = shown.to_pandas()
    assert frame["lora_parameters"].tolist() == [24, 36] and frame["target"].tolist() == ["a.q", "a.<k>"]


def test_a_large_placement_is_cut() -> None:
    targets = tuple(LoraTarget.of_module(f"m.{number}", 8, 4) for number in range(1000))
    shown = Placement(tuple(target.name for target in targets), ("t",), "types", "all", "Model", targets)
    assert len(shown._repr_html_()) < 10_000 and "and 970 more" in shown._repr_html_() and len(repr(shown)) < 200
