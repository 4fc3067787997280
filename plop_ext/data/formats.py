"""The kinds of row that people have, told by the names of their columns, and the sample that each holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from plop_ext.data.prefixes import common_prefix
from plop_ext.data.rows import Place, Row, Rows
from plop_ext.errors import InputError

IGNORED = -100
"""Label of a token that no loss and no completion mask counts."""

Message = dict[str, Any]

_ASSISTANTS = frozenset(("assistant", "model", "gpt"))


def is_assistant(message: Message) -> bool:
    """Return whether a message is the model's, by any of the names of that role."""
    return message["role"] in _ASSISTANTS


class Text(NamedTuple):
    """Plain text, all of which counts."""

    text: str


class Continuation(NamedTuple):
    """A text and its continuation, which counts."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    """A chat for a chat template.

    Attributes:
        messages: At least one message, each with `role` and `content`.
        prompt_messages: Number of messages at the start that do not count, all others do; None: the assistant's
            messages count.
        variables: Further arguments of the template: `tools`, `documents`, and those of `chat_template_kwargs`.
    """

    messages: list[Message]
    prompt_messages: int | None = None
    variables: dict[str, Any] = field(default_factory=dict)


class Tokens(NamedTuple):
    """Token ids, and their labels."""

    input_ids: list[int]
    labels: list[int]


Sample = Text | Continuation | Chat | Tokens


@dataclass(frozen=True)
class Format:
    """A kind of row.

    Attributes:
        title: What it is called in messages.
        columns: Columns by which it is recognized.
        read: Makes a sample of a row, given whether the tokenizer has a chat template.
        completions: Whether its samples tell the tokens of completions from others.
    """

    title: str
    columns: tuple[str, ...]
    read: Callable[[Row, Place, bool], Sample]
    completions: bool = True

    def describe(self) -> str:
        """Return what is read, and from which columns."""
        return f"{self.title} ({', '.join(map(_quoted, self.columns))})"


def recognize(rows: Sequence[Row], mapping: Mapping[str, str]) -> Format:
    """Return the format of rows by the columns of the first.

    Args:
        rows: At least one row, whose columns have been renamed.
        mapping: The columns that were renamed: only formats that have one of them are considered.

    Raises:
        InputError: If the columns are those of no format.
    """
    row = rows[0]
    named = [known for known in FORMATS if mapping.keys() & set(known.columns)] or FORMATS
    # Tables hold null in the columns of the formats that a row does not have.
    for columns in ({name for name, value in row.items() if value is not None}, row.keys()):
        for known in named:
            if columns >= set(known.columns):
                return known
    wanted = "; ".join(" and ".join(map(_quoted, known.columns)) for known in named)
    raise InputError(
        f"`rows` have none of {wanted}; the rows have {', '.join(map(_quoted, row)) or 'no columns'}: say in `columns`"
        " which to read, as in text=COLUMN or prompt=COLUMN,completion=COLUMN"
    )


def renamed(rows: Rows, columns: str | Mapping[str, str] | None) -> tuple[Rows, dict[str, str]]:
    """Return the rows with columns renamed, and the mapping of names.

    Args:
        rows: At least one row.
        columns: Column to read under each name; a string names that of `text`.

    Raises:
        InputError: If a name is unknown, or a column does not exist.
    """
    mapping = {"text": columns} if isinstance(columns, str) else dict(columns or {})
    for name, column in mapping.items():
        if name not in COLUMNS:
            raise InputError(f"`columns` {name!r} is no name that is read; give one of {', '.join(sorted(COLUMNS))}")
        if column not in rows[0]:
            raise InputError(
                f"`columns` {column!r} does not exist; the rows have"
                f" {', '.join(map(_quoted, rows[0])) or 'no columns'}"
            )
    if not mapping:
        return rows, mapping
    sources = set(mapping.values())
    copies = (
        {
            **{name: value for name, value in row.items() if name not in sources},
            **{name: row[column] for name, column in mapping.items() if column in row},
        }
        for row in rows
    )
    return Rows(copies, rows.places, rows.numbers), mapping


def _text(row: Row, place: Place, has_template: bool) -> Sample:
    return Text(_value(row, "text", str, place))


def _prompt_and_completion(row: Row, place: Place, has_template: bool) -> Sample:
    return _continuation(row, "completion", place)


def _continuation(row: Row, answer: str, place: Place) -> Sample:
    """Read a prompt and the column of its answer: two strings, or two lists of messages."""
    if isinstance(row.get("prompt"), str):
        return Continuation(row["prompt"], _value(row, answer, str, place))
    prompt, completion = _messages(row, "prompt", place), _messages(row, answer, place)
    return Chat(prompt + completion, len(prompt), _variables(row, place))


def _chat(row: Row, place: Place, has_template: bool) -> Sample:
    return Chat(_messages(row, "messages", place), None, _variables(row, place))


def _sharegpt(row: Row, place: Place, has_template: bool) -> Sample:
    return Chat(_system(row) + _messages(row, "conversations", place), None, _variables(row, place))


def _chosen(row: Row, place: Place, has_template: bool) -> Sample:
    """Read the preferred of two answers; without a prompt, it follows what both have in common."""
    prompt, chosen, rejected = (row.get(name) for name in ("prompt", "chosen", "rejected"))
    # Some data sets repeat as a string the prompt with which both chats begin.
    if prompt is not None and isinstance(prompt, str) == isinstance(chosen, str):
        return _continuation(row, "chosen", place)
    if isinstance(chosen, str):
        shared = _shared(chosen, rejected) if isinstance(rejected, str) else 0
        return Continuation(chosen[:shared], chosen[shared:]) if shared else Text(chosen)
    messages = _messages(row, "chosen", place)
    shared = _shared(messages, _messages(row, "rejected", place)) if rejected is not None else 0
    return Chat(messages, shared or None, _variables(row, place))


def _shared(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """Return how long the common start of two answers is; a space before the difference belongs to the answers."""
    length = common_prefix(chosen, rejected)
    return length - 1 if length and chosen[length - 1] == " " else min(length, len(chosen) - 1)


def _alpaca(row: Row, place: Place, has_template: bool) -> Sample:
    """Read an instruction: a turn of a chat, or the published prompt if the tokenizer has no chat template."""
    instruction, output = (_value(row, name, str, place) for name in ("instruction", "output"))
    context = _value(row, "input", str, place) if row.get("input") else ""
    if has_template:
        request = f"{instruction}\n\n{context}" if context else instruction
        prompt = [*_system(row), {"role": "user", "content": request}]
        return Chat([*prompt, {"role": "assistant", "content": output}], len(prompt), _variables(row, place))
    further = ", paired with an input that provides further context" if context else ""
    parts = [
        f"Below is an instruction that describes a task{further}."
        " Write a response that appropriately completes the request.",
        f"### Instruction:\n{instruction}",
        *([f"### Input:\n{context}"] if context else []),
        "### Response:",
    ]
    return Continuation("\n\n".join(parts), output)


def _tokens(row: Row, place: Place, has_template: bool) -> Sample:
    """Read token ids; without labels, every token counts that no mask leaves out. Padding is removed."""
    ids = _numbers(row, "input_ids", place)
    masks = [_numbers(row, name, place, len(ids)) for name in _TOKEN_MASKS if row.get(name) is not None]
    if row.get("labels") is not None:
        labels = _numbers(row, "labels", place, len(ids))
    else:
        labels = [token if all(flags) else IGNORED for token, *flags in zip(ids, *masks, strict=True)]
    if row.get("attention_mask") is None:
        return Tokens(ids, labels)
    kept = [bool(flag) for flag in _numbers(row, "attention_mask", place, len(ids))]
    return Tokens(*([value for value, keep in zip(values, kept, strict=True) if keep] for values in (ids, labels)))


_TOKEN_MASKS = ("completion_mask", "assistant_masks")

FORMATS = (
    Format("token ids", ("input_ids",), _tokens),
    Format("chats", ("messages",), _chat),
    Format("ShareGPT chats", ("conversations",), _sharegpt),
    Format("chosen answers of preference pairs", ("chosen",), _chosen),
    Format("prompts and completions", ("prompt", "completion"), _prompt_and_completion),
    Format("plain text", ("text",), _text, completions=False),
    Format("Alpaca instructions", ("instruction", "output"), _alpaca),
)
"""The formats, in the order in which they are tried."""

_FURTHER = ("prompt", "rejected", "input", "system", "labels", "attention_mask", *_TOKEN_MASKS)
_VARIABLES = ("tools", "documents", "chat_template_kwargs")
COLUMNS = frozenset((*(column for known in FORMATS for column in known.columns), *_FURTHER, *_VARIABLES))
"""Every column that a format reads."""


def _variables(row: Row, place: Place) -> dict[str, Any]:
    """Return the arguments that a row has for the chat template, some of them perhaps as JSON text."""
    values = {name: row[name] for name in _VARIABLES if row.get(name) is not None}
    for name, value in values.items():
        if isinstance(value, str):
            try:
                values[name] = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"`rows`: {place}, column {name!r} is a string that is not JSON ({error}); give JSON, or the value"
                ) from error
    further = values.pop("chat_template_kwargs", None) or {}
    for name, value in values.items():
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise InputError(f"`rows`: {place}, column {name!r} must be a list of objects")
    if not isinstance(further, dict):
        raise InputError(f"`rows`: {place}, column 'chat_template_kwargs' must be an object")
    return {**values, **further}


def _system(row: Row) -> list[Message]:
    """Return the system message that a row has in a column of its own."""
    system = row.get("system")
    return [{"role": "system", "content": system}] if isinstance(system, str) and system else []


_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}


def _messages(row: Row, column: str, place: Place) -> list[Message]:
    """Return a column's messages; those with `from` and `value` get `role` and `content`."""
    value = _value(row, column, list, place)
    where = f"`rows`: {place}, column {column!r}"
    if not value:
        raise InputError(f"{where} is an empty list; give at least one message")
    messages = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role", message.get("from")), str):
            raise InputError(f"{where}: a message must be a dict with `role` and `content`, got {message!r:.60}")
        message = dict(message)
        if "role" not in message:
            sender = message.pop("from")
            message["role"] = _SHAREGPT_ROLES.get(sender, sender)
        if "content" not in message and "value" in message:
            message["content"] = message.pop("value")
        if all(value is None for name, value in message.items() if name != "role"):
            raise InputError(f"{where}: the message of the {message['role']!r:.60} has no content; give it one")
        messages.append(message)
    return messages


def _value(row: Row, column: str, kind: type, place: Place) -> Any:
    """Return the value of a column, which must be of the type that is read."""
    if column not in row:
        raise InputError(
            f"`rows`: {place} lacks the column {column!r}; it has {', '.join(map(_quoted, row)) or 'no columns'}:"
            " give every row the same columns"
        )
    value = row[column]
    if not isinstance(value, kind):
        wanted = "a string" if kind is str else "a list of messages"
        raise InputError(f"`rows`: {place}, column {column!r} must be {wanted}, got {type(value).__name__}")
    return value


def _numbers(row: Row, column: str, place: Place, length: int | None = None) -> list[int]:
    """Return a column of whole numbers, as many as there are tokens."""
    value: Any = row.get(column)
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, list) or not all(isinstance(item, int) for item in value):
        raise InputError(f"`rows`: {place}, column {column!r} must be a list of whole numbers")
    if length is not None and len(value) != length:
        raise InputError(f"`rows`: {place}, column {column!r} has {len(value)} numbers for {length} tokens")
    return value


def _quoted(name: object) -> str:
    """Return a column's name in backticks."""
    return f"`{name}`"
