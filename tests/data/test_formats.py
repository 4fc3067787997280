"""Formats that people have: what is recognized by name, what it renders to, and what counts of it."""

from __future__ import annotations

import json
import logging
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from plop_ext.data import Encoded, encode, load_rows
from plop_ext.errors import InputError
from tests.support.tiny_lm import BOS, EOS, byte_tokenizer, ids

TEMPLATE = (
    "{% for t in tools or [] %}{{ t['name'] }},{% endfor %}"
    "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
WORSE = [MESSAGES[0], {"role": "assistant", "content": "no"}]
CHAT = "user:hi;assistant:[yo;]"


def marked(sample: Encoded, tokenizer: Any) -> str:
    """The text of a sample with brackets around what counts."""
    pairs = zip(sample["input_ids"], sample["labels"], strict=True)
    runs = groupby(pairs, key=lambda pair: pair[1] != -100)
    texts = ((keep, tokenizer.decode([token for token, _ in run])) for keep, run in runs)
    return "".join(f"[{text}]" if keep else text for keep, text in texts)


@pytest.mark.parametrize(
    ("row", "title", "expected"),
    [
        ({"text": "hi"}, "plain text (`text`)", "[<s>hi]"),
        ({"prompt": "a", "completion": "b"}, "prompts and completions (`prompt`, `completion`)", "<s>a[b</s>]"),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, "prompts and completions", CHAT),
        ({"messages": MESSAGES}, "chats (`messages`)", CHAT),
        ({"messages": MESSAGES, "tools": [{"name": "f"}]}, "chats", "f," + CHAT),
        ({"messages": MESSAGES, "tools": '[{"name": "f"}]'}, "chats", "f," + CHAT),
        ({"messages": MESSAGES, "tools": None, "text": "x"}, "chats", CHAT),
        ({"messages": None, "tools": None, "text": "hi"}, "plain text", "[<s>hi]"),
        ({"messages": [{"role": m["role"], "value": m["content"]} for m in MESSAGES]}, "chats", CHAT),
        ({"messages": [MESSAGES[0], {"role": "gpt", "content": "yo"}]}, "chats", "user:hi;gpt:[yo;]"),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
            "ShareGPT chats (`conversations`)",
            CHAT,
        ),
        ({"conversations": MESSAGES, "system": "s"}, "ShareGPT chats", "system:s;" + CHAT),
        (
            {"conversations": [{"from": "observation", "value": "x"}, {"from": "function_call", "value": "yo"}]},
            "ShareGPT chats",
            "tool:x;assistant:[yo;]",
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "chosen answers of preference pairs (`chosen`)",
            "<s>a[b</s>]",
        ),
        ({"prompt": MESSAGES[:1], "chosen": MESSAGES[1:], "rejected": WORSE[1:]}, "chosen answers", CHAT),
        ({"prompt": "hi", "chosen": MESSAGES, "rejected": WORSE}, "chosen answers", CHAT),
        ({"chosen": MESSAGES, "rejected": WORSE}, "chosen answers", CHAT),
        ({"chosen": MESSAGES}, "chosen answers", CHAT),
        ({"chosen": "Q: a A: b", "rejected": "Q: a A: c"}, "chosen answers", "<s>Q: a A:[ b</s>]"),
        ({"chosen": "a", "rejected": "a"}, "chosen answers", "[<s>a]"),
        (
            {"instruction": "say", "input": "", "output": "yo"},
            "Alpaca instructions (`instruction`, `output`)",
            "user:say;assistant:[yo;]",
        ),
        ({"instruction": "say", "input": "it", "output": "yo"}, "Alpaca", "user:say\n\nit;assistant:[yo;]"),
        ({"instruction": "say", "output": "yo", "system": "s"}, "Alpaca", "system:s;user:say;assistant:[yo;]"),
        ({"instruction": "say", "output": "yo", "text": "all"}, "plain text (`text`)", "[<s>all]"),
        ({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, "token ids (`input_ids`)", "#[$%]"),
        ({"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0]}, "token ids", "[#$]"),
        ({"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1], "assistant_masks": [1, 1, 0]}, "token ids", "#[$]%"),
    ],
)
def test_recognized(row: dict[str, Any], title: str, expected: str, tmp_path: Path, caplog: Any) -> None:
    tokenizer = byte_tokenizer(template=TEMPLATE)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row))
    with caplog.at_level(logging.INFO):
        [sample] = encode(load_rows(str(path)), tokenizer)
    assert marked(sample, tokenizer) == expected
    assert caplog.messages[0].startswith(f"reading 1 row as {title}")


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"prompt": "p", "completion": "c", "body": "b"}, "body", "[<s>b]"),
        ({"prompt": "p", "completion": "c", "body": "b"}, {"text": "body"}, "[<s>b]"),
        ({"question": "p", "answer": "c", "text": "b"}, {"prompt": "question", "completion": "answer"}, "<s>p[c</s>]"),
        ({"prompt": "p", "answer": "c", "text": "b"}, {"completion": "answer"}, "<s>p[c</s>]"),
        (
            {"dialog": MESSAGES, "functions": [{"name": "f"}]},
            {"messages": "dialog", "tools": "functions"},
            "f," + CHAT,
        ),
        ({"messages": MESSAGES, "functions": [{"name": "f"}]}, {"tools": "functions"}, "f," + CHAT),
        ({"completion": "p", "prompt": "c"}, {"prompt": "completion", "completion": "prompt"}, "<s>p[c</s>]"),
        (
            {"instruction": "say", "context": "it", "output": "yo"},
            {"input": "context"},
            "user:say\n\nit;assistant:[yo;]",
        ),
    ],
)
def test_mapped_columns(row: dict[str, Any], columns: Any, expected: str) -> None:
    tokenizer = byte_tokenizer(template=TEMPLATE)
    [sample] = encode([row], tokenizer, columns=columns)
    assert marked(sample, tokenizer) == expected


