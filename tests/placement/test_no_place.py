"""Types that are no place for LoRA: scored, shown and noted, but never chosen."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plop_ext import Scores
from plop_ext.errors import InputError
from plop_ext.report import tables
from plop_ext.scoring.stopping import StopWatch
from plop_ext.statistics import StopRule
from tests.support.found_layers import found_layer
from tests.support.gain_tables import scores, table
from tests.support.totals import make_totals

GATE, INDEX = "it is a gate", "it has no gradient"
# The lowest, one between, and the highest.
NO_PLACE = {"a": GATE, "c": INDEX, "f": GATE}


def ranked(no_place: Mapping[str, str] = NO_PLACE) -> Scores:
    """Types a to f with NFN 0.5 to 1.75, of 12 layers."""
    found = scores(table([0.5, 0.75, 1.0, 1.25, 1.5, 1.75], samples=64, sample_sd=0.0))
    modules = tuple(replace(module, no_place=no_place.get(module.type, "")) for module in found.modules)
    return replace(found, modules=modules)


def placed(found: Scores, **arguments: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return found.place(**arguments)


def test_only_candidates_are_ranked() -> None:
    found = ranked()
    assert found.types == ("b", "d", "e") == found.table.types
    assert [(item.type, item.no_place) for item in found.no_place_by_type()] == [
        ("a", GATE),
        ("c", INDEX),
        ("f", GATE),
    ]
    assert [item.no_place for item in found.by_type()] == [""] * 3
    assert len(found.modules) == 72 == len(found.nfn) and len(found.candidates) == 36
    assert [item.type for item in found.statistics().types] == ["b", "d", "e"]
    per_sample = found.per_sample()
    assert per_sample.nfn.shape == (72, 64) and per_sample.type_nfn.shape == (3, 64)
    positions = [i for i, module in enumerate(found.modules) if module.type == "b"]
    np.testing.assert_allclose(per_sample.type_nfn[0], per_sample.nfn[positions].mean(axis=0), rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "types", "noted"),
    [
        ({"types": 2}, ("b", "d"), {GATE: "a", INDEX: "c"}),
        ({"types": 1}, ("b",), {GATE: "a"}),
        ({"types": 1, "strategy": "inverse"}, ("e",), {GATE: "f"}),
        ({"types": 3, "strategy": "inverse"}, ("e", "d", "b"), {INDEX: "c", GATE: "f"}),
        ({"types": 3, "strategy": "random"}, None, {}),
        ({"types": ["d"]}, ("d",), {}),
        ({"strategy": "all"}, ("b", "d", "e"), {GATE: "af", INDEX: "c"}),
        ({"modules": 12}, ("b",), {GATE: "a"}),
        ({"modules": 0.5}, None, {GATE: "a", INDEX: "c"}),
        ({"modules": 12, "strategy": "inverse"}, ("e",), {GATE: "f"}),
        ({"max_nfn": 1.1}, ("b",), {GATE: "a", INDEX: "c"}),
    ],
    ids=str,
)
def test_no_strategy_chooses_them_and_notes_name_those_passed_over(
    arguments: dict[str, Any], types: tuple[str, ...] | None, noted: dict[str, str]
) -> None:
    placement = placed(ranked(), **arguments)
    assert types is None or placement.types == types
    assert not set(placement.types) & set(NO_PLACE)
    chosen = set(placement.modules)
    assert not any(module.no_place for module in ranked().modules if module.name in chosen)
    assert placement.notes == tuple(
        f"scored, no place for LoRA: {', '.join(f'{label} (12 modules)' for label in labels)}: {reason}"
        for reason, labels in noted.items()
    )


def test_a_fraction_and_the_limits_count_candidates() -> None:
    assert len(placed(ranked(), modules=0.5).modules) == 18
    with pytest.raises(InputError, match="`modules` must be between 1 and 36, the number of scored modules"):
        placed(ranked(), modules=37)
    with pytest.raises(InputError, match="`types` must be between 1 and 3"):
        placed(ranked(), types=4)
    with pytest.raises(InputError, match=r"`max_nfn`=0\.6 selects no module; the lowest NFN is 0\.7"):
        placed(ranked(), max_nfn=0.6)


def test_a_random_choice_of_all_modules_is_all_candidates() -> None:
    assert set(placed(ranked(), modules=36, strategy="random").types) == {"b", "d", "e"}


def test_naming_one_is_refused_with_the_remedy() -> None:
    message = (
        "`types`: `c` is no place for LoRA: it has no gradient; to place LoRA there all the same, score with `incl"
    )
    with pytest.raises(InputError, match=message):
        placed(ranked(), types=["b", "c"])


def test_they_are_shown_and_saved_with_the_reason(tmp_path: Path) -> None:
    from rich.console import Console

    found = ranked()
    lines = tables.left_out_lines(found)
    assert f"scored, no place for LoRA: a (12 modules), f (12 modules): {GATE}" in lines
    assert f"scored, no place for LoRA: c (12 modules): {INDEX}" in lines
    console = Console(width=200, record=True)
    console.print(tables.scores_table(found, chosen=("b",)))
    rows = [line.split() for line in console.export_text().splitlines() if "no place" in line]
    assert [(row[1], row[3]) for row in rows] == [("a", "0.500"), ("c", "1.000"), ("f", "1.750")]
    found.save(tmp_path / "scores.json")
    content = json.loads((tmp_path / "scores.json").read_text())
    assert [(item["type"], item["no_place"]) for item in content["types"]] == [
        *((label, "") for label in "bde"),
        ("a", GATE),
        ("c", INDEX),
        ("f", GATE),
    ]
    assert [item["type"] for item in content["statistics"]["types"]] == ["b", "d", "e"]
    assert {item["type"] for item in content["modules"] if "nfn_interval" in item} == {"b", "d", "e"}
    again = Scores.load(tmp_path / "scores.json")
    assert again.modules == found.modules and again.types == found.types
    for module in content["modules"]:
        module["no_place"] = GATE
    (tmp_path / "none.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="damaged scores file"):
        Scores.load(tmp_path / "none.json")


def test_the_stop_rule_waits_for_candidates_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from plop_ext.scoring import stopping

    seen = []
    monkeypatch.setattr(stopping, "set_stability", lambda table, rule: seen.append(table.types) or 1.0)
    layers = [found_layer("0.up"), replace(found_layer("0.gate"), no_place=GATE)]
    watch = StopWatch(StopRule(types=1), layers, [1.0, 1.0])
    assert watch.look([make_totals(2, 4, tokens=np.ones((2, 4)), sum_gain=np.ones((2, 4)))], 4)
    assert seen == [("up",)]
