"""Which rows of a layer's input are tokens that count, and which sample each belongs to."""

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
        masked: Whether `counted` comes from the batch's mask; False where the rows are not its tokens.
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
        """Whether an input of `shape` is [T, B, K], by the mask's [B, T]; where T = B it is taken for [B, T, K]."""
        wanted = self._time_first
        return wanted is not None and len(shape) == 3 and shape[0] == wanted[0] and shape[1] == wanted[1]

    def map_for(self, rows: int, device: torch.device) -> TokenMap | None:
        """The map for a call that sees `rows` token vectors, or None if they cannot be assigned to the samples.

        As many rows as the mask has tokens: the mask, whatever the shape ([B, T, K], [B * T, K], [B, 1, T, K]).
        Otherwise any multiple of B: that many rows per sample, all counted (pooled vectors, image patches).
        """
        key = (rows, device)
        if key not in self._maps:
            _check_not_captured(rows, device)
            self._maps[key] = self._make(rows, device)
        return self._maps[key]

    def samples(self, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """For a call with `rows` token vectors that `map_for` assigns: [rows] int64 sample and [rows] bool counted.

        All rows, whatever `step`: routed layers put them in another order before they read every `step`-th.
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
        """Take over the mask of another batch of this shape, in the memory of the maps that are there.

        A captured forward goes on reading that memory. The mask this was made with must be nobody else's: it is
        overwritten.
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
    """A map is made on the host: a capture would keep the address of memory that is gone at the replay."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"a layer reads {rows} token vectors, which none did in the forward before the capture")