def test_alpaca_without_a_chat_template() -> None:
    tokenizer = byte_tokenizer()
    rows = [{"instruction": "say", "input": "it", "output": "yo"}, {"instruction": "say", "output": "yo"}]
    with_input, without = (marked(sample, tokenizer) for sample in encode(rows, tokenizer))
    assert "further context. Write" in with_input and "\n\n### Input:\nit\n\n### Response:[yo</s>]" in with_input
    assert "describes a task. Write" in without and "### Instruction:\nsay\n\n### Response:[yo</s>]" in without


@pytest.mark.parametrize("mask", ["attention", "completion"])
def test_rendered_text_gets_no_second_start_or_end(mask: Any) -> None:
    for end in (False, True):
        tokenizer = byte_tokenizer(sequence_end=end)
        [sample] = encode([{"prompt": "<s>a", "completion": "b</s>"}], tokenizer, mask=mask)
        assert sample["input_ids"] == [BOS, *ids(tokenizer, "ab"), EOS]
        assert sample["labels"] == [-100, -100, *ids(tokenizer, "b"), EOS]
        [sample] = encode([{"text": "<s>ab"}], tokenizer)
        assert sample["input_ids"] == [BOS, *ids(tokenizer, "ab")] + [EOS] * end
    # What the text itself says twice stays.
    [sample] = encode([{"text": "<s><s>a"}], byte_tokenizer())
    assert sample["input_ids"] == [BOS, BOS, *ids(byte_tokenizer(), "a")]


