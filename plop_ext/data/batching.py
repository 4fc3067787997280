"""Padded batches of encoded samples."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from plop_ext.arguments import USUAL_LENGTH, check_flags, check_whole
from plop_ext.data.encoding import Encoded, check_encoded
from plop_ext.data.formats import IGNORED
from plop_ext.errors import InputError


class Batches:
    """Batches of encoded samples, padded on the right; every iteration yields the same batches. See `batches`."""

    def __init__(
        self, encoded: Sequence[Encoded], batch_size: int, pad_token_id: int, sort: bool, pad_to_multiple_of: int
    ) -> None:
        self._encoded = encoded
        self._batch_size = batch_size
        self._pad_token_id = pad_token_id
        self._multiple = pad_to_multiple_of
        rows = [sample.get("row", index) for index, sample in enumerate(encoded)]
        # Samples of several data sets in one list may share row numbers: their positions identify them.
        self._ids = rows if len(set(rows)) == len(rows) else list(range(len(encoded)))
        order = range(len(encoded))
        self._order = sorted(order, key=lambda index: -len(encoded[index]["input_ids"])) if sort else list(order)

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(self._order)

    def in_random_order(self, seed: int) -> Batches:
        """Return the same samples in random order: those scored before an early stop must represent all."""
        shuffled = Batches(self._encoded, self._batch_size, self._pad_token_id, False, self._multiple)
        random.Random(seed).shuffle(shuffled._order)
        return shuffled

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self._order) // self._batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield the batches."""
        for start in range(0, len(self._order), self._batch_size):
            chosen = self._order[start : start + self._batch_size]
            batch = pad([self._encoded[index] for index in chosen], self._pad_token_id, self._multiple)
            batch["sample_ids"] = torch.tensor([self._ids[index] for index in chosen])
            yield batch


def batches(
    encoded: Sequence[Encoded],
    *,
    batch_size: int = 8,
    pad_token_id: int | None,
    sort: bool = True,
    pad_to_multiple_of: int = 1,
) -> Batches:
    """Batch encoded samples.

    Args:
        encoded: The samples, as returned by `encode`.
        batch_size: Samples in a batch; the last batch may have fewer. Raise it as far as memory allows.
        pad_token_id: Id to pad with, usually `tokenizer.pad_token_id`. Padding is masked, so any valid id works.
        sort: Put samples of similar length together, longest first. This minimizes padding, and if memory is too
            small, the first batch fails. Turn it off if the order matters.
        pad_to_multiple_of: Pad further, to the next multiple of this many tokens, so that batches have few distinct
            lengths; with the samples' maximum length, all batches have one length. For `score(graph=True)`. At most
            4096, or twice the length of the longest sample.

    Returns:
        An iterable with a length. Its batches are dicts of int64 tensors on the CPU: `input_ids`, `attention_mask` and
        `labels` [B, T], padded on the right with `pad_token_id`, 0 and -100, and `sample_ids` [B], the row numbers of
        the samples in the data set. If samples have no row numbers, or several have the same, `sample_ids` are their
        positions in `encoded`.

    Raises:
        InputError: If there is nothing to batch, or an argument is out of range.
    """
    check_encoded(encoded, "encoded")
    check_flags(sort=sort)
    check_whole(batch_size=batch_size, required=True)
    check_whole(least=0, pad_token_id=pad_token_id)
    if pad_token_id is None:
        raise InputError("`pad_token_id` is None; give an id, such as the tokenizer's eos_token_id")
    longest = max(len(sample["input_ids"]) for sample in encoded)
    check_whole(most=max(USUAL_LENGTH, 2 * longest), pad_to_multiple_of=pad_to_multiple_of)
    return Batches(encoded, batch_size, pad_token_id, sort, pad_to_multiple_of)


def pad(samples: Sequence[Encoded], pad_token_id: int, multiple: int = 1) -> dict[str, Tensor]:
    """Pad samples on the right to the longest of them.

    Args:
        samples: At least one sample.
        pad_token_id: Id to pad with.
        multiple: Pad to the next multiple of this.

    Returns:
        `input_ids`, `attention_mask` and `labels`, int64 [B, T].
    """
    longest = max(len(sample["input_ids"]) for sample in samples)
    shape = (len(samples), -(-longest // multiple) * multiple)
    input_ids = torch.full(shape, pad_token_id)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED)
    for row, sample in enumerate(samples):
        length = len(sample["input_ids"])
        input_ids[row, :length] = torch.tensor(sample["input_ids"])
        attention_mask[row, :length] = 1
        labels[row, :length] = torch.tensor(sample["labels"])
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
