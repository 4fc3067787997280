"""A placement of another set than the one that ended the scoring, or of single modules on too few samples, warns."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from typing import Any

import pytest

import plop_ext
from plop_ext.placement import enough_samples
from plop_ext.scores import Scores
from tests.support.gain_tables import scores, table
from tests.support.toy_signal import aligned, toy_data

STOP = {
    "rule": "settled",
    "types": 3,
    "modules": None,
    "confidence": 0.99,
    "settled": True,
    "settled_at": 8,
    "stability": 1.0,
    "samples": 8,
    "available": 128,
}


def made(samples: int = 8, **stop: Any) -> Scores:
    """d and e are tied; the three lowest are clear of them."""
    found = scores(table([0.5, 0.6, 0.7, 1.0, 1.0005], samples=samples, sample_sd=0.05))
    return replace(found, provenance={**found.provenance, "stop": {**STOP, **stop}})


@pytest.mark.parametrize("arguments", [{}, {"types": 3}, {"types": 2}, {"types": 5}, {"types": "auto"}], ids=str)
def test_a_set_that_settled_or_that_resampling_gives_again_is_placed_in_silence(arguments: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made().place(**arguments)
        made().place(strategy="all")
        made().place(types=4, strategy="random")
        made().place(types=["a", "d"])
        made(settled=False).place(types=4)
        made(samples=64, types=None, modules=14).place(modules=14)


@pytest.mark.parametrize(
    ("stop", "arguments"),
    [
        ({"types": 4}, {"types": 4}),  # the rule's own set, though it is tied
        ({}, {"types": 5, "strategy": "inverse"}),  # everything
        ({"samples": 64}, {"max_nfn": 1.0}),  # no number of modules was asked for
    ],
    ids=str,
)
def test_a_set_that_resampling_has_nothing_to_say_about_is_placed_in_silence(
    stop: dict[str, Any], arguments: dict[str, Any]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(**stop).place(**arguments)


def test_the_numbers_of_the_published_script_are_placed_in_silence() -> None:
    found = made()
    settings = {**found.provenance["settings"], "compat": "paper-script"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        placement = replace(found, provenance={**found.provenance, "settings": settings}).place(modules=14)
    assert len(placement.modules) == 14 and placement.reason == ""


@pytest.mark.parametrize(("stability", "count"), [(0.989, 1), (0.99, 0)])
def test_resamples_agree_as_often_as_a_stop_rule_asks(
    stability: float, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enough_samples, "set_stability", lambda table, rule: stability)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made().place(types=4)
    assert len(caught) == count


@pytest.mark.parametrize(
    ("stop", "arguments", "settled", "chosen"),
    [
        ({}, {"types": 4}, "3 types", "types 4"),
        ({}, {"types": 1, "strategy": "inverse"}, "3 types", "types 4"),
        ({"samples": 64}, {"modules": 40}, "3 types", "modules 40"),
        ({"samples": 64}, {"modules": 20, "strategy": "inverse"}, "3 types", "modules 40"),
        ({"samples": 64, "modules": 14}, {"types": 4}, "modules", "types 4"),
    ],
    ids=str,
)
def test_another_set_than_the_one_that_settled(
    stop: dict[str, Any], arguments: dict[str, Any], settled: str, chosen: str
) -> None:
    what, count = chosen.split()
    match = (
        rf"scoring stopped after {stop.get('samples', 8)} samples, when the lowest {settled} had settled; only "
        rf"\d+% of bootstrap resamples give the same {what} as chosen here; score again with "
        rf"stop=StopRule\({what}={count}\) \(plop score --settle-{what} {count}\)"
    )
    with pytest.warns(UserWarning) as caught:
        made(**stop).place(**arguments)
    assert len(caught) == 1 and re.fullmatch(match, str(caught[0].message))


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        ({"modules": 14}, "stop=StopRule(modules=14) (plop score --settle-modules 14)"),
        ({"modules": 0.5}, "stop=StopRule(modules=30) (plop score --settle-modules 30)"),
        ({"max_nfn": 0.7}, "max_samples=64 (plop score --samples 64)"),
    ],
    ids=str,
)
def test_single_modules_need_64_samples(arguments: dict[str, Any], fix: str) -> None:
    with pytest.warns(UserWarning) as caught:
        made().place(**arguments)
    message = f"single modules were chosen from 8 samples, but their order needs 64 samples; score again with {fix}"
    assert [str(warning.message) for warning in caught] == [message]


def test_find_plop_target_modules_stops_on_as_many_types_as_it_places(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    place = Scores.place
    monkeypatch.setattr(Scores, "place", lambda self, **kw: seen.append(self.provenance["stop"]) or place(self, **kw))
    for arguments in ({"types": 1}, {"types": 1, "stop": "settled"}, {}, {"types": 1, "max_samples": 20}):
        plop_ext.find_plop_target_modules(aligned(), toy_data(50), progress=False, **arguments)
    assert [None if stop is None else stop["types"] for stop in seen] == [1, 1, 3, None]
