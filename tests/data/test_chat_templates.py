"""Chats rendered by the templates of a dozen families: the ids of `apply_chat_template`, and the turns that count."""

from __future__ import annotations

from itertools import groupby
from random import Random
from typing import Any

import pytest

from plop_ext.data import Encoded, encode
from plop_ext.errors import InputError
from tests.support.chat_templates import CHAT, FAMILIES, TOOL_CHAT, TOOLS, Family

SYSTEM = {"role": "system", "content": "Be brief."}
WITH_TOOLS = {name: family for name, family in FAMILIES.items() if family.calls is not None}


def counted(sample: Encoded, tokenizer: Any) -> tuple[str, ...]:
    """The runs of tokens that count, as text."""
    pairs = zip(sample["input_ids"], sample["labels"], strict=True)
    runs = groupby(pairs, key=lambda pair: pair[1] != -100)
    return tuple(tokenizer.decode([token for token, _ in run]) for keep, run in runs if keep)


def encoded(family: Family, messages: list[dict[str, Any]], **columns: Any) -> tuple[Encoded, Any]:
    tokenizer = family.tokenizer()
    [sample] = encode([{"messages": messages, **columns}], tokenizer, max_length=10_000)
    return sample, tokenizer


def rendered(tokenizer: Any, messages: list[dict[str, Any]], **variables: Any) -> list[int]:
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **variables)["input_ids"]


@pytest.mark.parametrize("name", FAMILIES)
class TestFamilies:
    def test_ids_and_turns(self, name: str) -> None:
        family = FAMILIES[name]
        sample, tokenizer = encoded(family, CHAT)
        assert sample["input_ids"] == rendered(tokenizer, CHAT)
        assert counted(sample, tokenizer) == family.answers

    def test_a_chat_that_goes_on(self, name: str) -> None:
        family = FAMILIES[name]
        chat = [*CHAT, {"role": "user", "content": "bye"}]
        sample, tokenizer = encoded(family, chat)
        assert sample["input_ids"] == rendered(tokenizer, chat)
        first, second = counted(sample, tokenizer)
        assert first == family.answers[0] and "44" in second and "bye" not in second

    def test_system_message(self, name: str) -> None:
        family = FAMILIES[name]
        if not family.system:
            with pytest.raises(InputError, match=r"row 1: the chat template of `tokenizer` refuses the messages \("):
                encoded(family, [SYSTEM, *CHAT])
            return
        sample, tokenizer = encoded(family, [SYSTEM, *CHAT])
        assert sample["input_ids"] == rendered(tokenizer, [SYSTEM, *CHAT])
        assert counted(sample, tokenizer) == family.answers

    def test_answers_that_repeat_the_template(self, name: str) -> None:
        """What was asked or answered may look like any part of the template."""
        family = FAMILIES[name]
        for text in (*family.special[:2], "assistant", "assistant\n", " ", family.answers[0]):
            chat = [{"role": "user", "content": text}, {"role": "assistant", "content": f"x{text}y"}]
            sample, tokenizer = encoded(family, [*chat, *chat])
            assert sample["input_ids"] == rendered(tokenizer, [*chat, *chat])
            parts = counted(sample, tokenizer)
            assert len(parts) == 2 and all(part.count("y") == 1 + text.count("y") for part in parts)

    def test_completion_starts_behind_the_generation_prompt(self, name: str) -> None:
        family = FAMILIES[name]
        tokenizer = family.tokenizer()
        [sample] = encode([{"prompt": CHAT[:3], "completion": CHAT[3:]}], tokenizer, max_length=10_000)
        assert sample["input_ids"] == rendered(tokenizer, CHAT)
        assert counted(sample, tokenizer) == family.answers[1:]

    def test_without_offsets(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        family = FAMILIES[name]
        sample, tokenizer = encoded(family, CHAT)
        monkeypatch.setattr(type(tokenizer), "is_fast", False)
        assert encoded(family, CHAT)[0] == sample


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_tools_are_rendered_and_calls_count(name: str) -> None:
    family = WITH_TOOLS[name]
    sample, tokenizer = encoded(family, TOOL_CHAT, tools=TOOLS)
    assert sample["input_ids"] == rendered(tokenizer, TOOL_CHAT, tools=TOOLS)
    assert ('"properties"' in tokenizer.decode(sample["input_ids"])) == ("if tools" in family.template)
    assert counted(sample, tokenizer) == family.calls


def test_variables_of_the_template() -> None:
    family = FAMILIES["granite"]
    documents = [{"title": "t", "text": "The sky is blue."}]
    sample, tokenizer = encoded(family, CHAT, documents=documents)
    assert sample["input_ids"] == rendered(tokenizer, CHAT, documents=documents)
    assert "The sky is blue." in tokenizer.decode(sample["input_ids"])

    family = FAMILIES["gpt-oss"]
    sample, tokenizer = encoded(family, CHAT, chat_template_kwargs={"reasoning_effort": "high"})
    assert "Reasoning: high" in tokenizer.decode(sample["input_ids"])

    # What the generation prompt holds is given to the model, and does not count.
    family = FAMILIES["qwen3"]
    answer = [CHAT[0], {"role": "assistant", "content": "4"}]
    sample, tokenizer = encoded(family, answer, chat_template_kwargs={"enable_thinking": False})
    assert counted(sample, tokenizer) == ("4<|im_end|>\n",)
    assert counted(encoded(family, answer)[0], tokenizer) == ("<think>\n\n</think>\n\n4<|im_end|>\n",)


def test_tools_may_be_json_text() -> None:
    import json

    family = FAMILIES["qwen3"]
    assert encoded(family, TOOL_CHAT, tools=json.dumps(TOOLS))[0] == encoded(family, TOOL_CHAT, tools=TOOLS)[0]


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({"tools": "[{"}, r"row 1, column 'tools' is a string that is not JSON .*; give JSON"),
        ({"tools": "3"}, r"row 1, column 'tools' must be a list of objects"),
        ({"documents": ["x"]}, r"row 1, column 'documents' must be a list of objects"),
        ({"chat_template_kwargs": [1]}, r"row 1, column 'chat_template_kwargs' must be an object"),
    ],
)
def test_bad_variables(columns: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        encoded(FAMILIES["qwen3"], CHAT, **columns)


@pytest.mark.parametrize("name", ["chatml", "qwen3", "deepseek-r1"])
def test_thinking_in_a_column_of_its_own(name: str) -> None:
    family = FAMILIES[name]
    chat = [CHAT[0], {"role": "assistant", "content": "4", "reasoning_content": "add"}]
    sample, tokenizer = encoded(family, chat)
    assert sample["input_ids"] == rendered(tokenizer, chat)
    [part] = counted(sample, tokenizer)
    assert part.startswith("<think>\nadd\n</think>\n\n4" if name == "qwen3" else "4")


def test_turns_that_the_template_leaves_out(caplog: pytest.LogCaptureFixture) -> None:
    family = Family("{% for m in messages[-2:] %}{{ m.content }};{% endfor %}", ("<end>",), ())
    sample, tokenizer = encoded(family, CHAT)
    assert counted(sample, tokenizer) == (f"{CHAT[3]['content']};",)
    assert "1 assistant turns do not count: the chat template does not render them" in caplog.text


@pytest.mark.parametrize(
    "template",
    ["{{ 1 / 0 }}", "{{ messages[9].content }}", "{% if %}", "{{ messages | unknown }}", "{{ 'x' + 1 }}"],
)
def test_templates_that_fail_are_one_line(template: str) -> None:
    with pytest.raises(InputError, match=r"`rows`: row 1: the chat template of `tokenizer` refuses") as caught:
        encoded(Family(template, ("<end>",), ()), CHAT)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FAMILIES)
