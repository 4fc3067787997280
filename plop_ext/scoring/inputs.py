"""The model and the batches of a scoring run, from whatever names or holds them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from plop_ext.arguments import check_type, shown
from plop_ext.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def take_model(model: Any, tokenizer: Any) -> tuple[nn.Module, Any]:
    """Return a model and its tokenizer; a name or path is loaded, and then brings its own tokenizer.

    Raises:
        InputError: If `model` is neither a model nor the name of one.
    """
    if isinstance(model, (str, os.PathLike)):
        from plop_ext.models import load_model

        model, own = load_model(os.fspath(model))
        return model, own if tokenizer is None else tokenizer
    check_type(nn.Module, "a torch module, or the name or folder of a model", model=model)
    return model, tokenizer


def take_batches(
    dataloader: Any,
    tokenizer: Any,
    mask: str,
    samples: int | None,
    seed: int,
    own: bool,
    may_be_empty: bool = False,
) -> Iterable[Any]:
    """Return batches: rows, texts, encoded samples or the name of a data set are encoded and batched.

    Args:
        dataloader: The data.
        tokenizer: Tokenizer of the model, or None; only rows and texts need it.
        mask: Tokens that will count.
        samples: Most rows to read of a data set that is named.
        seed: Seed of the choice of these rows.
        own: Whether a function of the user takes the batches, which may then hold anything.
        may_be_empty: Whether other processes may hold all data.

    Raises:
        InputError: If the data is of no known kind, or has to be tokenized and there is no tokenizer.
    """
    if isinstance(dataloader, (str, os.PathLike)):
        from plop_ext.data import load_rows

        rows = load_rows(os.fspath(dataloader), max_samples=samples, seed=seed)
        return _batched(_encoded(rows, tokenizer, mask), tokenizer)
    if own and isinstance(dataloader, Iterable):
        return dataloader
    if hasattr(dataloader, "column_names") and hasattr(dataloader, "__getitem__"):  # a data set of `datasets`
        dataloader = list(dataloader)
    if isinstance(dataloader, Sequence):
        if not dataloader:
            if may_be_empty:
                return dataloader
            raise InputError("`dataloader` is empty; give at least one batch, row or text")
        first = dataloader[0]
        if isinstance(first, str):
            texts = [{"text": text} for text in dataloader]
            return _batched(_encoded(texts, tokenizer, mask), tokenizer)
        if _is_encoded(first):
            return _batched(dataloader, tokenizer)
        if isinstance(first, Mapping) and not any(isinstance(value, Tensor) for value in first.values()):
            return _batched(_encoded(dataloader, tokenizer, mask), tokenizer)
    if isinstance(dataloader, (Mapping, bytes, Tensor)) or not isinstance(dataloader, Iterable):
        raise InputError(
            f"`dataloader` must be batches, rows, texts, encoded samples or the name of a data set, got "
            f"{shown(dataloader)}; put a single batch into a list"
        )
    return dataloader


def _is_encoded(sample: Any) -> bool:
    """Return whether a row holds token ids and labels, as `plop_ext.data.encode` returns them."""
    return isinstance(sample, Mapping) and all(isinstance(sample.get(name), list) for name in ("input_ids", "labels"))


def _encoded(rows: Sequence[Any], tokenizer: PreTrainedTokenizerBase | None, mask: str) -> Sequence[Any]:
    """Tokenize rows."""
    from plop_ext.data import encode

    if tokenizer is None:
        raise InputError(
            "`tokenizer` is missing, and `dataloader` holds rows of text; pass `tokenizer`, or the name of the model "
            "as `model`"
        )
    return encode(rows, tokenizer, mask="completion" if mask == "completion" else "attention")


def _batched(encoded: Sequence[Any], tokenizer: Any) -> Iterable[Any]:
    """Batch encoded samples; padding is masked, so that any id serves where the tokenizer has none."""
    from plop_ext.data import batches

    ids = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    return batches(encoded, pad_token_id=next((token for token in ids if token is not None), 0))
