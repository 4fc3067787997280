"""Weights read straight to the device are those that transformers loads, or transformers loads them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from plop_ext.errors import InputError
from plop_ext.models import load_model
from plop_ext.models.architecture import build_on_meta, read_config
from plop_ext.models.checkpoint import stored_tensors
from plop_ext.models.code import NO_CODE
from plop_ext.models.direct import EarlyReader, suits
from plop_ext.models.reader import Reader
from plop_ext.models.source import find
from tests.support.architectures import ARCHITECTURES
from tests.support.checkpoint import saved
from tests.support.edited_checkpoint import edit_config, edit_weights, write_llama
from tests.support.tiny_lm import byte_tokenizer

CPU = torch.device("cpu")


def values(model: Any) -> dict[str, Tensor]:
    """Parameters and buffers, those included that no checkpoint holds."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def shared(model: Any) -> list[list[str]]:
    """The names of the parameters that are one."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return sorted(names.values())


def is_suited(folder: Path, dtype: str | torch.dtype = "auto") -> bool:
    source = find(str(folder))
    return suits(build_on_meta("model", read_config(source, NO_CODE), NO_CODE), stored_tensors(folder), dtype)


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> list[Reader]:
    """Lets the CPU be loaded as a CUDA device is; the readers that were taken."""
    taken: list[Reader] = []

    def take(self: EarlyReader) -> Reader:
        taken.append(Reader(CPU))
        return taken[-1]

    monkeypatch.setattr(EarlyReader, "take", take)
    return taken


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_gets_the_weights_of_transformers(
    name: str, tmp_path: Path, direct: list[Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(ARCHITECTURES[name].build(), tmp_path)
    byte_tokenizer().save_pretrained(folder)
    found, _ = load_model(folder, device="cpu")
    assert bool(direct) == is_suited(folder)
    if name in ("llama", "qwen2", "gemma3", "phi3", "bert"):
        assert direct  # else this compares transformers with itself
    monkeypatch.undo()
    expected, _ = load_model(folder, device="cpu")
    assert type(found) is type(expected) and values(found).keys() == values(expected).keys()
    for key, value in values(expected).items():
        assert values(found)[key].dtype == value.dtype and torch.equal(values(found)[key], value), key
    assert shared(found) == shared(expected)
    assert found.config.to_dict() == expected.config.to_dict()
    assert found.name_or_path == expected.name_or_path and not found.training
    if expected.can_generate():
        assert found.generation_config.to_dict() == expected.generation_config.to_dict()


def test_each_weight_has_memory_of_its_own(tmp_path: Path, direct: list[Reader]) -> None:
    model, _ = load_model(write_llama(tmp_path), device="cpu")
    assert direct
    for name, weight in model.named_parameters():
        assert weight.untyped_storage().nbytes() == weight.nbytes, name
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[name], weight) for name, weight in load_file(tmp_path / "model.safetensors").items())


def test_another_type_or_name_or_shape_is_left_to_transformers(tmp_path: Path) -> None:
    folder = write_llama(tmp_path)
    assert is_suited(folder) and is_suited(folder, torch.bfloat16)
    assert not is_suited(folder, torch.float32)
    edit_config(folder, dtype=None)
    assert not is_suited(folder)  # `"auto"` is then found in the files
    edit_config(folder, dtype="bfloat16", vocab_size=999)
    assert not is_suited(folder)


@pytest.mark.parametrize("key", ["extra.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"])
def test_a_key_that_the_model_lacks_is_left_to_transformers(key: str, tmp_path: Path) -> None:
    folder = write_llama(tmp_path)
    edit_weights(folder, lambda weights: weights.update({key: torch.ones(2, dtype=torch.bfloat16)}))
    assert not is_suited(folder)


def test_missing_weights_are_refused_as_ever(tmp_path: Path, direct: list[Reader]) -> None:
    folder = write_llama(tmp_path)
    edit_weights(folder, lambda weights: {key: value for key, value in weights.items() if "up_proj" not in key})
    with pytest.raises(InputError, match=r"the checkpoint lacks 2 of the weights of LlamaForCausalLM, such as model"):
        load_model(folder, device="cpu")
    assert direct


def test_a_file_that_cannot_be_read_ends_in_one_line(
    tmp_path: Path, direct: list[Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_llama(tmp_path)
    begin = Reader.begin

    def cut(self: Reader, *arguments: Any) -> Any:
        os.truncate(folder / "model.safetensors", 2000)
        return begin(self, *arguments)

    monkeypatch.setattr(Reader, "begin", cut)
    with pytest.raises(InputError, match=r"model.safetensors` became shorter while it was read$"):
        load_model(folder, device="cpu")
    assert direct[0]._closed


def test_nothing_is_made_ready_for_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plop_ext.models.direct.Reader", None)
    with EarlyReader(CPU) as early:
        assert early.take() is None


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3", "mixtral", "bert"])
def test_a_cuda_device_gets_the_weights_of_the_files(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(ARCHITECTURES[name].build(), tmp_path)
    byte_tokenizer().save_pretrained(folder)
    read: list[int] = []
    close = Reader.close
    monkeypatch.setattr(Reader, "close", lambda self, *rest: (read.append(self.bytes_read), close(self, *rest))[1])
    found, _ = load_model(folder, device="cuda")
    stored = sum(entry.n_bytes for entry in stored_tensors(folder).values())
    assert read == [stored if is_suited(folder) else 0] and is_suited(folder) != (name == "mixtral")
    expected, _ = load_model(folder, device="cpu")
    for key, value in values(expected).items():
        assert values(found)[key].device.type == "cuda", key
        assert values(found)[key].dtype == value.dtype and torch.equal(values(found)[key].cpu(), value), key
    assert next(found.parameters()).untyped_storage().nbytes() == next(found.parameters()).nbytes


@pytest.mark.gpu
def test_memory_that_queued_work_still_uses_is_not_written(tmp_path: Path) -> None:
    folder = write_llama(tmp_path)
    for _ in range(3):
        busy = torch.randn(4096, 4096, device="cuda")
        for _ in range(50):
            busy = busy @ busy
            busy /= busy.norm()
        expected = busy.clone()
        del busy  # its memory is given to the weights while the products are queued
        model, _ = load_model(folder, device="cuda")
        assert torch.isfinite(expected).all()
        weights = load_file(folder / "model.safetensors")
        assert all(
            torch.equal(value.cpu(), weights[key]) for key, value in model.state_dict().items() if key in weights
        )


@pytest.mark.parametrize("damaged", [False, True])
def test_generation_settings_of_config_json_are_kept(
    damaged: bool, tmp_path: Path, direct: list[Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_llama(tmp_path)
    edit_config(folder, num_beams=4, no_repeat_ngram_size=3)
    settings = folder / "generation_config.json"
    settings.unlink(missing_ok=True)
    if damaged:
        settings.write_text("{")
    found, _ = load_model(folder, device="cpu")
    assert direct
    monkeypatch.undo()
    expected, _ = load_model(folder, device="cpu")
    assert found.generation_config.num_beams == 4
    assert found.generation_config.to_dict() == expected.generation_config.to_dict()
