"""Fingerprints of data tell apart what a model would, and depend on nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from plop_ext.scoring.digest import data_hash, digest, on_host

X = torch.arange(6.0)


def test_fingerprints_stay_what_journals_recorded() -> None:
    batch = {"x": X.view(2, 3), "more": [torch.tensor([True]), (torch.tensor(3),)], "text": "ignored"}
    assert digest(batch) == "1303e80aef7b4564778313b2491d67b8"
    assert data_hash(["ab", "cd"]) == "d2c8e95841ccbc0c3cb3edc9201a6981"
    assert data_hash(["ab", "cd"]) == data_hash(["abcd"]) != data_hash(["cd", "ab"])


@pytest.mark.parametrize(
    "other",
    [
        X + 1,
        X.flip(0),
        X.view(2, 3),
        X.double(),
        X.view(torch.int32),
        [X, X],
        {"x": X},
    ],
    ids=["values", "order", "shape", "type", "type of the same bytes", "two", "named"],
)
def test_batches_that_differ(other: Any) -> None:
    assert digest(other) != digest(X)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"a": X, "b": X + 1}, {"b": X + 1, "a": X}),
        ({1: X, "b": X + 1}, {"b": X + 1, 1: X}),
        ((X, X + 1), [X, X + 1]),
        (X, X.repeat_interleave(2)[::2]),
        (X, X.clone().requires_grad_()),
    ],
    ids=["order of keys", "keys of two types", "list", "strides", "gradient"],
)
def test_batches_that_do_not_differ(first: Any, second: Any) -> None:
    assert digest(first) == digest(second)


def test_the_names_of_tensors_count() -> None:
    assert digest({"a": X}) != digest({"b": X})


@pytest.mark.parametrize("elsewhere", [X.to("meta"), X.to_sparse()], ids=["other device", "sparse"])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"a": X, "x": x}, lambda x: [X, x], lambda x: (X, [x])])
def test_only_dense_tensors_on_the_host_need_no_synchronization(wrap: Any, elsewhere: torch.Tensor) -> None:
    assert not on_host(wrap(elsewhere))
    assert on_host(wrap(X)) and on_host(wrap("text")) and on_host(wrap(np.zeros(2)))
