"""The streams that the tensors of a batch tell."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from plop_ext.errors import InputError
from plop_ext.streams.batch import BatchStreams, StreamReader
from plop_ext.streams.stream import Rows
from tests.support.stream_cases import CASES
from tests.support.tiny_lm import tiny_llama


def read(name: str, batch: Any, mask: str = "attention") -> BatchStreams:
    model = nn.Linear(1, 1) if name == "plain" else CASES[name].build()
    return StreamReader(model, mask).read(batch)


def counted(streams: BatchStreams, stream: str, rows: int) -> list[bool] | None:
    found = streams.rows(stream, False, rows)
    assert isinstance(found, Rows), found
    return None if found.counted is None else found.counted.tolist()


ENCODER = {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])}
IDS = torch.tensor([[0, 7, 7, 0], [0, 7, 0, 0]])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"decoder_input_ids": IDS}, [1, 1, 1, 0, 1, 1, 0, 0]),
        ({"decoder_input_ids": torch.zeros(2, 4)}, [1, 0, 0, 0, 1, 0, 0, 0]),
        ({"decoder_input_ids": IDS, "decoder_attention_mask": (IDS != 7).long()}, [1, 0, 0, 1, 1, 0, 1, 1]),
        ({"labels": torch.where(IDS == 7, 7, -100)}, [0, 1, 1, 0, 0, 1, 0, 0]),
        ({"decoder_input_ids": IDS, "labels": torch.full((2, 4), -100)}, [1, 1, 1, 0, 1, 1, 0, 0]),
    ],
    ids=["ids", "ids of padding", "own mask", "labels", "ids before labels"],
)
def test_what_counts_in_a_decoder(fields: dict[str, Any], expected: list[int]) -> None:
    streams = read("t5", ENCODER | fields)
    assert counted(streams, "decoder", 8) == list(map(bool, expected))
    assert counted(streams, "encoder", 6) == [True, True, True, True, False, False]


def test_a_decoder_without_inputs_reads_the_encoders_tokens() -> None:
    assert counted(read("bart", ENCODER), "decoder", 6) == [True, True, True, True, False, False]


def test_a_completion_is_of_the_decoder_only() -> None:
    streams = read("t5", ENCODER | {"decoder_input_ids": IDS, "labels": torch.where(IDS == 7, 7, -100)}, "completion")
    assert counted(streams, "decoder", 8) == [False, True, True, False, False, True, False, False]
    assert counted(streams, "encoder", 6) == [True, True, True, True, False, False]
    for labels, message in ((None, "needs `labels` in every batch"), (torch.ones(2, 3), r"decoder token, \[2, 4\]")):
        with pytest.raises(InputError, match=message):
            read("t5", ENCODER | {"decoder_input_ids": IDS, "labels": labels}, "completion")


def test_all_counts_padding_in_every_stream() -> None:
    streams = read("t5", ENCODER | {"decoder_input_ids": IDS}, "all")
    assert counted(streams, "decoder", 8) is counted(streams, "encoder", 6) is None


def test_keys_of_cross_attention_are_the_encoders_for_all_lengths() -> None:
    streams = read("t5", ENCODER | {"decoder_input_ids": IDS[:, :3]})
    fed = streams.rows("decoder", True, 6)
    assert isinstance(fed, Rows) and fed.counted is not None
    assert fed.counted.tolist() == counted(streams, "encoder", 6) != counted(streams, "decoder", 6)


def test_a_mask_may_cover_a_cache_before_the_tokens() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    streams = read("packed", {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": mask})
    assert counted(streams, "text", 6) == [True, True, True, True, True, False]


def test_packed_sequences_are_samples() -> None:
    streams = read("packed", CASES["packed"].batch())
    rows = streams.rows("text", False, 20)
    assert streams.samples == 3 and isinstance(rows, Rows) and rows.starts.tolist() == [0, 11, 17, 20]


def test_a_batch_without_known_fields_has_equal_shares() -> None:
    for batch in (torch.ones(3, 5, 2), (torch.ones(3, 5),), {"x": torch.ones(3, 5)}):
        rows = read("plain", batch).rows("text", False, 15)
        assert isinstance(rows, Rows) and rows.starts.tolist() == [0, 5, 10, 15] and rows.counted is None


def test_rows_of_a_stream_that_the_batch_does_not_hold_are_untold() -> None:
    text = {"input_ids": torch.ones(2, 3, dtype=torch.long)}
    reason = read("llava", text).rows("vision", False, 8)
    assert reason == "are of the vision stream, which no field of the batch describes"


def test_images_that_no_placeholder_assigns_are_untold() -> None:
    text = {"input_ids": torch.ones(2, 3, dtype=torch.long), "pixel_values": torch.ones(3, 3, 16, 16)}
    assert read("llava", text).rows("vision", False, 12) == "come from 3 images that cannot be assigned to 2 samples"


class TestBatchesOfTrainers:
    """Fields as the collators of trainers name them."""

    @staticmethod
    def counted(fields: dict[str, Any], mask: str) -> list[int]:
        rows = StreamReader(tiny_llama(), mask).read(fields).rows("text", False, 8)
        assert isinstance(rows, Rows)
        return [] if rows.counted is None else rows.counted.int().tolist()

    def test_a_mask_of_completions_stands_for_labels(self) -> None:
        attention = torch.tensor([[1] * 4, [1, 1, 1, 0]])
        fields = {"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": attention}
        marks = {"completion_mask": torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0]])}
        assert self.counted(fields | marks, "completion") == [0, 0, 1, 1, 0, 1, 1, 0]
        assert self.counted(fields | marks, "attention") == [1, 1, 1, 1, 1, 1, 1, 0]

    def test_labels_suffice_beside_a_mask_of_four_dimensions(self) -> None:
        fields = {"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": torch.ones(2, 1, 4, 4)}
        labels = {"labels": torch.tensor([[-100, 5, 5, 5], [-100, -100, 5, -100]])}
        assert self.counted(fields | labels, "completion") == [0, 1, 1, 1, 0, 0, 1, 0]
        with pytest.raises(InputError, match=r"must be \[B, T\], got \[2, 1, 4, 4\]; pass mask='all', or mask='comp"):
            self.counted(fields | labels, "attention")

    def test_numbered_segments_are_refused_where_attention_ignores_them(self) -> None:
        fields = {"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": torch.tensor([[1, 1, 2, 2]] * 2)}
        with pytest.raises(InputError, match="samples would attend to each other; pass `position_ids`"):
            self.counted(fields, "attention")
        # A model of another kind may read the numbers.
        streams = StreamReader(torch.nn.Linear(2, 2), "attention").read(fields)
        assert streams.samples == 4

    def test_a_list_of_rows_is_no_batch(self) -> None:
        with pytest.raises(InputError, match=r"is a list of rows, .* `score_trainer`"):
            StreamReader(tiny_llama(), "attention").read([{"prompt": "a"}, {"prompt": "b"}])


def is_table(shape: tuple[int, ...], size: tuple[int, int], tables: tuple[int, ...] = ()) -> bool | str:
    """Of a model of text, in a batch of `size` (samples, tokens)."""
    mask = BatchStreams.of_mask(size[0], torch.ones(size))
    streams = BatchStreams(size[0], {}, mask.rest, tables)
    return streams.is_table("text", False, torch.Size(shape), torch.Size(shape[:-1]).numel())


def test_tables_of_relative_positions_are_no_tokens() -> None:
    assert is_table((1, 12, 8), (2, 6), (24,)) is True
    assert is_table((1, 8, 8), (2, 4), (12,)) is True  # of the positions that occur
    assert is_table((2, 6, 8), (2, 6), (12,)) is False
    assert isinstance(is_table((1, 12, 8), (1, 12), (12,)), str)


def test_a_single_sequence_may_be_a_table_unless_it_has_all_tokens() -> None:
    reason = "are one sequence for 2 samples, as of a table of positions or of a single sample"
    assert is_table((1, 8, 8), (2, 6)) == is_table((1, 2, 4, 8), (2, 6)) == reason
    assert is_table((1, 12, 8), (2, 6)) is is_table((1, 2, 6, 8), (2, 6)) is False
    assert is_table((1, 8, 8), (1, 6)) is is_table((8, 8), (2, 6)) is is_table((2, 4, 8), (2, 6)) is False


def test_rows_of_ids_per_codebook_are_one_sample() -> None:
    import transformers

    config = transformers.MusicgenDecoderConfig(
        vocab_size=16, hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=2, num_codebooks=3
    )
    reader = StreamReader(transformers.MusicgenForCausalLM(config), "attention")
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    ids = torch.ones(2 * 3, 4, dtype=torch.long)
    streams = reader.read({"input_ids": ids, "attention_mask": mask})
    assert streams.samples == 2 and counted(streams, "text", 8) == mask.bool().flatten().tolist()
    assert reader.read({"input_ids": ids}).samples == 2


def test_patches_of_zeros_are_padding_beside_a_mask_of_the_text() -> None:
    import transformers

    config = transformers.Pix2StructConfig()
    model = nn.Module()
    model.config, model.main_input_name = config, "flattened_patches"  # type: ignore[assignment]
    patches = torch.ones(2, 3, 5)
    patches[1, 2] = 0
    fields = {"flattened_patches": patches, "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    streams = StreamReader(model, "attention").read(fields)
    assert counted(streams, "vision", 6) == [True] * 5 + [False]
