"""The queue of totals: in the order sent, whole or batch by batch, on the host."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from plop_ext.collecting.totals_queue import TotalsQueue


@pytest.fixture
def sent(device: torch.device) -> tuple[TotalsQueue, list[Tensor]]:
    """A queue, and the totals of three batches of other sizes that it was sent."""
    queue, totals = TotalsQueue(2), [torch.rand(2, size, 5, dtype=torch.float64) for size in (3, 1, 2)]
    for table in totals:
        queue.send(table.to(device))
    return queue, totals


def test_all_are_the_samples_as_sent(sent: tuple[TotalsQueue, list[Tensor]]) -> None:
    queue, totals = sent
    assert torch.equal(queue.all(), torch.cat(totals, dim=1)) and queue.all().device.type == "cpu"


def test_batches_can_be_had_in_any_order(sent: tuple[TotalsQueue, list[Tensor]]) -> None:
    queue, totals = sent
    assert all(torch.equal(queue.batch(number), totals[number]) for number in (1, 0, 2))
    assert torch.equal(queue.last(), totals[2])


def test_the_last_can_be_dropped(sent: tuple[TotalsQueue, list[Tensor]]) -> None:
    queue, totals = sent
    queue.drop_last()
    queue.send(totals[0])
    assert torch.equal(queue.all(), torch.cat([totals[0], totals[1], totals[0]], dim=1))


def test_nothing_sent_is_an_empty_table() -> None:
    assert TotalsQueue(2).all().shape == (2, 0, 5)
