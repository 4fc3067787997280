"""A placement of another set than the one that ended the scoring, or of single modules on too few samples, warns."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest

import plop_ext
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
        made().place(types=["a", "d"])
        made(settled=False).place(types=4)
        made(samples=64, types=None, modules=14).place(modules=14)


def test_another_number_of_types() -> None:
    match = r"after 8 samples, when the lowest 3 types had settled; .*score again with stop=StopRule\(types=4\)"
    with pytest.warns(UserWarning, match=match):
        made().place(types=4)
    with pytest.warns(UserWarning, match=r"StopRule\(types=4\) \(plop score --settle-types 4\)"):
        made().place(types=1, strategy="inverse")


def test_single_modules_need_64_samples() -> None:
    match = r"chosen on 8 samples, and their order needs 64; score again with stop=StopRule\(modules=14\)"
    with pytest.warns(UserWarning, match=match):
        made().place(modules=14)
    with pytest.warns(UserWarning, match=r"StopRule\(modules=30\) \(plop score --settle-modules 30\)"):
        made().place(modules=0.5)
    with pytest.warns(UserWarning, match=r"with max_samples=64 \(plop score --samples 64\)"):
        made().place(max_nfn=0.7)
    with pytest.warns(UserWarning, match=r"when the lowest 3 types had settled; only .* give the same modules"):
        made(samples=64).place(modules=40)


def test_find_plop_targets_stops_on_as_many_types_as_it_places(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    place = Scores.place
    monkeypatch.setattr(Scores, "place", lambda self, **kw: seen.append(self.provenance["stop"]) or place(self, **kw))
    for arguments in ({"types": 1}, {"types": 1, "stop": "settled"}, {}, {"types": 1, "max_samples": 20}):
        plop_ext.find_plop_targets(aligned(), toy_data(50), progress=False, **arguments)
    assert [None if stop is None else stop["types"] for stop in seen] == [1, 1, 3, None]
