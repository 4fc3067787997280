"""The layouts of rows that a stream allows, and the reasons why others cannot be told."""

from __future__ import annotations

import pytest
import torch

from plop_ext.streams.stream import Among, Equal, Items, Rows, Sequences, Stream, Untold

MASK = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()


def layout(stream: Stream, rows: int) -> tuple[list[int], list[bool] | None]:
    found = stream.rows(rows)
    assert isinstance(found, Rows), found
    assert found.starts.dtype == torch.int64 and found.starts.device.type == "cpu"
    return found.starts.tolist(), None if found.counted is None else found.counted.tolist()


def test_the_tokens_of_a_sequence_have_its_mask() -> None:
    assert layout(Sequences((2, 3), MASK), 6) == ([0, 3, 6], MASK.flatten().tolist())
    assert layout(Sequences((2, 3)), 6) == ([0, 3, 6], None)


def test_pooled_and_learned_rows_count_for_every_sample() -> None:
    stream = Sequences((2, 3), MASK, latents={5})
    assert layout(stream, 2) == ([0, 1, 2], None) and layout(stream, 10) == ([0, 5, 10], None)


def test_learned_rows_as_many_as_tokens_can_be_told_only_without_padding() -> None:
    assert layout(Sequences((2, 3), torch.ones(2, 3).bool(), latents={3}), 6)[0] == [0, 3, 6]
    assert Sequences((2, 3), MASK, latents={3}).rows(6) == "may be tokens or learned rows"


def test_rows_made_of_tokens_can_be_told_only_without_padding() -> None:
    assert layout(Sequences((2, 4)), 4) == ([0, 2, 4], None)
    assert layout(Sequences((2, 4), torch.ones(2, 4).bool()), 4) == ([0, 2, 4], None)
    assert Sequences((2, 3), MASK).rows(4) == "are not the 6 tokens of the batch, of which some are masked"
    assert Sequences((2, 3), MASK).rows(7) == "cannot be assigned to 2 samples"


def test_rows_beside_the_tokens_count_by_their_layout() -> None:
    beside = torch.nn.functional.pad(MASK, (2, 0))
    assert layout(Sequences((2, 3), MASK, layouts=(beside,)), 10) == ([0, 5, 10], beside.flatten().tolist())


def test_packed_samples_have_their_own_starts_and_only_their_tokens() -> None:
    stream = Sequences((1, 6), None, packed=torch.tensor([0, 2, 6]))
    assert stream.samples == 2 and layout(stream, 6) == ([0, 2, 6], None)
    assert stream.rows(1) == stream.rows(12) == "are not the 6 tokens of the packed batch"


@pytest.mark.parametrize(
    ("shape", "expected"), [((5, 3, 8), True), ((3, 5, 8), False), ((15, 8), False), ((1, 5, 3, 8), False)]
)
def test_time_first_is_told_from_the_shape(shape: tuple[int, ...], expected: bool) -> None:
    assert Sequences((3, 5)).time_first(torch.Size(shape)) is expected
    assert not Sequences((4, 4)).time_first(torch.Size((4, 4, 8)))


@pytest.mark.parametrize(("extents", "own"), [((4, 3), "[:, None, :]"), ((3, 4), "[:, :, None]")])
def test_the_heads_of_a_token_count_as_it_does(extents: tuple[int, int], own: str) -> None:
    expected = {"[:, None, :]": MASK[:, None, :], "[:, :, None]": MASK[:, :, None]}[own].expand(2, *extents)
    found = Sequences((2, 3), MASK).rows(24, extents)
    assert isinstance(found, Rows) and found.counted is not None
    assert found.starts.tolist() == [0, 12, 24] and torch.equal(found.counted, expected.flatten())
    items = Items("clips", torch.tensor([2, 0]), flags=(MASK,), padded=True).rows(24, extents)
    assert isinstance(items, Rows) and items.counted is not None
    assert items.starts.tolist() == [0, 24, 24] and torch.equal(items.counted, expected.flatten())


@pytest.mark.parametrize("extents", [(3, 3), (2, 4), (9,)])
def test_heads_as_many_as_tokens_cannot_be_told(extents: tuple[int, ...]) -> None:
    rows = 2 * torch.Size(extents).numel()
    assert isinstance(Sequences((2, 3), MASK).rows(rows, extents), str)


def test_samples_of_equal_shares() -> None:
    assert layout(Equal(3), 12) == ([0, 4, 8, 12], None) and layout(Equal(3), 0) == ([0] * 4, None)
    assert Equal(3).rows(4) == "cannot be assigned to 3 samples"


COUNT = torch.tensor([2, 0, 1])


def test_items_of_one_size_are_shared_out_by_their_number() -> None:
    stream = Items("images", COUNT)
    assert layout(stream, 12) == ([0, 8, 8, 12], None) and layout(stream, 3) == ([0, 2, 2, 3], None)
    assert stream.rows(4) == "do not fit the 3 images of the batch"


def test_items_of_known_sizes_may_be_merged_or_get_a_class_token() -> None:
    stream = Items("images", COUNT, sizes=torch.tensor([24, 0, 8]))
    assert layout(stream, 32) == ([0, 24, 24, 32], None)
    assert layout(stream, 8) == ([0, 6, 6, 8], None)
    assert layout(stream, 35) == ([0, 26, 26, 35], None)
    assert layout(stream, 3) == ([0, 2, 2, 3], None)
    assert stream.rows(33) == "do not fit the 3 images of the batch"


def test_padded_items_count_by_their_flags_or_without_their_padding() -> None:
    flags = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]]).bool()
    stream = Items("clips", COUNT, flags=(flags,), padded=True, latents={4})
    assert layout(stream, 9) == ([0, 6, 6, 9], flags.flatten().tolist())
    assert layout(stream, 6) == ([0, 3, 3, 6], None)
    assert layout(stream, 12) == ([0, 8, 8, 12], None)
    assert stream.rows(15) == "do not fit the 3 clips of the batch"


def test_a_batch_without_items_has_no_rows() -> None:
    stream = Items("images", torch.zeros(2, dtype=torch.int64))
    assert layout(stream, 0) == ([0, 0, 0], None) and stream.rows(4) == "come from no images of the batch"


def test_one_of_several_streams_must_be_the_only_one_that_fits() -> None:
    other = Sequences((2, 3), ~MASK)
    assert layout(Among([Sequences((2, 3), MASK), Untold("why")]), 6) == ([0, 3, 6], MASK.flatten().tolist())
    assert layout(Among([Sequences((2, 3)), Sequences((2, 3), torch.ones(2, 3).bool())]), 6) == ([0, 3, 6], None)
    reason = "fit several streams of the model with other samples or other padding"
    assert Among([Sequences((2, 3), MASK), other]).rows(6) == reason
    assert Among([Sequences((2, 3)), Sequences((1, 6), packed=torch.tensor([0, 2, 6]))]).rows(6) == reason
    assert Among([Untold("why"), Untold("and why")]).rows(6) == "why"


def test_the_stream_with_exactly_as_many_rows_comes_before_those_that_would_add_some() -> None:
    images = Items("images", torch.tensor([1, 1]), sizes=torch.tensor([16, 32]))
    videos = Items("videos", torch.tensor([1, 1]), sizes=torch.tensor([32, 32]))
    assert layout(Among([images, videos]), 64) == ([0, 32, 64], None)
    assert layout(Among([videos, images]), 48) == ([0, 16, 48], None)
