"""Padded batches of encoded samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from plop_ext.data import Encoded, batches, encode, load_rows
from plop_ext.errors import InputError
from tests.support.tiny_lm import BOS, PAD, byte_tokenizer, ids

SAMPLES = [
    Encoded(input_ids=[5], labels=[5]),
    Encoded(input_ids=[6, 7, 8], labels=[-100, 7, 8]),
    Encoded(input_ids=[9, 9], labels=[9, 9]),
]


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


class TestBatches:
    def test_padding_is_exact(self) -> None:
        loader = batches(SAMPLES, batch_size=2, pad_token_id=PAD)
        assert len(loader) == 2
        first, second = loader
        assert first["sample_ids"].tolist() == [1, 2]
        assert first["input_ids"].tolist() == [[6, 7, 8], [9, 9, PAD]]
        assert first["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
        assert first["labels"].tolist() == [[-100, 7, 8], [9, 9, -100]]
        assert second["input_ids"].tolist() == [[5]] and second["sample_ids"].tolist() == [0]
        assert all(value.dtype == torch.int64 for value in first.values())

    def test_padding_to_a_multiple(self) -> None:
        loader = batches(SAMPLES, batch_size=2, pad_token_id=PAD, pad_to_multiple_of=4)
        for batches_ in (loader, loader.in_random_order(0)):
            assert [batch["input_ids"].shape[1] for batch in batches_] == [4, 4]
        first = next(iter(loader))
        assert first["input_ids"].tolist() == [[6, 7, 8, PAD], [9, 9, PAD, PAD]]
        assert first["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
        assert first["labels"].tolist() == [[-100, 7, 8, -100], [9, 9, -100, -100]]
        exact = batches([Encoded(input_ids=[5] * 8, labels=[5] * 8)], pad_token_id=PAD, pad_to_multiple_of=4)
        assert next(iter(exact))["input_ids"].shape == (1, 8)

    @pytest.mark.parametrize("sort", [True, False])
    def test_every_sample_once_and_the_same_again(self, sort: bool) -> None:
        samples = [Encoded(input_ids=[1] * n, labels=[1] * n) for n in (3, 1, 4, 1, 5, 9, 2, 6)]
        loader = batches(samples, batch_size=3, pad_token_id=PAD, sort=sort)
        order = [index for batch in loader for index in batch["sample_ids"].tolist()]
        assert sorted(order) == list(range(8))
        assert order == ([5, 7, 4, 2, 0, 6, 1, 3] if sort else list(range(8)))
        assert order == [index for batch in loader for index in batch["sample_ids"].tolist()]

    def test_bad_arguments(self) -> None:
        with pytest.raises(InputError, match="`encoded` is empty"):
            batches([], pad_token_id=PAD)
        with pytest.raises(InputError, match="`batch_size` must be at least 1, got 0"):
            batches(SAMPLES, batch_size=0, pad_token_id=PAD)
        with pytest.raises(InputError, match="`pad_to_multiple_of` must be at least 1, got 0"):
            batches(SAMPLES, pad_token_id=PAD, pad_to_multiple_of=0)
        with pytest.raises(InputError, match="`pad_to_multiple_of` must be at most 4096, got 100000"):
            batches(SAMPLES, pad_token_id=PAD, pad_to_multiple_of=100_000)
        with pytest.raises(InputError, match="`pad_token_id` is None; give an id"):
            batches(SAMPLES, pad_token_id=None)


def test_rows_of_a_file_reach_a_batch(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in ("abc", "d")))
    tokenizer = byte_tokenizer()
    [batch] = batches(encode(load_rows(path), tokenizer), pad_token_id=tokenizer.pad_token_id)
    assert batch["input_ids"].tolist() == [[BOS, *ids(tokenizer, "abc")], [BOS, *ids(tokenizer, "d"), PAD, PAD]]


def test_sample_ids_are_the_numbers_of_the_rows_in_the_data_set(tmp_path: Path) -> None:
    path = tmp_path / "d.txt"
    path.write_text("\n".join("abcdefghij"))
    tokenizer = byte_tokenizer()
    rows = load_rows(str(path), max_samples=4, seed=1)
    assert rows.numbers != list(range(4)) and [row["text"] for row in rows] == ["abcdefghij"[i] for i in rows.numbers]
    samples = encode(rows, tokenizer)
    [batch] = batches(samples, pad_token_id=0, sort=False)
    assert batch["sample_ids"].tolist() == rows.numbers
    # The first was dropped; no other sample has its number.
    rows[0]["text"] = ""
    [batch] = batches(encode(rows, tokenizer), pad_token_id=0, sort=False)
    assert batch["sample_ids"].tolist() == rows.numbers[1:]
    shuffled = batches(samples, pad_token_id=0).in_random_order(3)
    assert sorted(next(iter(shuffled))["sample_ids"].tolist()) == rows.numbers
    # Two data sets in one list, whose rows have the same numbers.
    [batch] = batches(samples + samples, pad_token_id=0, sort=False)
    assert batch["sample_ids"].tolist() == list(range(8))
    [batch] = batches(encode(list(rows[1:]), tokenizer), pad_token_id=0, sort=False)
    assert batch["sample_ids"].tolist() == [0, 1, 2]
