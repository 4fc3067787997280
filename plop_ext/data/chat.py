"""The assistant's tokens in a rendered chat."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from plop_ext.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the tokenizer's chat template, or raise `InputError` if it has none."""
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise InputError(
            "`tokenizer` has no chat template for `messages`; use the tokenizer of a chat model, set"
            " `tokenizer.chat_template`, or give `prompt` and `completion` strings"
        ) from error


def encode_chat(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, template: str, number: int
) -> tuple[list[int], list[bool], int]:
    """Tokenize a chat and mark the assistant's turns.

    Args:
        messages: The chat.
        tokenizer: Tokenizer with a chat template.
        template: That template.
        number: Number of the row, for error messages.

    Returns:
        The token ids, whether each counts, and the number of assistant turns not found in the rendered chat.
    """
    _check(messages, "messages", number)
    if _GENERATION.search(template) and tokenizer.is_fast:
        out = _apply(
            tokenizer,
            messages,
            number,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False},
        )
        return out["input_ids"], [bool(flag) for flag in out["assistant_masks"]], 0
    text = _render(tokenizer, messages, number)
    spans, lost = [], 0
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            start = _start_of_turn(text, tokenizer, messages[:index], number)
            until = text if index + 1 == len(messages) else _render(tokenizer, messages[: index + 1], number)
            if start is not None and text.startswith(until):
                spans.append((start, len(until)))
            else:
                lost += 1
    ids, counted = _tokenize_spans(text, spans, tokenizer)
    return ids, counted, lost


def encode_continuation(
    prompt: list[Message], completion: list[Message], tokenizer: PreTrainedTokenizerBase, number: int
) -> tuple[list[int], list[bool]]:
    """Tokenize `prompt` and `completion` as one chat and mark the completion.

    Args:
        prompt: The messages that the model receives.
        completion: The messages that it should generate.
        tokenizer: Tokenizer with a chat template.
        number: Number of the row, for error messages.

    Returns:
        The token ids, and whether each counts.
    """
    _check(prompt, "prompt", number)
    _check(completion, "completion", number)
    text = _render(tokenizer, prompt + completion, number)
    start = _start_of_turn(text, tokenizer, prompt, number)
    if start is None:
        raise InputError(
            f"`rows`: row {number}: the chat template of `tokenizer` renders the prompt differently once the"
            " completion follows, so its end cannot be found; give `prompt` and `completion` as strings"
        )
    return _tokenize_spans(text, [(start, len(text))], tokenizer)


def _start_of_turn(text: str, tokenizer: PreTrainedTokenizerBase, history: list[Message], number: int) -> int | None:
    """Return where in `text` the assistant's turn after `history` starts; None if `text` renders it differently."""
    rendered = _render(tokenizer, history, number) if history else ""
    prompted = _render(tokenizer, history, number, add_generation_prompt=True) if history else ""
    if not text.startswith(rendered):
        return None
    # The generation prompt may be longer than the start of a finished turn (an opened thinking block).
    prompted = prompted if prompted.startswith(rendered) else rendered
    pairs = enumerate(zip(text, prompted, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(text), len(prompted)))


def _tokenize_spans(
    text: str, spans: list[tuple[int, int]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    """Tokenize rendered text; a token counts if it shares a character with one of `spans`, which are in order."""
    if tokenizer.is_fast:
        out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        counted, remaining = [], list(reversed(spans))
        for start, end in out["offset_mapping"]:
            while remaining and remaining[-1][1] <= start:
                remaining.pop()
            counted.append(bool(remaining) and end > remaining[-1][0] and end > start)
        return out["input_ids"], counted
    # Without offsets, tokenize the text piece by piece, so that no token straddles the end of a span.
    ids: list[int] = []
    counted = []
    bounds = [0, *(bound for span in spans for bound in span), len(text)]
    for piece, (start, end) in enumerate(pairwise(bounds)):
        new = tokenizer(text[start:end], add_special_tokens=False, verbose=False)["input_ids"] if end > start else []
        ids += new
        counted += [piece % 2 == 1] * len(new)
    return ids, counted


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], number: int, **kwargs: Any) -> str:
    """Render messages to text."""
    return _apply(tokenizer, messages, number, tokenize=False, **kwargs)


def _apply(tokenizer: PreTrainedTokenizerBase, messages: list[Message], number: int, **kwargs: Any) -> Any:
    """Apply the chat template; if it raises, name the row."""
    import jinja2

    try:
        return tokenizer.apply_chat_template(messages, **kwargs)
    except (jinja2.TemplateError, TypeError, KeyError) as error:
        raise InputError(
            f"`rows`: row {number}: the chat template of `tokenizer` refuses the messages ({error}); check roles and"
            " contents"
        ) from error


def _check(messages: list[Message], column: str, number: int) -> None:
    """Check that the column is a list of messages with a role and a content."""
    where = f"`rows`: row {number}, column {column!r}"
    if not messages:
        raise InputError(f"{where} is an empty list; give at least one message")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputError(f"{where}: a message must be a dict with `role` and `content`, got {message!r:.60}")