@pytest.mark.parametrize(
    ("rows", "options", "match"),
    [
        (
            [{"a": "x", "b": "y"}],
            {},
            r"`rows` have none of `input_ids`; `messages`; .*; the rows have `a`, `b`: say in `columns`",
        ),
        ([{"a": "x"}], {"columns": "c"}, r"`columns` 'c' does not exist; the rows have `a`"),
        ([{"a": "x"}], {"columns": {"body": "a"}}, r"`columns` 'body' is no name that is read; give one of "),
        ([{"a": "x"}], {"columns": {"prompt": "a"}}, r"`rows` have none of `prompt` and `completion`; the rows"),
        ([{"text": "x"}, {"text": 3}], {}, r"`rows`: row 2, column 'text' must be a string, got int"),
        ([{"text": "x"}, {"body": "y"}], {}, r"`rows`: row 2 lacks the column 'text'; it has `body`"),
        ([{"text": None}], {}, r"row 1, column 'text' must be a string, got NoneType"),
        ([{"text": "x"}, {"text": "y\ud83d"}], {}, r"row 2: the lone surrogate '\\ud83d' is half a character; remove"),
        ([{"messages": [{"role": "user", "content": "\ud83d"}]}], {}, r"row 1: the lone surrogate '\\ud83d'"),
        ([{"messages": MESSAGES, "tools": [{"name": "\udc00"}]}], {}, r"row 1: the lone surrogate '\\udc00'"),
        ([{"messages": "x"}], {}, r"row 1, column 'messages' must be a list of messages, got str"),
        ([{"messages": []}], {}, r"row 1, column 'messages' is an empty list"),
        ([{"messages": ["x"]}], {}, r"row 1, column 'messages': a message must be a dict with `role`"),
        *(
            ([{"messages": [message]}], {}, "the message of the 'user' has no content; give it one")
            for message in ({"role": "user"}, {"role": "user", "content": None, "tool_calls": None})
        ),
        ([{"conversations": [{"value": "x"}]}], {}, r"row 1, column 'conversations': a message must be a dict"),
        ([{"prompt": "x", "completion": []}], {}, r"row 1, column 'completion' must be a string, got list"),
        ([{"prompt": MESSAGES, "completion": "x"}], {}, r"column 'completion' must be a list of messages, got str"),
        ([{"chosen": 3}], {}, r"column 'chosen' must be a list of messages, got int"),
        ([{"instruction": "x", "output": None}], {}, r"column 'output' must be a string, got NoneType"),
        ([{"input_ids": "x"}], {}, r"row 1, column 'input_ids' must be a list of whole numbers"),
        ([{"input_ids": [5, 999]}], {}, r"row 1, column 'input_ids': the tokenizer has no token 999 \(ids 0 to 258\)"),
        ([{"input_ids": [5], "labels": [5, 6]}], {}, r"row 1, column 'labels' has 2 numbers for 1 tokens"),
    ],
)
def test_bad_rows(rows: list[dict[str, Any]], options: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        encode(rows, byte_tokenizer(template=TEMPLATE), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "line", "place"),
    [("a.jsonl", '{"text": "x"}\n\n', "a.jsonl, line 11"), ("a.csv", 'text,n\n"x\n",1\n', "a.csv, line 5")],
)
def test_rows_are_named_by_their_lines(tmp_path: Path, name: str, line: str, place: str) -> None:
    path = tmp_path / name
    if name.endswith("csv"):
        path.write_text('n,text\n"1\n",x\n2,y\n3,z\n')
        rows = load_rows(str(path))
        rows[2]["text"] = 3
    else:
        path.write_text('{"text": "x"}\n\n' * 5 + '{"text": null}\n')
        rows = load_rows(str(path), max_samples=6)
    with pytest.raises(InputError, match=rf"`rows`: .*{place}, column 'text' must be a string"):
        encode(rows, byte_tokenizer())


def test_a_subset_keeps_the_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n' * 699 + '{"text": null}\n' + '{"text": "x"}\n' * 300)
    for seed in range(20):
        rows = load_rows(str(path), max_samples=200, seed=seed)
        if 699 in rows.numbers:
            with pytest.raises(InputError, match=r"a\.jsonl, line 700, column 'text'"):
                encode(rows, byte_tokenizer())
            return
    pytest.fail("no seed chose the row")
