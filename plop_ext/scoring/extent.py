"""The number of samples that a scoring run reads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from plop_ext import quantities
from plop_ext.arguments import check_whole, shown
from plop_ext.errors import InputError
from plop_ext.forwards.batch import length
from plop_ext.statistics import StopRule

# Upper limit on the samples if the stop rule decides.
DEFAULT_SAMPLES = 128


def extent(
    max_samples: int | str | None, stop: str | StopRule | None, compat: str | None
) -> tuple[int | None, StopRule | None]:
    """Return the maximum number of samples, and the rule for stopping earlier."""
    if not isinstance(max_samples, str):
        check_whole(max_samples=max_samples)
    elif max_samples != "auto":
        max_samples = quantities.count(max_samples, "max_samples")
    if not isinstance(stop, StopRule | None) and not (isinstance(stop, str) and stop in ("auto", "settled")):
        raise InputError(f"`stop` must be 'settled', a StopRule or None, got {shown(stop)}")
    if stop == "auto":
        # There are no such statistics for the unweighted means of batches of the published script.
        stop = "settled" if max_samples == "auto" and compat is None else None
    rule = StopRule() if stop == "settled" else stop
    assert not isinstance(rule, str) and not (isinstance(max_samples, str) and max_samples != "auto")
    if rule is not None and compat is not None:
        raise InputError("`stop` has no meaning with `compat`; leave one of the two out")
    return DEFAULT_SAMPLES if isinstance(max_samples, str) else max_samples, rule


def available_samples(dataloader: Iterable[Any], limit: int | None, batch: int) -> int | None:
    """Return the number of samples that would be read without a stop rule, or None; a smaller last batch counts fully.

    Args:
        dataloader: The data.
        limit: Most samples to read.
        batch: Samples in the first batch of the data.
    """
    known = getattr(dataloader, "samples", None)
    if known is None:
        batches = length(dataloader)
        known = None if batches is None else batches * batch
    bounds = [value for value in (known, limit) if value is not None]
    return min(bounds) if bounds else None
