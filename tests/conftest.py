"""Seeds, the `device` axis, and what `PLOP_REQUIRE_CUDA=1` demands of a GPU machine."""

from __future__ import annotations

import logging
import os
import random
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from plop_ext import ops
from tests.support.graphed import graphing as graphing

os.environ.setdefault("HF_HUB_OFFLINE", "1")

REQUIRE_CUDA = os.environ.get("PLOP_REQUIRE_CUDA", "0") not in ("", "0")
OPS = (
    "row_sumsq_",
    "row_sumsq_pair_",
    "gain_totals_",
    "add_rms_norm_",
    "gated_activation_",
    "rotary_",
    "gated_projection_",
)


def cuda_defect() -> str:
    """Why CUDA tests could not test the native CUDA kernels here; empty if they can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if not ops.STATUS.cuda:
        return f"the native CUDA kernels do not serve the ops: {ops.STATUS.reason}"
    missing = [op for op in OPS if not torch._C._dispatch_has_kernel_for_dispatch_key(f"plop_ext::{op}", "CUDA")]
    return f"no CUDA kernel is registered for {', '.join(missing)}" if missing else ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Processes that run tests side by side have to collect the same names.
    if named := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError(f"{named[0]}: a memory address is no name for a case; give it an `id`")
    if REQUIRE_CUDA:
        return
    reason = cuda_defect()
    for item in items:
        if reason and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=f"{reason} (PLOP_REQUIRE_CUDA=1 makes this a failure)"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if REQUIRE_CUDA and item.get_closest_marker("gpu") and (reason := cuda_defect()):
        pytest.fail(f"PLOP_REQUIRE_CUDA=1 but {reason}", pytrace=False)


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Every test starts from the same random state."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def _log_levels() -> dict[str, int]:
    names = ["root", *(name for name in logging.root.manager.loggerDict if name.split(".")[0] == "plop_ext")]
    return {name: level for name in names if (level := logging.getLogger(name).level)}


@pytest.fixture(autouse=True)
def logging_as_found() -> Iterator[None]:
    """No test leaves another level of logging or another way to show warnings to the tests after it."""
    levels, showwarning = _log_levels(), warnings.showwarning
    yield
    changed = _log_levels() != levels or warnings.showwarning is not showwarning
    for name in _log_levels().keys() - levels.keys():
        logging.getLogger(name).setLevel(logging.NOTSET)
    assert not changed, "the test leaves logging or warnings other than it found them"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU always, the current CUDA device where there is one."""
    return torch.device(request.param)
