"""The map from the rows of a layer's input to tokens that count and to samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from plop_ext.collecting.transfer import overwrite, to_device
from plop_ext.ops import rows_read


@dataclass(frozen=True, eq=False)
class TokenMap:
    """Rows of one layer call, as `ops.gain_totals_` takes them.

    Attributes:
        counted: [R] bool, on the layer's device.
        offsets: [B + 1] int64, on the layer's device.
        rows: R, the number of rows read.
        step: Distance between the rows read.
        phase: The first row read.
        masked: Whether `counted` comes from the mask of the batch; False if the rows are not the tokens of the mask.
    """

    counted: Tensor
    offsets: Tensor
    rows: int
    step: int
    phase: int
    masked: bool


class BatchTokens:
    """Token maps of one batch, made once per number of rows and device.

    Args:
        batch_size: B, samples in the batch.
        mask: [B, T] bool, True where a token counts; None counts every token.
        step: Distance between the rows read, as for `ops.row_sumsq_`.
        phase: First row read.
    """

    def __init__(self, batch_size: int, mask: Tensor | None, step: int = 1, phase: int = 0) -> None:
        self.batch_size = batch_size
        self.step = step
        self.phase = phase
        shape = () if mask is None else tuple(mask.shape)
        self._time_first = shape[::-1] if len(shape) == 2 and shape[0] != shape[1] else None  # (T, B)
        self._mask = None if mask is None else mask.detach().reshape(-1).to(torch.bool)
        self._maps: dict[tuple[int, torch.device], TokenMap | None] = {}
        self._samples: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def time_first(self, shape: torch.Size) -> bool:
        """Return whether an input of `shape` is [T, B, K], by the mask's [B, T]; if T = B, assume [B, T, K]."""
        wanted = self._time_first
        return wanted is not None and len(shape) == 3 and shape[0] == wanted[0] and shape[1] == wanted[1]

    def map_for(self, rows: int, device: torch.device) -> TokenMap | None:
        """Return the map for a call that sees `rows` token vectors, or None if they cannot be assigned to the samples.

        If there are as many rows as tokens in the mask, the mask applies, for every shape ([B, T, K], [B * T, K],
        [B, 1, T, K]). Otherwise, a multiple of B is divided evenly among the samples, and all rows count (pooled
        vectors, image patches).
        """
        key = (rows, device)
        if key not in self._maps:
            _check_not_captured(rows, device)
            self._maps[key] = self._make(rows, device)
        return self._maps[key]

    def samples(self, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return [rows] int64 sample and [rows] bool counted, for `rows` token vectors that `map_for` assigns.

        Both cover all rows, for every `step`, because routed layers reorder the rows before every `step`-th is read.
        """
        key = (rows, device)
        if key not in self._samples:
            _check_not_captured(rows, device)
            counted = self._mask if self._mask is not None and rows == self._mask.numel() else None
            samples = torch.arange(rows) // max(1, rows // self.batch_size)
            if counted is None:
                counted = torch.ones(rows, dtype=torch.bool)
            self._samples[key] = to_device(samples, device), to_device(counted, device)
        return self._samples[key]

    def refill(self, mask: Tensor | None) -> None:
        """Copy the mask of another batch of this shape to the memory of the existing maps, which a graph reads.

        It overwrites the mask that was passed to the constructor, which no other code may use.
        """
        if mask is None or self._mask is None:
            return
        self._mask = mask.detach().reshape(-1).to(torch.bool)
        for token_map in self._maps.values():
            if token_map is not None and token_map.masked:
                overwrite(token_map.counted, self._mask[self.phase :: self.step].contiguous())
        for (rows, _), (_, counted) in self._samples.items():
            if rows == self._mask.numel():
                overwrite(counted, self._mask)

    def _make(self, rows: int, device: torch.device) -> TokenMap | None:
        masked = self._mask is not None and rows == self._mask.numel()
        if not masked and rows % self.batch_size:
            return None
        counted = self._mask if masked and self._mask is not None else torch.ones(rows, dtype=torch.bool)
        starts = torch.arange(self.batch_size + 1) * (rows // self.batch_size)
        # Row i is the ((i - phase) / step)-th row read: a sample starts at the first one read that is not before it.
        offsets = ((starts - self.phase + self.step - 1) // self.step).clamp_(min=0)
        counted = counted[self.phase :: self.step].contiguous()
        read = rows_read(rows, self.step, self.phase)
        return TokenMap(to_device(counted, device), to_device(offsets, device), read, self.step, self.phase, masked)


def _check_not_captured(rows: int, device: torch.device) -> None:
    """Refuse to make a map in a capture: it is made on the host, in memory that is freed before the replay."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"a layer reads {rows} token vectors; in the forward before the capture, no layer did")
