"""Tensors whose names a wrapper has changed: the same weights, in memory and streamed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from plop_ext.errors import InputError
from plop_ext.models import load_model
from tests.support.edited_checkpoint import edit_weights, rename, write_llama
from tests.support.quiet import stream_quietly
from tests.support.tiny_lm import tiny_llama
from tests.support.tiny_models import token_batch

EXPECTED = {key: value.bfloat16() for key, value in tiny_llama().state_dict().items()}

NAMES: dict[str, Callable[[str], str]] = {
    "DDP": lambda key: f"module.{key}",
    "compiled": lambda key: f"_orig_mod.{key}",
    "compiled, then DDP": lambda key: f"module._orig_mod.{key}",
    "compiled blocks": lambda key: re.sub(r"(layers\.\d+)\.", r"\1._orig_mod.", key),
    "FSDP of checkpointed blocks": lambda key: (
        "_fsdp_wrapped_module."
        + re.sub(r"(layers\.\d+)\.", r"\1._fsdp_wrapped_module._checkpoint_wrapped_module.", key)
    ),
    "PEFT": lambda key: f"base_model.model.{key}",
    "the model without its head's prefix": lambda key: key.removeprefix("model."),
    "that in DDP": lambda key: "module." + key.removeprefix("model."),
    "one prefix too many": lambda key: f"model.{key}",
}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("names") / "llama", shard="20KB")


@pytest.mark.parametrize("wrapper", NAMES)
def test_wrapped_names_load_and_stream_as_plain_ones(wrapper: str, sharded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "wrapped"))
    assert len(list(folder.glob("*.safetensors"))) > 1
    rename(folder, NAMES[wrapper])
    model, _ = load_model(str(folder), device="cpu")
    found = model.state_dict()
    assert found.keys() == EXPECTED.keys() and all(torch.equal(found[key], EXPECTED[key]) for key in found)
    model.save_pretrained(tmp_path / "again")
    with safe_open(tmp_path / "again" / "model.safetensors", "pt") as file:
        if wrapper != "the model without its head's prefix":  # transformers keeps that one
            assert set(file.keys()) == EXPECTED.keys()
    batch = [token_batch([12, 7])]
    streamed = stream_quietly(folder, batch, device="cpu")
    plain = stream_quietly(sharded, batch, device="cpu")
    assert streamed.module_names == plain.module_names and streamed.nfn.tolist() == plain.nfn.tolist()


def test_lora_that_is_not_merged_is_refused(tmp_path: Path) -> None:
    folder = write_llama(tmp_path)
    rename(folder, NAMES["PEFT"])
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    edit_weights(folder, lambda weights: weights.update({key: torch.zeros(2, 32)}))
    batch = [token_batch([12, 7])]
    for load in (lambda: load_model(str(folder), device="cpu"), lambda: stream_quietly(folder, batch, device="cpu")):
        with pytest.raises(
            InputError, match=r"holds a model with LoRA that is not merged, such as .*lora_A.*merge_and"
        ):
            load()


def test_a_model_whose_own_names_look_wrapped_keeps_them() -> None:
    from plop_ext.models.prefixes import renamings

    assert renamings("m", ["module.a.weight"], ["module.a.weight"]) == {}
    assert renamings("m", ["module.a.weight"], ["a.weight"]) != {}
    assert renamings("m", ["a.weight", "my_module.b.weight"], ["a.weight", "my_module.b.weight"]) == {}
