"""Token ids and labels of rows: plain text, prompt and completion, or a chat."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from plop_ext.arguments import check_whole
from plop_ext.data import chat
from plop_ext.data.sources import Rows
from plop_ext.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

IGNORED = -100
"""Label of a token that no loss and no completion mask counts."""


class _Tokens(TypedDict):
    input_ids: list[int]
    labels: list[int]


class Encoded(_Tokens, total=False):
    """One sample: `labels` repeats `input_ids`, with -100 for tokens that do not count; `row` is its row number."""

    row: int


def encode(
    rows: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    column: str | None = None,
    mask: Literal["attention", "completion"] = "attention",
    max_length: int = 1024,
) -> list[Encoded]:
    """Tokenize rows and label the tokens that count.

    Three kinds of row are recognized by their columns, in this order:

    - `messages`, a list of messages with `role` and `content`, rendered by the tokenizer's chat template. The tokens
      of assistant turns count: those inside the template's `{% generation %}` marks. In a template without marks, a
      turn starts after the generation prompt and ends where the rendering up to that turn ends, so that the
      end-of-turn marker counts too.
    - `prompt` and `completion`, two strings or two lists of messages. Strings are tokenized separately, so that no
      token straddles the boundary: the prompt with the special tokens of a sequence start, the completion with the
      end-of-sequence token if the tokenizer has one. Lists of messages are rendered as one chat. The tokens of the
      completion count.
    - `text`, or the column that `column` names, tokenized with the tokenizer's special tokens. Every token counts.

    Samples are truncated at their end to `max_length`. Rows without a token that counts are dropped: rows of special
    tokens only, as of an empty text, and with `mask="completion"` also a prompt of `max_length` tokens and a chat
    without an assistant turn. The log gives the number of truncated and of dropped samples.

    Args:
        rows: Rows, as returned by `load_rows`. All rows must have the columns by which the first row is recognized.
        tokenizer: Tokenizer of the model.
        column: Column that holds plain text. Default `text`; give it if the column has another name, or to use the
            plain text of rows that also have other columns.
        mask: Tokens that will count: all, or with `"completion"` the labelled ones. `"completion"` refuses plain text,
            which has no completion. The samples carry both kinds of mask in either case.
        max_length: Largest length of a sample in tokens. Lower it if memory is short.

    Returns:
        One dict for each row kept, in the order of the rows. `row` is its number in the data set if `rows` come from
        `load_rows`, otherwise its position in `rows`.

    Raises:
        InputError: If a column is missing or holds another type, the tokenizer lacks a chat template, `mask` does not
            fit the rows, or no row has a token that counts.

    Example:
        >>> from plop_ext.data import encode, load_rows
        >>> from plop_ext.models import load_model
        >>> _, tokenizer = load_model("plop-tiny")
        >>> samples = encode(load_rows("prose", max_samples=2), tokenizer)
        >>> samples[0]["labels"] == samples[0]["input_ids"]
        True
    """
    if mask not in ("attention", "completion"):
        raise InputError(f"`mask` must be 'attention' or 'completion', got {mask!r}")
    check_whole(max_length=max_length)
    if not rows:
        raise InputError("`rows` is empty; give at least one")
    encoder, columns, kind = _recognize(rows[0], column, mask)
    _check_rows(rows, columns, kind)
    encoded: list[Encoded] = []
    special = _special_ids(tokenizer)
    truncated = 0
    numbers = rows.numbers if isinstance(rows, Rows) and len(rows.numbers) == len(rows) else range(len(rows))
    for number, (input_ids, labels) in zip(numbers, encoder(rows, tokenizer, columns), strict=True):
        truncated += len(input_ids) > max_length
        sample = Encoded(input_ids=input_ids[:max_length], labels=labels[:max_length], row=number)
        if counted_tokens(sample) if mask == "completion" else not special.issuperset(sample["input_ids"]):
            encoded.append(sample)
    if truncated:
        logger.warning("%d of %d samples were truncated to `max_length` = %d tokens", truncated, len(rows), max_length)
    if not encoded:
        wanted = "longer texts"
        if mask == "completion":
            wanted = "prompts shorter than that" if "prompt" in columns else "chats with an assistant turn"
        raise InputError(
            f"no row has a token to count in {', '.join(map(_quoted, columns))} within `max_length` = {max_length};"
            f" give {wanted}"
        )
    if len(encoded) < len(rows):
        logger.warning("%d of %d samples were dropped: no token to count", len(rows) - len(encoded), len(rows))
    return encoded


def counted_tokens(sample: Encoded) -> int:
    """Return how many tokens of a sample a causal model predicts: all that count except the sample's first token."""
    return sum(label != IGNORED for label in sample["labels"][1:])


Encoder = Callable[
    [Sequence[dict[str, Any]], "PreTrainedTokenizerBase", tuple[str, ...]], "list[tuple[list[int], list[int]]]"
]


