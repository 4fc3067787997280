"""Token ids, labels, truncation and rows that are dropped."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from plop_ext.data import Encoded, counted_tokens, encode
from plop_ext.errors import InputError
from tests.support.tiny_lm import BOS, EOS, byte_tokenizer, ids

# One marks the assistant's turns for the tokenizer, the other one leaves finding them to us.
MARKED = (
    "{% for m in messages %}{{ m['role'] }}:{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }};"
    "{% endgeneration %}{% else %}{{ m['content'] }};{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
UNMARKED = (
    "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
# Drops what an assistant thought once the chat goes on, and opens the thinking in the generation prompt.
FORGETFUL = (
    "{% for m in messages %}{{ m['role'] }}:{% if m['role'] == 'assistant' and loop.last %}<{{ m['content'] }}>"
    "{% else %}{{ m['content'] }}{% endif %};{% endfor %}{% if add_generation_prompt %}assistant:<{% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}{% endfor %}x"
)
CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "so"},
    {"role": "assistant", "content": "ok"},
]
LABELS = {"mask": "completion"}


def marks(sample: Encoded, tokenizer: Any) -> str:
    """The text of a sample with `_` for each token that does not count."""
    pairs = zip(sample["input_ids"], sample["labels"], strict=True)
    return "".join("_" if label == -100 else tokenizer.decode([token]) for token, label in pairs)


class TestEncode:
    def test_text(self) -> None:
        tokenizer = byte_tokenizer()
        [sample] = encode([{"text": "a b\n"}], tokenizer)
        assert sample["input_ids"] == [BOS, *ids(tokenizer, "a b\n")]
        assert sample["labels"] == sample["input_ids"] and sample["labels"] is not sample["input_ids"]
        assert counted_tokens(sample) == 4

    @pytest.mark.parametrize("sequence_end", [False, True])
    def test_prompt_and_completion(self, sequence_end: bool) -> None:
        tokenizer = byte_tokenizer(sequence_end=sequence_end)
        [sample] = encode([{"prompt": "2+2=", "completion": "4\n"}], tokenizer, mask="completion")
        prompt, completion = [BOS, *ids(tokenizer, "2+2=")], [*ids(tokenizer, "4\n"), EOS]
        assert sample["input_ids"] == prompt + completion
        assert sample["labels"] == [-100] * len(prompt) + completion
        assert counted_tokens(sample) == 3

    def test_prompt_that_itself_ends_with_the_end_token(self) -> None:
        tokenizer = byte_tokenizer()
        [sample] = encode([{"prompt": "a</s>", "completion": "b</s>"}], tokenizer)
        assert sample["input_ids"] == [BOS, *ids(tokenizer, "a"), EOS, *ids(tokenizer, "b"), EOS]

    @pytest.mark.parametrize("template", [MARKED, UNMARKED])
    def test_chat_counts_the_assistant(self, template: str) -> None:
        tokenizer = byte_tokenizer(template=template)
        [sample] = encode([{"messages": CHAT}], tokenizer, mask="completion")
        assert sample["input_ids"] == ids(tokenizer, "user:hi;assistant:yo;user:so;assistant:ok;")
        assert marks(sample, tokenizer) == "_" * 18 + "yo;" + "_" * 18 + "ok;"

    def test_chat_whose_template_rewrites_earlier_turns(self, caplog: pytest.LogCaptureFixture) -> None:
        tokenizer = byte_tokenizer(template=FORGETFUL)
        [sample] = encode([{"messages": CHAT}], tokenizer)
        assert marks(sample, tokenizer) == "_" * 18 + "yo" + "_" * len(";user:so;assistant:<") + "ok>;"
        assert not caplog.records

    def test_chat_with_a_slow_tokenizer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tokenizer = byte_tokenizer(template=MARKED)
        fast = encode([{"messages": CHAT}], tokenizer)
        monkeypatch.setattr(type(tokenizer), "is_fast", False)
        assert encode([{"messages": CHAT}], tokenizer) == fast

    def test_prompt_and_completion_as_messages(self) -> None:
        tokenizer = byte_tokenizer(template=UNMARKED)
        [sample] = encode([{"prompt": CHAT[:3], "completion": CHAT[3:]}], tokenizer, mask="completion")
        assert marks(sample, tokenizer) == "_" * len("user:hi;assistant:yo;user:so;assistant:") + "ok;"

    def test_truncation_keeps_the_start_and_is_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        tokenizer = byte_tokenizer()
        rows = [
            {"prompt": "ab", "completion": "cdef"},
            {"prompt": "abcdef", "completion": "g"},
            {"prompt": "a", "completion": "b"},
        ]
        with caplog.at_level(logging.WARNING):
            first, last = encode(rows, tokenizer, mask="completion", max_length=5)
        assert first["input_ids"] == [BOS, *ids(tokenizer, "abcd")]
        assert first["labels"] == [-100, -100, -100, *ids(tokenizer, "cd")]
        assert last["input_ids"] == [BOS, *ids(tokenizer, "ab"), EOS]
        assert "2 of 3 samples were truncated to `max_length` = 5 tokens" in caplog.text
        assert "1 of 3 samples were dropped: no token to count" in caplog.text

    def test_long_samples_cause_no_warning_of_the_tokenizer(
        self, caplog: pytest.LogCaptureFixture, capfd: Any
    ) -> None:
        tokenizer = byte_tokenizer(template=UNMARKED)
        tokenizer.model_max_length = 4
        encode([{"text": "abcdefgh"}], tokenizer)
        encode([{"messages": CHAT}], tokenizer)
        assert not caplog.records and capfd.readouterr() == ("", "")

    @pytest.mark.parametrize(
        ("rows", "options", "match"),
        [
            ([], {}, "`rows` is empty"),
            (
                [{"text": "x"}],
                {"mask": "completion"},
                r"`mask`='completion' needs .* the rows are plain text .*; leave",
            ),
            ([{"text": "x"}], {"mask": "labels"}, r"`mask` must be one of attention, completion, got 'labels'"),
            ([{"text": "x"}], {"max_length": 0}, r"`max_length` must be at least 1, got 0"),
            (
                [{"prompt": "abcdef", "completion": "g"}],
                {"max_length": 4} | LABELS,
                r"no row .* in prompts and completions .* within `max_length` = 4; give .* shorter prompts",
            ),
            ([{"messages": CHAT[:1]}], LABELS, r"no row .* in chats \(`messages`\).* chats with an assistant turn"),
        ],
    )
    def test_bad_arguments(self, rows: list[dict[str, Any]], options: dict[str, Any], match: str) -> None:
        with pytest.raises(InputError, match=match) as caught:
            encode(rows, byte_tokenizer(template=UNMARKED), **options)
        assert "\n" not in str(caught.value)

    def test_no_chat_template(self) -> None:
        with pytest.raises(InputError, match=r"`tokenizer` has no chat template for messages; use the tokenizer of a"):
            encode([{"messages": CHAT}], byte_tokenizer())

    @pytest.mark.parametrize(("bos", "end"), [(False, False), (True, False), (True, True)])
    def test_texts_of_special_tokens_alone_are_left_out(self, bos: bool, end: bool) -> None:
        tokenizer = byte_tokenizer(bos=bos, sequence_end=end)
        with pytest.raises(InputError, match=r"no row has a token to count in plain text \(`text`\)"):
            encode([{"text": ""}, {"text": "</s>"}], tokenizer)
        assert len(encode([{"text": ""}, {"text": "a"}], tokenizer)) == 1

    @pytest.mark.parametrize(
        ("row", "length"),
        [({"messages": CHAT[:1]}, 99), ({"prompt": "abcdef", "completion": "g"}, 4), ({"text": "abcdef"}, 2)],
    )
    def test_without_a_mask_of_completions_every_token_counts(self, row: dict[str, Any], length: int) -> None:
        [sample] = encode([row], byte_tokenizer(template=UNMARKED), max_length=length)
        assert sample["input_ids"] and (counted_tokens(sample) == 0 or "text" in row)

    def test_an_unknown_token_is_text(self) -> None:
        tokenizer = byte_tokenizer()
        tokenizer.unk_token = "a"
        assert tokenizer.convert_tokens_to_ids("a") in tokenizer.all_special_ids
        assert len(encode([{"text": "aa"}], tokenizer)) == 1

    def test_template_that_refuses(self) -> None:
        rows = [{"messages": CHAT}, {"messages": [{"role": "system", "content": "x"}]}]
        with pytest.raises(InputError, match=r"`rows`: row 2: the chat template of `tokenizer` refuses .*no system"):
            encode(rows, byte_tokenizer(template=STRICT))


def test_an_answer_that_the_template_renders_twice_does_not_count(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[-1]['content'] }}|" + UNMARKED
    with caplog.at_level(logging.WARNING):
        (sample,) = encode([{"messages": CHAT}], tokenizer, **LABELS)
    assert "1 assistant turn" in caplog.text
    assert [label for label in sample["labels"] if label != -100] == ids(tokenizer, "yo")
