"""The asynchronous transfer of the totals of batches from a device to the host."""

from __future__ import annotations

import torch
from torch import Tensor

from plop_ext.totals import TOTALS_FIELDS


class TotalsQueue:
    """Copies the totals of one batch after another to the host, and synchronizes only when they are read.

    Args:
        n_layers: M, rows of each table.
    """

    def __init__(self, n_layers: int) -> None:
        self._n_layers = n_layers
        self._arrived: list[Tensor] = []
        self._under_way: list[tuple[Tensor, torch.cuda.Event | None]] = []

    def send(self, totals: Tensor) -> None:
        """Add the totals [M, B, 5] of the next batch; the copy is enqueued on the current CUDA stream."""
        while self._under_way and _has_arrived(self._under_way[0][1]):
            self._receive()
        if totals.device.type == "cuda":
            host = torch.empty(totals.shape, dtype=torch.float64, pin_memory=True)
            host.copy_(totals, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(totals.device))
            self._under_way.append((host, event))
        else:
            self._under_way.append((totals.cpu(), None))

    def all(self) -> Tensor:
        """Return [M, S, 5] float64 of all batches, in their order. Synchronizes."""
        self._receive_all()
        if not self._arrived:
            return torch.zeros(self._n_layers, 0, len(TOTALS_FIELDS), dtype=torch.float64)
        return torch.cat(self._arrived, dim=1)

    def each(self) -> list[Tensor]:
        """Return [M, B, 5] float64 of each batch, in their order. Synchronizes."""
        self._receive_all()
        return list(self._arrived)

    def take(self, *, wait: bool) -> list[Tensor]:
        """Remove the oldest batches and return [M, B, 5] float64 of each, in their order.

        Args:
            wait: Take all batches, which synchronizes. Otherwise take those that have arrived.
        """
        while self._under_way and (wait or _has_arrived(self._under_way[0][1])):
            self._receive()
        taken, self._arrived = self._arrived, []
        return taken

    def batch(self, number: int) -> Tensor:
        """Return [M, B, 5] float64 of the `number`-th batch, from 0. Synchronizes with this batch only."""
        while len(self._arrived) <= number:
            self._receive()
        return self._arrived[number]

    def last(self) -> Tensor:
        """Return [M, B, 5] float64 of the batch sent last. Synchronizes."""
        self._receive_all()
        return self._arrived[-1]

    def drop_last(self) -> None:
        """Drop the batch sent last. Synchronizes."""
        self._receive_all()
        self._arrived.pop()

    def _receive_all(self) -> None:
        while self._under_way:
            self._receive()

    def _receive(self) -> None:
        host, event = self._under_way.pop(0)
        if event is not None:
            event.synchronize()
            host = host.clone()  # releases the pinned memory
        self._arrived.append(host)


def _has_arrived(event: torch.cuda.Event | None) -> bool:
    return event is None or event.query()
