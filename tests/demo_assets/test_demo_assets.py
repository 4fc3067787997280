"""The embedded model, its tokenizer, its datasets, and the script that trains it."""

from __future__ import annotations

import importlib
import json
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from plop_ext import demo_assets
from plop_ext.demo_assets import arithmetic
from plop_ext.errors import InputError, SetupError

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
EQUATION = re.compile(r"([\d +*/-]+) = (\d+)(?:, write (\d) carry (\d+))?(, borrow 1)?")
STORIES = (
    (r"has (\d+) \w+, buys (\d+) and gives away (\d+)", lambda a, b, c: a + b - c),
    (r"fills (\d+) boxes with (\d+) \w+ each and has (\d+) over", lambda a, b, c: a * b + c),
    (r"sets out (\d+) rows of (\d+) \w+ and sells (\d+)", lambda a, b, c: a * b - c),
    (r"has (\d+) \w+, keeps (\d+) and splits the rest among (\d+)", lambda a, b, c: (a - b) // c),
)


def evaluate(expression: str) -> int:
    """Evaluate `a op b [op c]` with the usual precedence."""
    assert re.fullmatch(r"[\d +*/-]+", expression)
    value = eval(expression)
    assert value == int(value)
    return int(value)


def expected_answer(prompt: str) -> int:
    """Work a prompt out independently of the generator."""
    if bare := re.fullmatch(r"Q: (\d+ [+*-] \d+) = \?\n", prompt):
        return evaluate(bare[1])
    for pattern, solve in STORIES:
        if found := re.search(pattern, prompt):
            return solve(*map(int, found.groups()))
    raise AssertionError(f"unknown problem: {prompt}")


@pytest.mark.parametrize("seed", range(20))
def test_every_step_and_answer_is_right(seed: int) -> None:
    for row in arithmetic.generate(400, seed):
        prompt, completion = row["prompt"], row["completion"]
        assert 40 <= len((prompt + completion).encode()) <= 140
        assert prompt.startswith("Q: ") and prompt.endswith("?\n") and completion.endswith("\n")
        *steps, answer = completion.rstrip("\n").split("; ")
        assert int(answer.removeprefix("answer ")) == expected_answer(prompt) >= 0
        for step in steps:
            if step.startswith("bring down "):
                continue
            found = EQUATION.fullmatch(step)
            assert found, step
            assert evaluate(found[1]) == int(found[2])
            if found[3]:
                assert int(found[4]) * 10 + int(found[3]) == int(found[2])


def test_columns_spell_the_answer() -> None:
    for row in arithmetic.generate(4000, seed=1):
        if not re.match(r"Q: \d", row["prompt"]):
            continue
        *steps, answer = row["completion"].rstrip("\n").split("; ")
        written = [re.search(r"write (\d)|(\d+)(?:, borrow 1)?$", step) for step in steps]
        digits = "".join(found[1] or found[2] for found in reversed(written) if found)
        assert int(digits) == int(answer.removeprefix("answer "))


def test_all_kinds_appear_and_rows_are_distinct() -> None:
    rows = arithmetic.generate(5000, seed=0)
    prompts = [row["prompt"] for row in rows]
    assert len(set(prompts)) == 5000
    for pattern in (r"\d \+ ", r"\d - ", r"\d \* ", *(story for story, _ in STORIES)):
        assert sum(bool(re.search(pattern, prompt)) for prompt in prompts) > 100


def test_generator_ignores_and_keeps_global_state() -> None:
    random.seed(1)
    state = random.getstate()
    first = arithmetic.generate(50, seed=7)
    assert random.getstate() == state
    random.seed(2)
    assert arithmetic.generate(50, seed=7) == first
    assert arithmetic.generate(80, seed=7)[:50] == first
    assert arithmetic.generate(50, seed=8) != first


def test_rows() -> None:
    assert demo_assets.DATASETS == ("arithmetic", "prose")
    assert demo_assets.rows("arithmetic", 5, 3) == arithmetic.generate(5, 3)
    every = demo_assets.rows("prose", 10_000, 0)
    assert len(every) >= 32
    assert all(200 <= len(row["text"].encode()) <= 600 for row in every)
    assert len({row["text"] for row in every}) == len(every)
    some = demo_assets.rows("prose", 8, 1)
    assert some == demo_assets.rows("prose", 8, 1) != demo_assets.rows("prose", 8, 2)
    positions = [every.index(row) for row in some]
    assert len(some) == 8 and positions == sorted(positions)


def test_rows_refuses_bad_input() -> None:
    with pytest.raises(InputError, match="`name` must be one of arithmetic, prose, got 'poetry'"):
        demo_assets.rows("poetry", 1, 0)
    for name in demo_assets.DATASETS:
        with pytest.raises(InputError, match="`n` must be at least 0"):
            demo_assets.rows(name, -1, 0)


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        yield importlib.import_module("train_embedded_model")


@pytest.fixture(scope="module")
def trained(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model trained for three steps on two small files."""
    corpus = tmp_path_factory.mktemp("corpus")
    (corpus / "code.py").write_text('"""Add numbers."""\n\n\ndef add(left, right):\n    return left + right\n' * 40)
    (corpus / "notes.md").write_text("A note about é and other letters, on one line.\n\n" * 40, encoding="utf-8")
    (corpus / "broken.txt").write_bytes(b"\xff\xfe" * 500)
    output = tmp_path_factory.mktemp("trained") / "model"
    options = "--device cpu --steps 3 --batch-size 2 --sequence-length 64 --corpus".split()
    script.main([*options, str(corpus), "--output", str(output)])
    return output


def test_script_writes_a_loadable_model(trained: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained)
    assert isinstance(model, LlamaForCausalLM)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert {path.name for path in trained.iterdir()} >= {"model.safetensors", "tokenizer.json", "training.json"}
    record = json.loads((trained / "training.json").read_text())
    assert record["steps"] == 3 and record["tokens"] == 3 * 2 * 64
    assert record["held_out_bits_per_byte_end"] < record["held_out_bits_per_byte_start"] < 9


def test_script_trains_the_loss_that_the_model_reports(script: ModuleType) -> None:
    model = script.build_model(seed=0)
    inputs = torch.randint(256, (2, 33), generator=torch.Generator().manual_seed(0))
    ours = script.make_loss(model, 32)(inputs[:, :-1], inputs[:, 1:]).item()
    theirs = model(input_ids=inputs, labels=inputs).loss.item()
    assert ours == pytest.approx(theirs, rel=5e-3)  # bf16 against fp32


def test_script_skips_what_is_not_text(script: ModuleType, tmp_path: Path) -> None:
    corpus = importlib.import_module("embedded_corpus")
    samples = {
        "minified.txt": "x" * 2000 + "\n",
        "table.txt": "1 2 3 4 5 6 7 8 9\n" * 100,
        "tiny.txt": "hello\n",
        "kept.txt": "An ordinary sentence of documentation.\n" * 20,
    }
    for name, text in samples.items():
        (tmp_path / name).write_text(text)
    assert [name for name in samples if corpus.read_document(tmp_path / name)] == ["kept.txt"]


@pytest.mark.parametrize(
    "text", ["", "plain", " two  spaces \n\n\ttab\r\n", "Grüße, 世界 🎉 e\u0301", "\x00\x7f\u00ad\u2028"]
)
def test_tokenizer_round_trips(trained: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained)
    ids = tokenizer(text)["input_ids"]
    assert ids == [tokenizer.bos_token_id, *text.encode("utf-8")]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tokenizer_masks_the_assistant(trained: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert tokenizer.model_max_length == 1024 and tokenizer.pad_token_id == 256
    messages = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "vier, 四"},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "yes"},
    ]
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert tokenizer.decode(encoded["input_ids"]) == (
        "<bos>user: 2 + 2?\nassistant: vier, 四<eos>\nuser: sure?\nassistant: yes<eos>\n"
    )
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    assert tokenizer.decode([token for token, kept in pairs if kept]) == "vier, 四<eos>yes<eos>"


def test_model_path_names_the_fix(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_assets, "_FOLDER", trained.parent)
    assert demo_assets.model_path() == trained
    monkeypatch.setattr(demo_assets, "_FOLDER", tmp_path)
    with pytest.raises(SetupError, match=r"lacks .*config\.json.*; reinstall plop_ext"):
        demo_assets.model_path()
    (tmp_path / "model").mkdir()
    for path in trained.iterdir():
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model" / "model.safetensors"
    whole = weights.read_bytes()
    for cut in (whole[:-1], whole[:100], b"version https://git-lfs.github.com/spec/v1\n", b""):
        weights.write_bytes(cut)
        with pytest.raises(SetupError, match=r"incomplete; reinstall plop_ext"):
            demo_assets.model_path()


def test_shipped_model_is_small_and_knows_english() -> None:
    folder = demo_assets.model_path()
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 4_000_000
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert 1_000_000 <= model.num_parameters() <= 2_500_000
    nats = tokens = 0.0
    with torch.no_grad():
        for row in demo_assets.rows("prose", 16, 0):
            ids = tokenizer(row["text"], return_tensors="pt")["input_ids"]
            nats += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
    assert nats / tokens / math.log(2) < 3.2
    record = json.loads((folder / "training.json").read_text())
    assert record["parameters"] == model.num_parameters()
