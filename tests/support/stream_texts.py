"""Batches of texts for models with one or two streams of rows, and each sample alone without padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.support.architecture_parts import VOCAB

Batch = dict[str, Any]
_LENGTHS = (11, 6, 3)
_DECODED = (4, 9, 7)


def ids(length: int, seed: int) -> Tensor:
    return torch.randint(5, VOCAB - 8, (length,), generator=torch.Generator().manual_seed(seed))


def padded(rows: list[Tensor], value: int = 0, to: int = 0, left: bool = False) -> Tensor:
    """[B, T] of rows of different lengths."""
    length = max(to, *(len(row) for row in rows))
    out = torch.full((len(rows), length), value, dtype=rows[0].dtype)
    for index, row in enumerate(rows):
        place = slice(length - len(row), None) if left else slice(len(row))
        out[index, place] = row
    return out


def masked(rows: list[Tensor], to: int = 0, left: bool = False) -> Tensor:
    return padded([torch.ones_like(row) for row in rows], to=to, left=left)


def texts_of() -> list[Tensor]:
    return [ids(length, seed) for seed, length in enumerate(_LENGTHS)]


def targets_of() -> list[Tensor]:
    return [ids(length, 9 + seed) for seed, length in enumerate(_DECODED)]


def translated(to: int = 0) -> Batch:
    """Encoder tokens with a mask, labels without; `to` pads both to one length, as `pad_to_multiple_of` does."""
    rows = texts_of()
    labels = padded(targets_of(), -100, to=to)
    return {"input_ids": padded(rows, to=to), "attention_mask": masked(rows, to=to), "labels": labels}


def translated_alone() -> list[Batch]:
    pairs = zip(texts_of(), targets_of(), strict=True)
    return [
        {"input_ids": text[None], "attention_mask": torch.ones_like(text[None]), "labels": target[None]}
        for text, target in pairs
    ]


def own_decoder_mask() -> Batch:
    rows, targets = texts_of(), targets_of()
    return {
        "input_ids": padded(rows, to=11),
        "attention_mask": masked(rows, to=11),
        "decoder_input_ids": padded(targets, to=11),
        "decoder_attention_mask": masked(targets, to=11),
    }


def own_decoder_mask_alone() -> list[Batch]:
    pairs = zip(texts_of(), targets_of(), strict=True)
    return [{"input_ids": text[None], "decoder_input_ids": target[None]} for text, target in pairs]


def packed(**extra: Callable[[list[Tensor]], Any]) -> Batch:
    """All samples in one row, with positions that start again at each."""
    rows = texts_of()
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    batch: Batch = {"input_ids": torch.cat(rows)[None], "position_ids": positions[None]}
    return batch | {name: make(rows) for name, make in extra.items()}


def text_alone() -> list[Batch]:
    return [{"input_ids": row[None]} for row in texts_of()]


def padded_text(left: bool = False) -> Batch:
    rows = texts_of()
    return {"input_ids": padded(rows, left=left), "attention_mask": masked(rows, left=left)}


def lengths(rows: list[Tensor]) -> Tensor:
    return torch.tensor([0, *(len(row) for row in rows)]).cumsum(0).int()


def numbers(rows: list[Tensor]) -> Tensor:
    return torch.cat([torch.full_like(row, index) for index, row in enumerate(rows)])[None]