def _recognize(row: dict[str, Any], column: str | None, mask: str) -> tuple[Encoder, tuple[str, ...], type]:
    """Choose the encoder, the columns that it reads, and their type."""
    there = f"the rows have {', '.join(map(_quoted, row)) or 'no columns'}"
    if column is not None and column not in row:
        raise InputError(f"`column` {column!r} does not exist; {there}")
    if column is None:
        if "messages" in row:
            return _encode_chats, ("messages",), list
        if "prompt" in row and "completion" in row:
            if isinstance(row["prompt"], list):
                return _encode_chat_pairs, ("prompt", "completion"), list
            return _encode_pairs, ("prompt", "completion"), str
        if "text" not in row:
            raise InputError(
                "`rows` have none of `messages`, `prompt` and `completion`, or `text`;"
                f" {there}: name the one with the text in `column`"
            )
    if mask == "completion":
        raise InputError(
            f"`mask`='completion' needs `messages`, or `prompt` and `completion`, and only plain text is read;"
            f" {there}: leave it at 'attention'"
        )
    return _encode_text, (column or "text",), str


def _check_rows(rows: Sequence[dict[str, Any]], columns: tuple[str, ...], kind: type) -> None:
    """Check that every row has the columns, with values of type `kind`."""
    wanted = "a string" if kind is str else "a list of messages"
    for number, row in enumerate(rows, start=1):
        for name in columns:
            if name not in row:
                raise InputError(
                    f"`rows`: row {number} lacks the column {name!r}; it has {', '.join(map(_quoted, row))}:"
                    " give every row the same columns"
                )
            if not isinstance(row[name], kind):
                raise InputError(
                    f"`rows`: row {number}, column {name!r} must be {wanted}, got {type(row[name]).__name__}"
                )


def _encode_text(
    rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, columns: tuple[str, ...]
) -> list[tuple[list[int], list[int]]]:
    """Encode plain text."""
    ids = _tokenize(tokenizer, [row[columns[0]] for row in rows], special=True)
    return [(sample, list(sample)) for sample in ids]


def _encode_pairs(
    rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, columns: tuple[str, ...]
) -> list[tuple[list[int], list[int]]]:
    """Encode strings of prompt and completion."""
    end = tokenizer.eos_token_id
    prompts = _tokenize(tokenizer, [row["prompt"] for row in rows], special=True)
    completions = _tokenize(tokenizer, [row["completion"] for row in rows], special=False)
    pairs = []
    for row, prompt, completion in zip(rows, prompts, completions, strict=True):
        # Some tokenizers end every sequence with a special token; here the sequence continues.
        closing = (tokenizer.eos_token, tokenizer.sep_token)
        for token, text in zip((end, tokenizer.sep_token_id), closing, strict=True):
            if token is not None and prompt[-1:] == [token] and not row["prompt"].endswith(str(text)):
                prompt = prompt[:-1]
        if end is not None and completion[-1:] != [end]:
            completion = [*completion, end]
        pairs.append((prompt + completion, [IGNORED] * len(prompt) + completion))
    return pairs


def _encode_chats(
    rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, columns: tuple[str, ...]
) -> list[tuple[list[int], list[int]]]:
    """Encode chats; the assistant's turns count."""
    template = chat.template_of(tokenizer)
    samples, unplaced = [], 0
    for number, row in enumerate(rows, start=1):
        ids, counted, lost = chat.encode_chat(row["messages"], tokenizer, template, number)
        unplaced += lost
        samples.append((ids, _masked(ids, counted)))
    if unplaced:
        logger.warning(
            "%d assistant turns do not count: the chat template renders them differently once the chat continues, so"
            " their tokens cannot be identified; mark them with {%% generation %%} in the template",
            unplaced,
        )
    return samples


def _encode_chat_pairs(
    rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, columns: tuple[str, ...]
) -> list[tuple[list[int], list[int]]]:
    """Encode a prompt and a completion given as messages; the completion counts."""
    chat.template_of(tokenizer)
    samples = []
    for number, row in enumerate(rows, start=1):
        ids, counted = chat.encode_continuation(row["prompt"], row["completion"], tokenizer, number)
        samples.append((ids, _masked(ids, counted)))
    return samples


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids that represent no text; the unknown token does, unless it has another role too."""
    roles = {getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "sep", "cls", "pad", "mask")}
    return set(tokenizer.all_special_ids) - ({tokenizer.unk_token_id} - roles)


def _masked(ids: list[int], counted: list[bool]) -> list[int]:
    """Return labels that keep the counted tokens."""
    return [token if keep else IGNORED for token, keep in zip(ids, counted, strict=True)]


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, special: bool) -> list[list[int]]:
    """Tokenize without the warning about the model's length, because samples are truncated later."""
    return tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]


def _quoted(name: object) -> str:
    """Return a column's name in backticks."""
    return f"`{name}`"