def test_random_chats(name: str) -> None:
    """Answers count whole, and questions and results of tools never do, for any pieces of text."""
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    random = Random(name)
    pieces = [
        "a",
        "\u00e9",
        "\U0001f600",
        " ",
        "\n",
        "<",
        ">",
        "}",
        '"',
        "]",
        "assistant",
        "</think>",
        *family.special,
    ]

    def text(tag: str) -> str:
        return f"{tag}{''.join(random.choices(pieces, k=random.randint(0, 6)))}{tag}"

    for _ in range(15):
        chat: list[dict[str, Any]] = []
        for turn in range(random.randint(1, 4)):
            chat.append({"role": "user", "content": text("QQ")})
            if family.calls and random.random() < 0.4:
                call = {"name": "look", "arguments": {"city": text("CC")}}
                chat.append({**TOOL_CHAT[1], "tool_calls": [{**TOOL_CHAT[1]["tool_calls"][0], "function": call}]})
                chat.append({**TOOL_CHAT[2], "content": text("RR")})
            chat.append({"role": "assistant", "content": text(f"A{turn}A")})
        sample, _ = encoded(family, chat)
        whole = tokenizer.decode(sample["input_ids"])
        parts = "".join(counted(sample, tokenizer))
        assert sample["input_ids"] == rendered(tokenizer, chat)
        assert "QQ" not in parts and "RR" not in parts
        assert all(parts.count(tag) == whole.count(tag) for tag in ("CC", "A0A", "A1A", "A2A", "A3A"))
