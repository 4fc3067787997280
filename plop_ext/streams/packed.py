"""Samples packed into one row of a batch, as by TRL's packing and padding-free collators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor

from plop_ext.errors import InputError

_LENGTHS = ("cu_seq_lens_q", "cu_seqlens", "cu_seqlens_q")


def packed_starts(fields: Mapping[str, Any], valid: Tensor) -> tuple[Tensor | None, Tensor]:
    """Return where the samples of a packed batch start, and its tokens without padding.

    A sample starts where `cu_seq_lens_q` says, or else where `seq_idx` or the segment number in `attention_mask`
    changes, or else where `position_ids` restart at 0. Collators that pad a packed row give each token of its padding
    a sample of its own: without a mask, samples of one token at the end of a row are padding.

    Args:
        fields: The batch.
        valid: [B, T] bool, tokens that are no padding.

    Returns:
        [S + 1] int64 on the CPU, starts in the flattened [B * T], or None if every row is one sample; and `valid`
        without the padding that only these fields show.

    Raises:
        InputError: If the lengths do not fit the batch.
    """
    size, length = valid.shape
    if size == 0 or length == 0:
        return None, valid
    mask = fields.get("attention_mask")
    for name in _LENGTHS:
        if isinstance(lengths := fields.get(name), Tensor):
            starts = _of_lengths(name, lengths, size * length)
            if mask is None:
                begins = torch.zeros(size * length, dtype=torch.bool)
                begins[starts[:-1]] = True
                padding = _padding(begins.view(size, length), fields.get("labels"))
                valid = valid & ~padding.to(valid.device)
                starts = torch.cat((starts[:-1][~padding.view(-1)[starts[:-1]]], starts[-1:]))
            return starts, valid
    number = fields.get("seq_idx")
    positions = fields.get("position_ids")
    if isinstance(number, Tensor) and number.shape == valid.shape:
        begins = _changes(number)
        if mask is None:
            valid = valid & ~_padding(begins, fields.get("labels")).to(valid.device)
        begins = begins & valid
    elif numbers_segments(mask):
        begins = _changes(_segments(mask)) & valid
    elif isinstance(positions, Tensor):
        positions = positions[0] if positions.dim() == 3 and len(positions) == 4 else positions  # text before M-RoPE
        if positions.dim() != 2 or positions.shape[1] != length or size % len(positions):
            return None, valid
        restarts = (positions == 0).expand(size, length)
        if mask is None:
            valid = valid & ~_padding(restarts, fields.get("labels"))
        begins = restarts & valid
    else:
        return None, valid
    # The first token of a row starts a sample, whatever its position; a row without tokens is one sample.
    first = valid & (valid.cumsum(dim=1) == 1)
    begins = begins | first
    begins[:, 0] |= ~valid.any(dim=1)
    if int(begins.sum()) == size:
        return None, valid
    starts = begins.reshape(-1).nonzero().reshape(-1).cpu()
    return torch.cat((starts, starts.new_tensor([size * length]))), valid


def numbers_segments(mask: Any) -> TypeGuard[Tensor]:
    """Return whether a mask numbers the samples packed into a row, instead of marking padding by 0."""
    return isinstance(mask, Tensor) and mask.dim() == 2 and mask.dtype != torch.bool and bool((mask > 1).any())


def _of_lengths(name: str, lengths: Tensor, tokens: int) -> Tensor:
    starts = lengths.reshape(-1).to("cpu", torch.int64)
    if len(starts) < 2 or starts[0] != 0 or starts[-1] > tokens or (starts.diff() <= 0).any():
        raise InputError(
            f"`{name}` in a batch must ascend from 0 to at most {tokens}, its number of tokens, got {starts.tolist()}"
        )
    return starts


def _segments(mask: Tensor) -> Tensor:
    """Return a mask of segment numbers as it is, if its segments can be told from each other."""
    inside = (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
    if mask.dtype.is_floating_point or bool((mask < 0).any()) or bool((inside & (mask.diff(dim=1) < 0)).any()):
        raise InputError(
            "`attention_mask` in a batch must be 0 or 1, or number the samples packed into a row in ascending order"
        )
    return mask


def _changes(numbers: Tensor) -> Tensor:
    """Return [B, T] bool: where the number differs from the one before."""
    before = torch.nn.functional.pad(numbers, (1, 0), value=-2)[:, :-1]
    return numbers != before


def _padding(restarts: Tensor, labels: Any) -> Tensor:
    """Return [B, T] bool: the end of rows in which every token starts a sample, as collators number their padding.

    A single start at the end may be a sample of one token; it is padding if its label is -100.
    """
    end = restarts.flip(1).long().cumprod(dim=1).flip(1).bool()
    many = end.sum(dim=1, keepdim=True) > 1
    unlabelled = torch.zeros_like(end)
    if isinstance(labels, Tensor) and labels.shape == end.shape:
        unlabelled = (labels == -100).to(end.device)
        many = many & (unlabelled | ~end).all(dim=1, keepdim=True)
    return end & (many | unlabelled) & ~end.all(dim=1, keepdim=True)
