"""Rows, token ids, labels and batches."""

from __future__ import annotations

import json
import logging
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from plop_ext.data import Encoded, batches, counted_tokens, encode, load_rows
from plop_ext.errors import InputError, SetupError
from tests.support.tiny_lm import BOS, EOS, PAD, byte_tokenizer, ids

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
SAMPLES = [
    Encoded(input_ids=[5], labels=[5]),
    Encoded(input_ids=[6, 7, 8], labels=[-100, 7, 8]),
    Encoded(input_ids=[9, 9], labels=[9, 9]),
]


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def marks(sample: Encoded, tokenizer: Any) -> str:
    """The text of a sample with `_` for each token that does not count."""
    pairs = zip(sample["input_ids"], sample["labels"], strict=True)
    return "".join("_" if label == -100 else tokenizer.decode([token]) for token, label in pairs)


class TestLoadRows:
    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("a.jsonl", '{"text": "x\\u2028y"}\n\n{"text": "z"}\n'),
            ("a.json", '[{"text": "x\\u2028y"},\n {"text": "z"}]'),
            ("lines.json", '{"text": "x\\u2028y"}\n{"text": "z"}'),
            ("a.csv", "text\nx\u2028y\nz\n"),
            ("bom.csv", "\ufefftext\r\nx\u2028y\r\nz\r\n"),
            ("a.txt", "x\u2028y\n\n   \nz\n"),
            ("A.TXT", "x\u2028y\r\nz"),
        ],
    )
    def test_formats_agree(self, tmp_path: Path, name: str, text: str) -> None:
        assert load_rows(write(tmp_path / name, text)) == [{"text": "x\u2028y"}, {"text": "z"}]

    def test_parquet(self, tmp_path: Path) -> None:
        import pyarrow.parquet

        rows = [{"text": "x", "n": 1, "messages": CHAT}, {"text": None, "n": 2, "messages": []}]
        path = tmp_path / "split=train" / "a.parquet"
        path.parent.mkdir()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        assert load_rows(str(path)) == rows

    def test_csv_with_quotes_and_a_long_field(self, tmp_path: Path) -> None:
        long = "a" * 200_000
        path = write(tmp_path / "a.csv", f'prompt,completion\n"a, ""b""\nc",{long}\n')
        assert load_rows(path) == [{"prompt": 'a, "b"\nc', "completion": long}]

    @pytest.mark.parametrize(
        ("name", "text", "match"),
        [
            ("a.jsonl", '{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2: not JSON .*; put one object on each line"),
            ("a.jsonl", '{"text": "x"}\n["y"]\n', r"a\.jsonl, line 2: a row must be a JSON object, got list"),
            ("a.json", '[{"text": "x"},\n{"text" "y"}]', r"a\.json, line 2: not JSON"),
            ("a.json", '[{"text": "x"}, 3]', r"a\.json, item 2: a row must be a JSON object, got int"),
            ("a.json", '{\n"data": []}', r"a\.json, line 1: not JSON"),
            ("a.csv", "a,b\n1,2\n3\n", r"a\.csv, line 3: fewer fields than the 2 of the header; quote"),
            ("a.csv", "a,b\n1,2,3\n", r"a\.csv, line 2: more fields than the 2 of the header; quote"),
            ("a.csv", 'a,b\n1,"2" x\n', r"a\.csv, line 2: not CSV"),
            ("a.parquet", "PAR1 no more", r"a\.parquet is not a readable parquet file"),
            ("a.xlsx", "x", r"unknown extension '\.xlsx'; give one of \.jsonl, \.json, \.csv, \.parquet, \.txt"),
            ("a.jsonl", "\n\n", r"a\.jsonl holds no rows"),
            ("a.txt", "", r"a\.txt holds no rows"),
            ("a.csv", "text\n", r"a\.csv holds no rows"),
        ],
    )
    def test_bad_files(self, tmp_path: Path, name: str, text: str, match: str) -> None:
        with pytest.raises(InputError, match=match) as caught:
            load_rows(write(tmp_path / name, text))
        assert str(caught.value).startswith("`source` ") and "\n" not in str(caught.value)

    def test_bad_bytes(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(b"abc\xff")
        with pytest.raises(InputError, match=r"a\.txt is not UTF-8 text \(byte 3\); convert it"):
            load_rows(str(tmp_path / "a.txt"))

    @pytest.mark.parametrize("source", ["nowhere.jsonl", "./nowhere", "a/b/c", "~/x/y.json", "", "two words"])
    def test_no_such_file(self, source: str) -> None:
        with pytest.raises(InputError, match="no such file; check the path"):
            load_rows(source)

    def test_folder(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="is a folder; name a file in it"):
            load_rows(str(tmp_path))

    def test_hub_offline_is_one_quick_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import datasets
        import huggingface_hub

        def refuse(*args: object) -> None:
            raise socket.gaierror(-2, "Name or service not known")

        for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(socket, "getaddrinfo", refuse)
        before = (datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE)
        with pytest.raises(SetupError, match=r"`source` 'owner/name' is no local file, .* give the path of a file"):
            load_rows("owner/name")
        assert (datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE) == before

    def test_subset_is_seeded_and_keeps_the_order(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.txt", "\n".join(map(str, range(100))))
        chosen = [int(row["text"]) for row in load_rows(path, max_samples=10, seed=1)]
        assert chosen == sorted(chosen) and len(set(chosen)) == 10
        assert chosen == [int(row["text"]) for row in load_rows(path, max_samples=10, seed=1)]
        assert chosen != [int(row["text"]) for row in load_rows(path, max_samples=10, seed=2)]
        assert len(load_rows(path, max_samples=1000)) == 100
        with pytest.raises(InputError, match="`max_samples` must be at least 1, got 0"):
            load_rows(path, max_samples=0)

    @pytest.mark.parametrize(("name", "column"), [("arithmetic", "prompt"), ("prose", "text")])
    def test_embedded_splits_share_no_row(self, name: str, column: str) -> None:
        train, test = (load_rows(name, split=split) for split in ("train", "test"))
        assert len(train) > len(test) > 0
        assert not {row[column] for row in train} & {row[column] for row in test}
        assert test == load_rows(name, split="test", seed=5)
        with pytest.raises(InputError, match=f"`split` 'dev': the packaged data set {name} has train and test"):
            load_rows(name, split="dev")

    def test_arithmetic_is_as_long_as_asked_for(self) -> None:
        assert len(load_rows("arithmetic", max_samples=6000)) == 6000


class TestEncode:
    def test_text(self) -> None:
        tokenizer = byte_tokenizer()
        [sample] = encode([{"text": "a b\n"}], tokenizer)
        assert sample["input_ids"] == [BOS, *ids(tokenizer, "a b\n")]
        assert sample["labels"] == sample["input_ids"] and sample["labels"] is not sample["input_ids"]
        assert counted_tokens(sample) == 4

    def test_named_column_beats_the_others(self) -> None:
        tokenizer = byte_tokenizer(bos=False)
        [sample] = encode([{"prompt": "p", "completion": "c", "body": "b"}], tokenizer, column="body")
        assert sample["labels"] == ids(tokenizer, "b")

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
        assert marks(sample, tokenizer) == "_" * len("user:hi;assistant:yo;user:so;assistant:<") + "ok>;"
        assert "1 assistant turns do not count" in caplog.text and "{% generation %}" in caplog.text

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
            ([{"a": "x", "b": "y"}], {}, r"`rows` have none of `messages`.* the rows have `a`, `b`: name .* `column`"),
            ([{"a": "x", "b": "y"}], {"column": "c"}, r"`column` 'c' does not exist; the rows have `a`, `b`"),
            ([], {}, "`rows` is empty"),
            ([{"text": "x"}, {"text": 3}], {}, r"`rows`: row 2, column 'text' must be a string, got int"),
            ([{"text": "x"}, {"body": "y"}], {}, r"`rows`: row 2 lacks the column 'text'; it has `body`"),
            ([{"text": None}], {}, r"row 1, column 'text' must be a string, got NoneType"),
            ([{"messages": "x"}], {}, r"row 1, column 'messages' must be a list of messages, got str"),
            ([{"messages": []}], {}, r"row 1, column 'messages' is an empty list"),
            ([{"messages": ["x"]}], {}, r"row 1, column 'messages': a message must be a dict with `role`"),
            ([{"prompt": "x", "completion": []}], {}, r"row 1, column 'completion' must be a string, got list"),
            ([{"prompt": CHAT, "completion": "x"}], {}, r"column 'completion' must be a list of messages, got str"),
            ([{"text": "x"}], {"mask": "completion"}, r"`mask`='completion' needs .* the rows have `text`: leave"),
            ([{"text": "x"}], {"mask": "labels"}, r"`mask` must be 'attention' or 'completion', got 'labels'"),
            ([{"text": "x"}], {"max_length": 0}, r"`max_length` must be at least 1, got 0"),
            (
                [{"prompt": "abcdef", "completion": "g"}],
                {"max_length": 4} | LABELS,
                r"no row .* in `prompt`.* give prompts",
            ),
            ([{"messages": CHAT[:1]}], LABELS, r"no row .* in `messages`.* give chats with an assistant turn"),
        ],
    )
    def test_bad_rows(self, rows: list[dict[str, Any]], options: dict[str, Any], match: str) -> None:
        with pytest.raises(InputError, match=match) as caught:
            encode(rows, byte_tokenizer(template=UNMARKED), **options)
        assert "\n" not in str(caught.value)

    def test_no_chat_template(self) -> None:
        with pytest.raises(
            InputError, match=r"`tokenizer` has no chat template for `messages`; use the tokenizer of a"
        ):
            encode([{"messages": CHAT}], byte_tokenizer())

    @pytest.mark.parametrize(("bos", "end"), [(False, False), (True, False), (True, True)])
    def test_texts_of_special_tokens_alone_are_left_out(self, bos: bool, end: bool) -> None:
        tokenizer = byte_tokenizer(bos=bos, sequence_end=end)
        with pytest.raises(InputError, match="no row has a token to count in `text`"):
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

    def test_prompt_that_the_template_rewrites(self) -> None:
        template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
        with pytest.raises(InputError, match=r"row 1: the chat template .* renders the prompt differently"):
            encode([{"prompt": CHAT[:1], "completion": CHAT[1:2]}], byte_tokenizer(template=template))


class TestBatches:
    def test_padding_is_exact(self) -> None:
        loader = batches(SAMPLES, batch_size=2, pad_token_id=PAD)
        assert len(loader) == 2
        first, second = loader
        assert first["sample_ids"].tolist() == [1, 2]
        assert first["input_ids"].tolist() == [[6, 7, 8], [9, 9, PAD]]
        assert first["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
        assert first["labels"].tolist() == [[-100, 7, 8], [9, 9, -100]]
        assert second["input_ids"].tolist() == [[5]] and second["sample_ids"].tolist() == [0]
        assert all(value.dtype == torch.int64 for value in first.values())

    def test_padding_to_a_multiple(self) -> None:
        loader = batches(SAMPLES, batch_size=2, pad_token_id=PAD, pad_to_multiple_of=4)
        for batches_ in (loader, loader.in_random_order(0)):
            assert [batch["input_ids"].shape[1] for batch in batches_] == [4, 4]
        first = next(iter(loader))
        assert first["input_ids"].tolist() == [[6, 7, 8, PAD], [9, 9, PAD, PAD]]
        assert first["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
        assert first["labels"].tolist() == [[-100, 7, 8, -100], [9, 9, -100, -100]]
        exact = batches([Encoded(input_ids=[5] * 8, labels=[5] * 8)], pad_token_id=PAD, pad_to_multiple_of=4)
        assert next(iter(exact))["input_ids"].shape == (1, 8)

    @pytest.mark.parametrize("sort", [True, False])
    def test_every_sample_once_and_the_same_again(self, sort: bool) -> None:
        samples = [Encoded(input_ids=[1] * n, labels=[1] * n) for n in (3, 1, 4, 1, 5, 9, 2, 6)]
        loader = batches(samples, batch_size=3, pad_token_id=PAD, sort=sort)
        order = [index for batch in loader for index in batch["sample_ids"].tolist()]
        assert sorted(order) == list(range(8))
        assert order == ([5, 7, 4, 2, 0, 6, 1, 3] if sort else list(range(8)))
        assert order == [index for batch in loader for index in batch["sample_ids"].tolist()]

    def test_bad_arguments(self) -> None:
        with pytest.raises(InputError, match="`encoded` is empty"):
            batches([], pad_token_id=PAD)
        with pytest.raises(InputError, match="`batch_size` must be at least 1, got 0"):
            batches(SAMPLES, batch_size=0, pad_token_id=PAD)
        with pytest.raises(InputError, match="`pad_to_multiple_of` must be at least 1, got 0"):
            batches(SAMPLES, pad_token_id=PAD, pad_to_multiple_of=0)
        with pytest.raises(InputError, match="`pad_token_id` is None; give an id"):
            batches(SAMPLES, pad_token_id=None)


def test_rows_of_a_file_reach_a_batch(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in ("abc", "d")))
    tokenizer = byte_tokenizer()
    [batch] = batches(encode(load_rows(path), tokenizer), pad_token_id=tokenizer.pad_token_id)
    assert batch["input_ids"].tolist() == [[BOS, *ids(tokenizer, "abc")], [BOS, *ids(tokenizer, "d"), PAD, PAD]]


def test_sample_ids_are_the_numbers_of_the_rows_in_the_data_set(tmp_path: Path) -> None:
    path = tmp_path / "d.txt"
    path.write_text("\n".join("abcdefghij"))
    tokenizer = byte_tokenizer()
    rows = load_rows(str(path), max_samples=4, seed=1)
    assert rows.numbers != list(range(4)) and [row["text"] for row in rows] == ["abcdefghij"[i] for i in rows.numbers]
    samples = encode(rows, tokenizer)
    [batch] = batches(samples, pad_token_id=0, sort=False)
    assert batch["sample_ids"].tolist() == rows.numbers
    # The first was dropped; no other sample has its number.
    rows[0]["text"] = ""
    [batch] = batches(encode(rows, tokenizer), pad_token_id=0, sort=False)
    assert batch["sample_ids"].tolist() == rows.numbers[1:]
    shuffled = batches(samples, pad_token_id=0).in_random_order(3)
    assert sorted(next(iter(shuffled))["sample_ids"].tolist()) == rows.numbers
    # Two data sets in one list, whose rows have the same numbers.
    [batch] = batches(samples + samples, pad_token_id=0, sort=False)
    assert batch["sample_ids"].tolist() == list(range(8))
    [batch] = batches(encode(list(rows[1:]), tokenizer), pad_token_id=0, sort=False)
    assert batch["sample_ids"].tolist() == [0, 1, 2]
