"""Where the samples of a packed batch start, by each field that may say so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from plop_ext.errors import InputError
from plop_ext.streams.packed import packed_starts


def found(valid: list[list[int]], **fields: Any) -> tuple[list[int] | None, list[list[int]]]:
    tensors = {name: torch.tensor(value) for name, value in fields.items()}
    starts, tokens = packed_starts(tensors, torch.tensor(valid).bool())
    return None if starts is None else starts.tolist(), tokens.int().tolist()


ONES = [[1] * 6]


@pytest.mark.parametrize(
    "fields",
    [
        {"cu_seq_lens_q": [0, 2, 6]},
        {"seq_idx": [[0, 0, 1, 1, 1, 1]]},
        {"attention_mask": [[1, 1, 2, 2, 2, 2]]},
        {"position_ids": [[0, 1, 0, 1, 2, 3]]},
        {"position_ids": [[[0, 1, 0, 1, 2, 3]]] * 4},
    ],
    ids=["lengths", "numbers", "segments", "positions", "positions before M-RoPE"],
)
def test_each_field_tells_where_samples_start(fields: dict[str, Any]) -> None:
    assert found(ONES, **fields) == ([0, 2, 6], ONES)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"position_ids": [[0, 1, 2, 3, 4, 5]]},
        {"position_ids": [[2, 3, 4, 5, 6, 7]]},
        {"position_ids": [[[0, 1, 0, 1, 2, 3]]] * 3},
        {"position_ids": [0, 1, 0, 1, 2, 3]},
        {"seq_idx": [[3] * 6]},
        {"attention_mask": [[1, 1, 1, 1, 1, 1]]},
    ],
    ids=["nothing", "one sample", "an offset", "M-RoPE", "one dimension", "one number", "ones"],
)
def test_rows_of_one_sample(fields: dict[str, Any]) -> None:
    assert found(ONES, **fields) == (None, ONES)


def test_several_rows_hold_several_samples_each() -> None:
    positions = [[0, 1, 0, 1], [0, 1, 2, 3], [0, 0, 1, 2]]
    assert found([[1] * 4] * 3, position_ids=positions)[0] == [0, 2, 4, 8, 9, 12]


def test_positions_of_padding_start_no_sample() -> None:
    left = [[0, 0, 1, 1, 1, 1]]
    assert found(left, position_ids=[[1, 1, 0, 1, 2, 3]], attention_mask=left) == (None, left)
    right = [[1, 1, 1, 1, 0, 0]]
    assert found(right, position_ids=[[0, 1, 0, 1, 0, 0]], attention_mask=right) == ([0, 2, 6], right)


def test_zeros_at_the_end_without_a_mask_are_padding() -> None:
    assert found(ONES, position_ids=[[0, 1, 0, 1, 0, 0]]) == ([0, 2, 6], [[1, 1, 1, 1, 0, 0]])
    labels = [[7, 7, 7, 7, 7, -100]]
    assert found(ONES, position_ids=[[0, 1, 0, 1, 2, 0]], labels=labels) == ([0, 2, 6], [[1, 1, 1, 1, 1, 0]])
    # A sample of one token has a label, or cannot be told from padding if another zero stands before it.
    assert found(ONES, position_ids=[[0, 1, 0, 1, 2, 0]]) == ([0, 2, 5, 6], ONES)
    labels = [[7, 7, 7, 7, 7, 7]]
    assert found(ONES, position_ids=[[0, 1, 0, 1, 0, 0]], labels=labels) == ([0, 2, 4, 5, 6], ONES)


def test_a_row_of_padding_is_a_sample_without_tokens() -> None:
    mask = [[1, 1, 1], [0, 0, 0]]
    assert found(mask, position_ids=[[0, 0, 1], [0, 0, 0]], attention_mask=mask)[0] == [0, 1, 3, 6]


@pytest.mark.parametrize("lengths", [[1, 6], [0, 7], [0, 4, 4, 6], [0]])
def test_lengths_that_do_not_fit_the_batch_are_refused(lengths: list[int]) -> None:
    with pytest.raises(InputError, match=r"`cu_seq_lens_q` in a batch must ascend from 0 to at most 6"):
        found(ONES, cu_seq_lens_q=lengths)


@pytest.mark.parametrize("mask", [[[2, 2, 1, 1]], [[-1, 1, 2, 2]], [[0.5, 2.0, 2.0, 2.0]]], ids=str)
def test_a_mask_that_is_neither_ones_nor_segments_is_refused(mask: list[list[float]]) -> None:
    values: Tensor = torch.tensor(mask)
    with pytest.raises(InputError, match="`attention_mask` in a batch must be 0 or 1, or number the samples"):
        packed_starts({"attention_mask": values}, values.bool())


@pytest.mark.parametrize(
    "fields",
    [
        {"cu_seq_lens_q": [0, 2, 4, 5, 6]},
        {"seq_idx": [[0, 0, 1, 1, 2, 3]]},
        {"position_ids": [[0, 1, 0, 1, 0, 0]]},
        {"cu_seq_lens_q": [0, 2, 4, 5, 6], "seq_idx": [[0, 0, 1, 1, 2, 3]], "position_ids": [[0, 1, 0, 1, 0, 0]]},
    ],
    ids=["lengths", "numbers", "positions", "as TRL pads"],
)
def test_padding_of_a_packed_row_is_no_sample_and_does_not_count(fields: dict[str, Any]) -> None:
    expected = ([0, 2, 6], [[1, 1, 1, 1, 0, 0]])
    assert found(ONES, **fields) == expected
    assert found(ONES, **fields, labels=[[-100, 7, -100, 7, -100, -100]]) == expected
    assert found(ONES, **fields, labels=[[-100, 7, -100, 7, 7, 7]])[1] == ONES
