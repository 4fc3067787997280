"""Token ids and labels equal those that TRL's `SFTTrainer` prepares, wherever TRL is installed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from plop_ext.data import encode
from tests.support.chat_templates import CHAT, FAMILIES, TOOL_CHAT, TOOLS
from tests.support.tiny_lm import byte_tokenizer

trl = pytest.importorskip("trl")
SHAREGPT = [{"from": message["role"], "value": message["content"]} for message in CHAT]


def prepared(row: dict[str, Any], tokenizer: Any, *, assistant_only: bool = False) -> dict[str, list[int]]:
    """What SFTTrainer makes of a row, without a model to train."""
    import datasets

    # An argument of the preparation is the trainer, of which it reads only this.
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss="prompt" in row)
    config = SimpleNamespace(
        dataset_num_proc=None,
        dataset_text_field="text",
        assistant_only_loss=assistant_only,
        max_length=None,
        shuffle_dataset=False,
    )
    rows = datasets.Dataset.from_list([row])
    [sample] = trl.SFTTrainer._prepare_dataset(trainer, rows, tokenizer, config, False, None, "train")
    return {"input_ids": sample["input_ids"], "labels": sample["labels"]}


def ours(row: dict[str, Any], tokenizer: Any) -> dict[str, list[int]]:
    [sample] = encode([row], tokenizer, max_length=100_000)
    return {"input_ids": sample["input_ids"], "labels": sample["labels"]}


@pytest.mark.parametrize("name", FAMILIES)
class TestFamilies:
    @pytest.mark.parametrize("row", [{"messages": CHAT}, {"conversations": SHAREGPT}], ids=["messages", "sharegpt"])
    def test_chats(self, name: str, row: dict[str, Any]) -> None:
        tokenizer = FAMILIES[name].tokenizer()
        assert ours(row, tokenizer)["input_ids"] == prepared(row, tokenizer)["input_ids"]

    def test_prompts_and_completions(self, name: str) -> None:
        tokenizer = FAMILIES[name].tokenizer()
        row = {"prompt": CHAT[:3], "completion": CHAT[3:]}
        assert ours(row, tokenizer) == prepared(row, tokenizer)

    def test_tools_and_variables(self, name: str) -> None:
        family = FAMILIES[name]
        tokenizer = family.tokenizer()
        row: dict[str, Any] = {"messages": TOOL_CHAT if family.calls else CHAT, "tools": TOOLS}
        row["chat_template_kwargs"] = {"reasoning_effort": "high", "enable_thinking": False}
        assert ours(row, tokenizer)["input_ids"] == prepared(row, tokenizer)["input_ids"]


def test_marked_turns() -> None:
    tokenizer = FAMILIES["marked"].tokenizer()
    assert ours({"messages": CHAT}, tokenizer) == prepared({"messages": CHAT}, tokenizer, assistant_only=True)


@pytest.mark.parametrize("bos", [False, True])
def test_strings(bos: bool) -> None:
    tokenizer = byte_tokenizer(bos=bos)
    for row in ({"prompt": "2+2=", "completion": "4"}, {"prompt": "a", "completion": "b</s>"}):
        assert ours(row, tokenizer) == prepared(row, tokenizer)


def test_token_ids() -> None:
    row = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    assert ours(row, byte_tokenizer()) == prepared(row, byte_tokenizer())
