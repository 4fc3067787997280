"""The check of errors sees each kernel that says something else, or nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from plop_ext import ops
from tests.support.op_errors import check_devices, check_errors, zeros

CPU = torch.device("cpu")
ARGUMENTS = {"out": zeros(4), "x": zeros(4, 6), "bias": None, "step": 1, "phase": 0}
STEP = {"step 0": ({"step": 0}, "step must be at least 1, got 0")}


def silent(**_: Any) -> None: ...


def other_text(**_: Any) -> None:
    raise RuntimeError("row_sumsq_: step must be at least 1, got 0 and more")


def other_class(**_: Any) -> None:
    raise TypeError("row_sumsq_: step must be at least 1, got 0")


def test_right_texts_pass() -> None:
    check_errors("row_sumsq_", ARGUMENTS, STEP, CPU)


@pytest.mark.parametrize("kernel", ["row_sumsq_", "row_sumsq_fake", "row_sumsq_pytorch"])
@pytest.mark.parametrize("said", [silent, other_text, other_class])
def test_every_kernel_is_checked(kernel: str, said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, kernel, said)
    name = kernel.removeprefix("row_sumsq_") or "op"
    with pytest.raises(AssertionError, match=rf"^step 0: {name} said [^\n]*$"):
        check_errors("row_sumsq_", ARGUMENTS, STEP, CPU)
    with pytest.raises(AssertionError, match=rf"^out on meta: {name} said [^\n]*$"):
        check_devices("row_sumsq_", ARGUMENTS, ["out"], CPU)


def test_every_case_is_checked() -> None:
    cases = {**STEP, "none": ({}, "nothing is wrong"), "other": ({"step": -2}, "step must be at least 1, got -3")}
    with pytest.raises(AssertionError) as caught:
        check_errors("row_sumsq_", ARGUMENTS, cases, CPU)
    names = [line.partition(" said")[0] for line in str(caught.value).splitlines()]
    assert names == [f"{case}: {kernel}" for case in ("none", "other") for kernel in ("op", "fake", "pytorch")]
