"""Token ids and labels of samples."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from plop_ext.data.formats import IGNORED, Chat, Continuation, Sample, Text, Tokens, is_assistant
from plop_ext.data.prefixes import common_prefix
from plop_ext.data.rendering import Renderer
from plop_ext.data.rows import Place
from plop_ext.data.spans import AddedTokens, Span, Turns
from plop_ext.errors import InputError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class TokenEncoder:
    """Tokenizes samples of any kind.

    Args:
        tokenizer: Tokenizer of the model.

    Attributes:
        unplaced: Number of turns so far that no rendering shows.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.unplaced = 0

    @cached_property
    def _added(self) -> AddedTokens:
        return AddedTokens(self._tokenizer)

    def encode(self, sample: Sample, place: Place) -> tuple[list[int], list[int]]:
        """Return token ids and labels.

        Args:
            sample: The sample.
            place: Where it was found, for error messages.

        Raises:
            InputError: If the sample is no valid text, or the template refuses it.
        """
        _check_text(sample, place)
        if isinstance(sample, Text):
            ids = self._sequence(sample.text, place)
            return ids, list(ids)
        if isinstance(sample, Continuation):
            return self._continuation(sample, place)
        if isinstance(sample, Chat):
            ids, counted = self._chat(sample, place)
            return ids, [token if keep else IGNORED for token, keep in zip(ids, counted, strict=True)]
        self._check_ids(sample, place)
        return sample.input_ids, sample.labels

    def _continuation(self, sample: Continuation, place: Place) -> tuple[list[int], list[int]]:
        """Tokenize a prompt and its completion as one text; the tokens count from the first that the prompt lacks."""
        end = self._tokenizer.eos_token or ""
        text = sample.prompt + sample.completion
        ids = self._sequence(text if end and sample.completion.endswith(end) else text + end, place)
        prompt = self._sequence(sample.prompt, place)
        # Some tokenizers end every sequence with a special token; here the sequence continues.
        closing = {self._tokenizer.eos_token_id, self._tokenizer.sep_token_id} - {None}
        if prompt and prompt[-1] in closing and not sample.prompt.endswith(self._tokenizer.decode(prompt[-1])):
            prompt.pop()
        start = common_prefix(prompt, ids)
        return ids, [IGNORED] * start + ids[start:]

    def _chat(self, chat: Chat, place: Place) -> tuple[list[int], list[bool]]:
        """Tokenize a chat, and say which tokens count."""
        renderer = Renderer(self._tokenizer, chat, place)
        if chat.prompt_messages is None and renderer.marked and self._tokenizer.is_fast:
            return renderer.marked_tokens(chat.messages)
        turns = Turns(renderer, chat.messages, self._added)
        if chat.prompt_messages is not None:
            first = turns.find(chat.prompt_messages)
            if first is None:
                raise InputError(
                    f"`rows`: {place}: the chat template of `tokenizer` does not render the completion; give `prompt`"
                    " and `completion` as strings"
                )
            return self._spans(turns.text, [(first[0], len(turns.text))], place)
        spans: list[Span] = []
        for index, message in enumerate(chat.messages):
            if is_assistant(message):
                span = turns.find(index, spans[-1][1] if spans else 0)
                self.unplaced += span is None
                spans += [span] if span else []
        return self._spans(turns.text, spans, place)

    def _spans(self, text: str, spans: Sequence[Span], place: Place) -> tuple[list[int], list[bool]]:
        """Tokenize rendered text; a token counts if it shares a character with one of `spans`, which are in order."""
        if not self._tokenizer.is_fast:
            return self._spans_without_offsets(text, spans, place)
        out = self._call(text, place, add_special_tokens=False, return_offsets_mapping=True)
        counted, remaining = [], list(reversed(spans))
        for start, end in out["offset_mapping"]:
            while remaining and remaining[-1][1] <= start:
                remaining.pop()
            counted.append(bool(remaining) and end > remaining[-1][0] and end > start)
        return out["input_ids"], counted

    def _spans_without_offsets(self, text: str, spans: Sequence[Span], place: Place) -> tuple[list[int], list[bool]]:
        """Tokenize rendered text, and find the spans by how many tokens the text before each bound has."""
        ids = self._call(text, place, add_special_tokens=False)["input_ids"]
        bounds = [bound for span in spans for bound in span]
        places = [
            common_prefix(ids, self._call(text[:bound], place, add_special_tokens=False)["input_ids"])
            for bound in bounds
        ]
        cuts = [0, *places, len(ids)]
        return ids, [part % 2 == 1 for part, (start, end) in enumerate(pairwise(cuts)) for _ in range(start, end)]

    def _sequence(self, text: str, place: Place) -> list[int]:
        """Tokenize text with the special tokens of a sequence, but not twice with those that it already has."""
        ids = self._call(text, place, add_special_tokens=True)["input_ids"]
        for name in ("bos", "cls"):
            token, word = getattr(self._tokenizer, f"{name}_token_id"), getattr(self._tokenizer, f"{name}_token")
            if token is not None and ids[:2] == [token, token] and text.startswith(word):
                ids = ids[1:]
        for name in ("eos", "sep"):
            token, word = getattr(self._tokenizer, f"{name}_token_id"), getattr(self._tokenizer, f"{name}_token")
            if token is not None and ids[-2:] == [token, token] and text.endswith(word):
                ids = ids[:-1]
        return ids

    def _call(self, text: str, place: Place, **options: bool) -> dict[str, list]:
        """Call the tokenizer, without its warning about the model's length, because samples are truncated later."""
        try:
            return self._tokenizer(text, verbose=False, **options)
        except Exception as error:  # of any type: a tokenizer is a library of its own
            raise InputError(
                f"`rows`: {place}: `tokenizer` cannot tokenize the text ({first_line(error)}); change or"
                " remove the row"
            ) from error

    def _check_ids(self, sample: Tokens, place: Place) -> None:
        """Check that token ids are those of the tokenizer."""
        size = max(len(self._tokenizer), self._tokenizer.vocab_size)
        wrong = next((token for token in sample.input_ids if not 0 <= token < size), None)
        if wrong is not None:
            raise InputError(
                f"`rows`: {place}, column 'input_ids': the tokenizer has no token {wrong} (ids 0 to {size - 1});"
                " tokenize with the tokenizer of this model"
            )


def _check_text(sample: Sample, place: Place) -> None:
    """Check that all text of a sample is valid."""
    parts = [sample.messages, sample.variables] if isinstance(sample, Chat) else list(sample)
    for text in _texts(parts):
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InputError(
                    f"`rows`: {place}: the lone surrogate {text[error.start]!a} is half a character; remove it, or"
                    " write the character whole"
                ) from error


def _texts(value: Any) -> Iterator[str]:
    """Yield the strings in lists and dicts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts([*value, *value.values()])
    elif isinstance(value, list) and not (value and isinstance(value[0], int)):
        for item in value:
            yield from _texts(item)
