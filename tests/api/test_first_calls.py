"""What a newcomer passes first works, or the error says how."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import plop_ext
from plop_ext.data import batches, encode, load_rows
from plop_ext.errors import InputError
from plop_ext.models import load_model
from tests.support import tiny_models

TEXTS = ["some words that are long enough to be scored", "and some more of them, also long enough"]


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load_model("plop-tiny", device="cpu")


@pytest.mark.parametrize("kind", ["texts", "rows", "encoded", "data set of datasets"])
def test_rows_and_texts_are_encoded_and_batched(kind: str, loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    rows = [{"text": text} for text in TEXTS]
    encoded = encode(rows, tokenizer)
    given: Any = {"texts": TEXTS, "rows": rows, "encoded": encoded}.get(kind)
    if given is None:
        import datasets

        given = datasets.Dataset.from_list(rows)
    options: dict[str, Any] = {"max_samples": None, "progress": False}
    found = plop_ext.score(model, given, tokenizer, **options)
    expected = plop_ext.score(model, batches(encoded, pad_token_id=tokenizer.pad_token_id), **options)
    np.testing.assert_array_equal(found.totals, expected.totals)


def test_names_are_loaded(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    found = plop_ext.score("plop-tiny", "prose", max_samples=4, progress=False)
    rows = encode(load_rows("prose", max_samples=4), tokenizer)
    expected = plop_ext.score(model.cpu(), batches(rows, pad_token_id=0), max_samples=4, progress=False)
    assert len(found.sample_ids) == 4
    np.testing.assert_allclose(found.nfn, expected.nfn, rtol=1e-5)


def test_sizes_are_text(loaded: tuple[Any, Any]) -> None:
    scores = plop_ext.score(loaded[0], TEXTS, loaded[1], max_samples="2", progress=False)
    assert scores.place(types=3, max_params="10k").num_parameters() <= 10_000
    assert scores.place(types=3, max_memory="1GiB") == scores.place(types=3, max_memory=2**30)
    assert len(scores.place(modules="25%").modules) == 14
    assert plop_ext.StopRule(modules="25%").modules == 0.25


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((5, []), "`model` must be a torch module, or the name or folder of a model, got 5"),
        (("plop-tiny", 5), "`dataloader` must be batches, rows, texts"),
        (("plop-tiny", []), "`dataloader` is empty"),
        (("plop-tiny", {"input_ids": [1]}), "put a single batch into a list"),
        (("plop-tiny", "no-such.jsonl"), "no such file"),
    ],
)
def test_the_error_says_what_to_pass(arguments: tuple[Any, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        plop_ext.score(*arguments, progress=False)


def test_rows_without_a_tokenizer_say_where_it_goes() -> None:
    with pytest.raises(InputError, match="`tokenizer` is missing, and `dataloader` holds rows of text; pass"):
        plop_ext.score(tiny_models.llama(), [{"text": "a"}], progress=False)
