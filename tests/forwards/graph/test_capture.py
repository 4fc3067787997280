"""What a capture needs to know: where a forward waits for the device, and why one failed."""

from __future__ import annotations

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from plop_ext.forwards.graph import capture
from tests.support.threads import in_thread


def test_the_first_cause_is_named() -> None:
    try:
        try:
            raise RuntimeError("operation not permitted\nmore")
        finally:
            raise ValueError("capture invalidated")
    except ValueError as error:
        assert capture.cause(error) == "RuntimeError: operation not permitted"


@pytest.fixture
def sync_debug(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A stand-in for the mode, which is the last item."""
    modes: list[Any] = [0]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    return modes


def wait() -> None:
    """Warn as torch does at a wait while the mode is on."""
    if torch.cuda.get_sync_debug_mode():
        warnings.warn("called a synchronizing CUDA operation", stacklevel=2)


def test_only_waits_of_the_own_thread_are_noted(sync_debug: list[Any]) -> None:
    filters, show = list(warnings.filters), warnings.showwarning
    with warnings.catch_warnings(record=True) as shown, capture.noting_waits(torch.device("cuda")) as waits:
        in_thread(wait)
        assert waits == []
        for _ in range(2):  # from one line, which is shown once by default
            wait()
        in_thread(lambda: warnings.warn("mine", stacklevel=1))
    assert [str(item.message) for item in shown] == ["mine"]
    assert len(waits) == 2 and all(item.startswith("test_capture.py:") for item in waits)
    assert (sync_debug[-1], warnings.showwarning, list(warnings.filters)) == (0, show, filters)


def test_waits_are_shown_where_the_mode_was_on(sync_debug: list[Any]) -> None:
    sync_debug.append(1)
    with (
        pytest.warns(UserWarning, match="synchronizing") as shown,
        capture.noting_waits(torch.device("cuda")) as waits,
    ):
        wait()
        in_thread(wait)
    assert len(shown) == 2 and len(waits) == 1 and sync_debug[-1] == 1


def test_threads_that_note_waits_at_once_leave_nothing_behind(sync_debug: list[Any]) -> None:
    filters, show = list(warnings.filters), warnings.showwarning
    listening, finish = threading.Event(), threading.Event()

    def other() -> list[str]:
        with capture.noting_waits(torch.device("cuda")) as waits:
            listening.set()
            assert finish.wait(60)
            wait()
        return waits

    with ThreadPoolExecutor(1) as pool:
        with capture.noting_waits(torch.device("cuda")) as waits:
            result = pool.submit(other)
            assert listening.wait(60)
            wait()
        finish.set()
        assert len(waits) == len(result.result()) == 1
    assert (sync_debug[-1], warnings.showwarning, list(warnings.filters)) == (0, show, filters)


def test_a_catch_that_outlasts_the_noting_hides_no_warning(sync_debug: list[Any]) -> None:
    """It puts back what it found: the filters and the function of the noting."""
    filters, show = list(warnings.filters), warnings.showwarning
    noting = capture.noting_waits(torch.device("cuda"))
    noting.__enter__()
    catch = warnings.catch_warnings()
    catch.__enter__()
    noting.__exit__(None, None, None)
    catch.__exit__(None, None, None)
    try:
        assert list(warnings.filters) == filters
        with capture.noting_waits(torch.device("cuda")) as waits:
            wait()
        assert len(waits) == 1
        with pytest.warns(UserWarning, match="mine"):
            warnings.warn("mine", stacklevel=1)
    finally:
        warnings.showwarning = show


@pytest.mark.gpu
def test_waits_are_noted_and_other_warnings_passed_on() -> None:
    x = torch.ones(3, device="cuda")
    with pytest.warns(UserWarning, match="mine") as passed, capture.noting_waits(x.device) as waits:
        x.sum().item()
        warnings.warn("mine", stacklevel=1)
    assert len(passed) == 1 and len(set(waits)) == 1 and waits[0].startswith("test_capture.py:")
    assert torch.cuda.get_sync_debug_mode() == 0
    with capture.noting_waits(x.device) as waits:
        x.sum()
        torch.ones(3).pin_memory().to("cuda", non_blocking=True)
    assert waits == []
