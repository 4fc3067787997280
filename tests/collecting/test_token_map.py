"""Which rows count on a device, and which sample owns them, against a row-by-row account."""

from __future__ import annotations

import pytest
import torch

from plop_ext.collecting.token_map import BatchTokens, Reading, TokenMap
from plop_ext.streams.batch import BatchStreams

CPU = torch.device("cpu")


def tokens(samples: int, mask: torch.Tensor | None, step: int = 1, phase: int = 0) -> BatchTokens:
    return BatchTokens(BatchStreams.of_mask(samples, mask), step, phase)


def mapped(batch: BatchTokens, rows: int, **reading: int) -> TokenMap:
    found = batch.map_for(Reading("text", rows, **reading), CPU)
    assert isinstance(found, TokenMap), found
    return found


def owners(token_map: TokenMap, samples: int) -> list[int]:
    """The sample of each row read, -1 for none."""
    found = [-1] * token_map.rows
    for sample in range(samples):
        for row in range(int(token_map.offsets[sample]), min(int(token_map.offsets[sample + 1]), token_map.rows)):
            found[row] = sample
    return found


@pytest.mark.parametrize("samples, length", [(1, 1), (1, 7), (3, 5), (4, 1), (5, 8)])
@pytest.mark.parametrize("step", [1, 2, 3, 8, 50])
def test_every_row_read_keeps_its_sample_and_its_mask(samples: int, length: int, step: int) -> None:
    mask = torch.rand(samples, length) < 0.6
    rows = samples * length
    for phase in range(step):
        token_map = mapped(tokens(samples, mask, step, phase), rows)
        read = [row for row in range(rows) if row >= phase and (row - phase) % step == 0]
        assert token_map.rows == len(read) == len(token_map.counted)
        assert owners(token_map, samples) == [row // length for row in read]
        assert token_map.counted.tolist() == [bool(mask[row // length, row % length]) for row in read]
        assert token_map.counted.is_contiguous() and token_map.offsets.dtype == torch.int64


@pytest.mark.parametrize("step", [1, 3])
def test_rows_past_the_end_of_each_sequence_do_not_count(step: int) -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    token_map = mapped(tokens(2, mask, step), 10, sequences=2, after=2)
    counted = [True, True, False, False, False, True, True, True, False, False]
    assert token_map.counted.tolist() == counted[::step]
    assert owners(token_map, 2) == ([0] * 5 + [1] * 5)[::step]


def test_owners_cover_all_rows_for_every_step() -> None:
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    samples, counted = tokens(2, mask, step=4, phase=1).owners(Reading("text", 6), CPU)
    assert samples.tolist() == [0, 0, 0, 1, 1, 1] and counted.tolist() == mask.flatten().bool().tolist()


def test_a_map_is_made_once_and_the_reason_why_there_is_none_too() -> None:
    batch = tokens(3, torch.ones(3, 5))
    assert mapped(batch, 15) is mapped(batch, 15) is not mapped(batch, 30)
    assert batch.map_for(Reading("text", 16), CPU) == "cannot be assigned to 3 samples"


def test_the_layout_of_another_batch_replaces_values_in_place_and_never_the_callers() -> None:
    mask, other = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool(), torch.tensor([[1, 0, 0], [1, 1, 1]]).bool()
    batch = tokens(2, mask)
    token_map, (samples, counted) = mapped(batch, 6), batch.owners(Reading("text", 6), CPU)
    before = mask.clone()
    streams = BatchStreams.of_mask(2, other)
    assert batch.fits(streams)
    batch.refill(streams)
    assert token_map.counted.tolist() == counted.tolist() == other.flatten().tolist() and mask.equal(before)
    assert samples.tolist() == [0, 0, 0, 1, 1, 1]


def test_a_batch_that_assigns_other_rows_does_not_fit() -> None:
    padded = tokens(2, torch.tensor([[1, 1, 0], [1, 1, 1]]))
    assert isinstance(padded.map_for(Reading("text", 4), CPU), str)
    assert not padded.fits(BatchStreams.of_mask(2, torch.ones(2, 3))) and not padded.fits(
        BatchStreams.of_mask(3, None)
    )
    assert padded.fits(BatchStreams.of_mask(2, torch.tensor([[1, 0, 0], [1, 1, 1]])))


@pytest.mark.gpu
def test_maps_of_two_devices() -> None:
    batch = tokens(2, torch.tensor([[1, 0], [1, 1]]))
    here, there = (batch.map_for(Reading("text", 4), device) for device in (CPU, torch.device("cuda", 0)))
    assert isinstance(here, TokenMap) and isinstance(there, TokenMap)
    assert there.counted.is_cuda and there.offsets.is_cuda
    assert here.counted.tolist() == there.counted.tolist() and here.offsets.tolist() == there.offsets.tolist()
