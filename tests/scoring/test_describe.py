"""What the provenance of a run says."""

from __future__ import annotations

import datetime
import platform
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from plop_ext.errors import InputError
from plop_ext.provenance import versions
from plop_ext.score_data.settings import Settings
from plop_ext.scoring import describe
from plop_ext.scoring.describe import check_data_info, describe_run
from tests.support.found_layers import run_outcome
from tests.support.totals import make_totals


@pytest.mark.parametrize("given", [None, {}])
def test_facts_about_the_data_are_optional(given: Any) -> None:
    assert check_data_info(given) == {}


def test_facts_about_the_data_are_those_that_a_file_would_hold() -> None:
    given = {"split": ("a", 1), "length": 2.5}
    found = check_data_info(given)
    assert found == {"split": ["a", 1], "length": 2.5} and given["split"] == ("a", 1)
    with pytest.raises(InputError) as caught:
        check_data_info({"column": 3j})
    assert str(caught.value) == (
        "`data_info` must be a dict of plain JSON values (Object of type complex is not JSON serializable)"
    )


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_every_field(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(describe, "time", SimpleNamespace(perf_counter=lambda: 12.34567))
    monkeypatch.setattr(describe.ops.STATUS.__class__, "backend", lambda self, device: f"kernels of {device.type}")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU of {device}")
    settings = Settings("all", "frobenius", 8, None, (), "language", None, 1, 0)
    outcome = run_outcome(make_totals(1, 3), experts_implementation="eager")
    stop = {"settled": True}
    before = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)
    found = describe_run(
        {"class": "Toy"}, {"name": "toy", "samples": 99}, settings, outcome, torch.device(kind), 2.0, stop
    )
    created = datetime.datetime.fromisoformat(found.pop("created"))
    assert found == {
        "model": {"class": "Toy"},
        "data": {"name": "toy", "samples": 3},
        "settings": settings.to_dict(),
        "stop": {"settled": True},
        "experts_implementation": "eager",
        "backend": f"kernels of {kind}",
        "device": "GPU of cuda" if kind == "cuda" else platform.machine(),
        "versions": versions(),
        "seconds": 10.346,
    }
    assert before <= created <= datetime.datetime.now(datetime.timezone.utc) and created.microsecond == 0
    assert created.utcoffset() == datetime.timedelta(0)
