"""Loading a model: whole, or one line that says why not."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from plop_ext.errors import InputError, SetupError
from plop_ext.models import load_model
from tests.support.edited_checkpoint import edit_config, edit_weights, write_llama
from tests.support.tiny_lm import byte_tokenizer, tiny_llama

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "llama"))


def test_loads_weights_and_tokenizer(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = load_model(str(saved), device="cpu")
    expected = tiny_llama(torch.bfloat16).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert not model.training and model.dtype == torch.bfloat16 and tokenizer.pad_token == "<pad>"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"for_training": True}, torch.float32),
        ({"for_training": True, "dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": torch.float64}, torch.float64),
        ({"dtype": "float16"}, torch.float16),
    ],
)
def test_types(saved: Path, options: dict[str, Any], dtype: torch.dtype) -> None:
    assert load_model(str(saved), device="cpu", **options)[0].dtype == dtype


@pytest.mark.parametrize(
    ("in_config", "pad"),
    [
        ({}, "<pad>"),
        ({"pad_token_id": 1}, "<s>"),
        ({"pad_token_id": None}, "</s>"),
        ({"pad_token_id": None, "eos_token_id": [1, 2]}, "<s>"),
        ({"pad_token_id": -1}, "</s>"),
        ({"pad_token_id": None, "eos_token_id": None}, "<pad>"),  # token 0
        ({"pad_token_id": None, "eos_token_id": 10**6}, "<pad>"),
    ],
)
def test_padding_without_a_tokenizer_config(copy: Path, in_config: dict[str, Any], pad: str) -> None:
    """By the token of config.json, or the end token, or token 0; no token is cut out of texts because it pads."""
    (copy / "tokenizer_config.json").unlink()
    (copy / "generation_config.json").unlink()
    edit_config(copy, **in_config)
    tokenizer = load_model(str(copy), device="cpu")[1]
    assert tokenizer.pad_token == pad
    text = "a text </s> with \u00fc and <pad>"
    assert tokenizer(text)["input_ids"] == byte_tokenizer()(text)["input_ids"]


def test_padding_falls_back_to_the_end_token(copy: Path) -> None:
    path = copy / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "pad_token"}))
    edit_config(copy, pad_token_id=None)
    assert load_model(str(copy), device="cpu")[1].pad_token == "</s>"


@pytest.mark.parametrize("family", ["Qwen2", "Gemma3Text", "GPT2"])
def test_a_tokenizer_json_alone_is_read_as_it_is(family: str, tmp_path: Path) -> None:
    """Not by the rules of the tokenizer class that transformers has for the type of the model."""
    import transformers

    sizes = {"vocab_size": 259, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = getattr(transformers, f"{family}Config")(**sizes, num_key_value_heads=2, intermediate_size=16)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    text = "It's  1234 w\u00f6rds,\nand\ttabs"
    assert load_model(str(tmp_path), device="cpu")[1](text)["input_ids"] == byte_tokenizer()(text)["input_ids"]


def test_attention_kernel(saved: Path) -> None:
    model, _ = load_model(str(saved), device="cpu", attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


def test_tied_weights_are_not_missing(copy: Path) -> None:
    edit_weights(copy, lambda weights: weights.pop("lm_head.weight"))
    edit_config(copy, tie_word_embeddings=True)
    model, _ = load_model(str(copy), device="cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_encoders_load_as_what_they_are(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM, BertModel

    config = BertConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    for kind in (BertModel, BertForMaskedLM):
        kind(config).save_pretrained(tmp_path / kind.__name__)
        byte_tokenizer().save_pretrained(tmp_path / kind.__name__)
        assert type(load_model(str(tmp_path / kind.__name__), device="cpu")[0]) is kind


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (cut, r"model.safetensors` is truncated: \d+ bytes of \d+; download or save it again"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), r"is truncated: it ends within its header"),
        (lambda f: (f / "model.safetensors").unlink(), r"the weights cannot be loaded \(.*no file named"),
        (
            lambda f: edit_weights(f, lambda weights: weights.pop(UP)),
            rf"the checkpoint lacks 1 of the weights of LlamaForCausalLM, such as {UP}; download",
        ),
        (
            lambda f: edit_weights(f, lambda weights: weights.update({UP: torch.zeros(3, 3)})),
            rf"the checkpoint holds {UP} as \(3, 3\), and config\.json asks for \(48, 32\); download",
        ),
        (lambda f: edit_config(f, num_hidden_layers=3), r"the checkpoint lacks 9 of the weights"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json cannot be used \(.*not a valid JSON"),
        (lambda f: edit_config(f, model_type="nope"), r"config\.json cannot be used \(.*`nope`"),
        (
            lambda f: (f / "config.json").unlink(),
            r"holds no model: it has no config\.json; give a folder that has one",
        ),
        (lambda f: (f / "tokenizer.json").write_text("{"), r"the tokenizer cannot be loaded \("),
    ],
)
def test_damaged_folders(copy: Path, damage: Callable[[Path], Any], match: str, capfd: Any) -> None:
    damage(copy)
    with pytest.raises(InputError, match=match) as caught:
        load_model(str(copy), device="cpu")
    assert str(copy) in str(caught.value) and "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_folder_without_a_tokenizer(copy: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    with pytest.raises(InputError, match="the tokenizer cannot be loaded"):
        load_model(str(copy), device="cpu")


def test_adapter_folder(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    with pytest.raises(SetupError, match="is an adapter for 'some/base', which cannot be loaded: is no local folder"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("name", ["/no/where", "./nowhere", "a/b/c", "~/no/where", " "])
def test_no_such_folder(name: str) -> None:
    with pytest.raises(InputError, match=r"`name_or_path` .*: no such folder; check the path"):
        load_model(name)


def test_file_instead_of_a_folder(saved: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json is a file; give the folder that holds"):
        load_model(str(saved / "config.json"))


def test_hub_offline_is_one_quick_line(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    def refuse(*args: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(
        SetupError, match="`name_or_path` 'owner/name' is no local folder, and the hub cannot be reached"
    ):
        load_model("owner/name")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"dtype": "int8"}, InputError, "`dtype` 'int8' is no floating-point type; give auto, float32"),
        ({"dtype": "nope"}, InputError, "`dtype` 'nope' is no floating-point type"),
        ({"device": "nope"}, InputError, "`device` 'nope' is no device; give cpu, cuda or cuda:N"),
        ({"device": "cuda:99"}, SetupError, r"`device` cuda:99: torch sees \d+ CUDA devices; use another, or cpu"),
        ({"device": "cpu", "attn_implementation": "nope"}, InputError, "`attn_implementation` does not suit .*nope"),
    ],
)
def test_arguments(saved: Path, options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match) as caught:
        load_model(str(saved), **options)
    assert "\n" not in str(caught.value)
