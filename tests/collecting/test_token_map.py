"""Which rows count, and which sample owns them, against a row-by-row account."""

from __future__ import annotations

import pytest
import torch

from plop_ext.collecting.token_map import BatchTokens, TokenMap

CPU = torch.device("cpu")


def owners(token_map: TokenMap, samples: int) -> list[int]:
    """The sample of each row read, -1 for none."""
    found = [-1] * token_map.rows
    for sample in range(samples):
        for row in range(int(token_map.offsets[sample]), min(int(token_map.offsets[sample + 1]), token_map.rows)):
            found[row] = sample
    return found


@pytest.mark.parametrize("samples, tokens", [(1, 1), (1, 7), (3, 5), (4, 1), (5, 8)])
@pytest.mark.parametrize("step", [1, 2, 3, 8, 50])
def test_every_row_read_keeps_its_sample_and_its_mask(samples: int, tokens: int, step: int) -> None:
    mask = torch.rand(samples, tokens) < 0.6
    rows = samples * tokens
    for phase in range(step):
        token_map = BatchTokens(samples, mask, step, phase).map_for(rows, CPU)
        assert token_map is not None and token_map.masked
        read = [row for row in range(rows) if row >= phase and (row - phase) % step == 0]
        assert token_map.rows == len(read) == len(token_map.counted)
        assert owners(token_map, samples) == [row // tokens for row in read]
        assert token_map.counted.tolist() == [bool(mask[row // tokens, row % tokens]) for row in read]
        assert token_map.counted.is_contiguous() and token_map.offsets.dtype == torch.int64


@pytest.mark.parametrize("mask", [None, torch.zeros(3, 5)], ids=["no mask", "another length"])
@pytest.mark.parametrize("rows", [0, 3, 12])
def test_rows_that_are_not_the_masks_all_count(mask: torch.Tensor | None, rows: int) -> None:
    token_map = BatchTokens(3, mask).map_for(rows, CPU)
    assert token_map is not None and not token_map.masked and token_map.counted.all()
    assert owners(token_map, 3) == [row // (rows // 3) for row in range(rows)]


def test_rows_that_no_sample_owns() -> None:
    assert BatchTokens(3, torch.ones(3, 5)).map_for(16, CPU) is None
    assert BatchTokens(3, None).map_for(4, CPU) is None


def test_a_mask_whose_rows_are_not_a_multiple_of_the_batch_still_fits_its_own() -> None:
    token_map = BatchTokens(2, torch.ones(2, 4)).map_for(8, CPU)
    assert token_map is not None and owners(token_map, 2) == [0] * 4 + [1] * 4


def test_a_map_is_made_once() -> None:
    tokens = BatchTokens(3, torch.ones(3, 5))
    assert tokens.map_for(15, CPU) is tokens.map_for(15, CPU)
    assert tokens.map_for(15, CPU) is not tokens.map_for(30, CPU)


def test_masks_of_numbers_and_masks_that_need_gradients() -> None:
    for mask in (torch.tensor([[0, 1], [2, 0]]), torch.tensor([[0.0, 1.0], [0.5, 0.0]], requires_grad=True)):
        token_map = BatchTokens(2, mask).map_for(4, CPU)
        assert token_map is not None and token_map.counted.tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    "shape, expected",
    [((5, 3, 8), True), ((3, 5, 8), False), ((15, 8), False), ((5, 4, 8), False), ((1, 5, 3, 8), False)],
)
def test_time_first_is_told_from_the_masks_shape(shape: tuple[int, ...], expected: bool) -> None:
    assert BatchTokens(3, torch.ones(3, 5)).time_first(torch.Size(shape)) is expected
    assert not BatchTokens(3, None).time_first(torch.Size(shape))
    assert not BatchTokens(4, torch.ones(4, 4)).time_first(torch.Size((4, 4, 8)))


@pytest.mark.gpu
def test_maps_of_two_devices() -> None:
    tokens = BatchTokens(2, torch.tensor([[1, 0], [1, 1]]))
    here, there = tokens.map_for(4, CPU), tokens.map_for(4, torch.device("cuda", 0))
    assert here is not None and there is not None and there.counted.is_cuda and there.offsets.is_cuda
    assert here.counted.tolist() == there.counted.tolist() and here.offsets.tolist() == there.offsets.tolist()
