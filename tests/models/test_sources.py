"""What MODEL may be: folders as trainers and other tools leave them, adapters and GGUF files; and what it may not."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from plop_ext.errors import InputError, SetupError
from plop_ext.models import load_model
from plop_ext.models.source import find
from tests.support.edited_checkpoint import write_llama
from tests.support.gguf_file import write_gguf
from tests.support.quiet import quietly, stream_quietly
from tests.support.tiny_lm import byte_tokenizer, tiny_llama
from tests.support.tiny_models import token_batch

BATCH = [token_batch([30, 25])]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("models") / "llama", torch.float32)


def write_adapter(base: Path, folder: Path, **config: Any) -> Any:
    """An adapter that changes what the model computes; returns the adapted model."""
    from peft import LoraConfig, get_peft_model

    model, _ = load_model(str(base), device="cpu")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["v_proj", "up_proj"], **config))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    adapted.save_pretrained(folder)
    return adapted.eval()


def test_an_adapter_is_loaded_on_its_base_with_a_line_that_says_so(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Scored are the weights of the base model, on the inputs that the adapted model gives them."""
    adapted = write_adapter(saved, tmp_path / "adapter")
    model, tokenizer = load_model(str(tmp_path / "adapter"), device="cpu")
    ids = BATCH[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, adapted(ids).logits)
    assert tokenizer.pad_token == "<pad>"
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.getMessage() == (
        f"{tmp_path / 'adapter'} is an adapter: the weights of its base model are scored, on the inputs that the"
        " adapted model gives them"
    )
    scores = quietly(model, BATCH)
    plain = quietly(load_model(str(saved), device="cpu")[0], BATCH)
    assert scores.module_names == plain.module_names
    assert [module.weight_norm for module in scores.modules] == [module.weight_norm for module in plain.modules]
    first, later = "model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"
    nfn = [dict(zip(each.module_names, each.nfn.tolist(), strict=True)) for each in (scores, plain)]
    assert nfn[0][first] == nfn[1][first] and nfn[0][later] != nfn[1][later]
    assert scores.provenance["model"]["name"] == str(tmp_path / "adapter")


def test_a_placement_by_an_adapter_fits_the_base_model(saved: Path, tmp_path: Path) -> None:
    write_adapter(saved, tmp_path / "adapter")
    scores = quietly(load_model(str(tmp_path / "adapter"), device="cpu")[0], BATCH)
    with pytest.warns(UserWarning):
        placement = scores.place(types=2)
    placement.check_model(load_model(str(saved), device="cpu")[0])


def test_an_adapters_own_tokenizer_comes_first(saved: Path, tmp_path: Path) -> None:
    write_adapter(saved, tmp_path)
    byte_tokenizer(template="own").save_pretrained(tmp_path)
    assert load_model(str(tmp_path), device="cpu")[1].chat_template == "own"


def test_an_adapter_cannot_be_streamed(saved: Path, tmp_path: Path) -> None:
    write_adapter(saved, tmp_path)
    with pytest.raises(InputError, match="is an adapter, and streaming reads the files of one model: stream"):
        stream_quietly(tmp_path, BATCH, device="cpu")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "names no base model; save the adapter again with PEFT"),
        ("[]", "names no base model; save the adapter again with PEFT"),
        ("{}", "names no base model; save the adapter again with PEFT"),
        ('{"base_model_name_or_path": null}', "names no base model; set its base_model_name_or_path"),
        (
            '{"base_model_name_or_path": "/no/where"}',
            r"is an adapter for '/no/where', which cannot be loaded: .*no such folder.* \(the base is named in its",
        ),
    ],
)
def test_an_adapter_without_its_base(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        find(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_an_adapter_for_an_adapter_or_beside_a_model(saved: Path, tmp_path: Path) -> None:
    write_adapter(saved, tmp_path / "first")
    (tmp_path / "second").mkdir()
    content = {"base_model_name_or_path": str(tmp_path / "first")}
    (tmp_path / "second" / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"is an adapter for another adapter, .*first; merge that one first"):
        find(str(tmp_path / "second"))
    shutil.copy(saved / "model.safetensors", tmp_path / "first")
    with pytest.raises(InputError, match=r"holds both a model and an adapter \(adapter_config.json\)"):
        find(str(tmp_path / "first"))


def test_an_adapter_that_does_not_fit_its_base(saved: Path, tmp_path: Path) -> None:
    write_adapter(saved, tmp_path / "adapter")
    write_llama(tmp_path / "narrow", intermediate_size=40)
    config = tmp_path / "adapter" / "adapter_config.json"
    content = json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "narrow")}
    config.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"the adapter cannot be loaded \(Error.* in loading state_dict"):
        load_model(str(tmp_path / "adapter"), device="cpu")


def test_a_trainers_checkpoint(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "run" / "checkpoint-500"))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (folder / name).write_bytes(b"not a tensor")
    (folder / "trainer_state.json").write_text("{}")
    assert quietly(load_model(str(folder), device="cpu")[0], BATCH).nfn.tolist() == (
        stream_quietly(folder, BATCH, device="cpu").nfn.tolist()
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).rename(folder.parent / name)
    assert load_model(str(folder), device="cpu")[1].pad_token == "<pad>"
    (tmp_path / "run" / "checkpoint-1000").mkdir()
    with pytest.raises(InputError, match=r"holds the checkpoints of a trainer; give one, \S+/checkpoint-1000$"):
        find(str(tmp_path / "run"))


def test_a_pickled_checkpoint(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "llama"))
    (folder / "model.safetensors").unlink()
    state = tiny_llama().state_dict()
    torch.save({f"module.{key}": value for key, value in state.items()}, folder / "pytorch_model.bin")
    found = load_model(str(folder), device="cpu")[0].state_dict()
    assert all(torch.equal(found[key], value) for key, value in state.items())


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ("global_step500", "holds the shards of DeepSpeed; run the zero_to_fp32.py in it"),
        ("pytorch_model_fsdp_0", "holds the shards of FSDP; run `accelerate merge-weights`"),
    ],
)
def test_shards_of_a_trainer_are_named(shards: str, message: str, saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "llama"))
    (folder / shards).mkdir()
    assert find(str(folder)).folder == folder
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=message):
        find(str(folder))


@pytest.mark.parametrize("name", ["a" * 300, "x\0y", "a/" + "b" * 300, "~unknown-user/model"])
def test_names_that_no_file_can_have(name: str) -> None:
    with pytest.raises((InputError, SetupError)) as caught:
        find(name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_an_index_that_leads_out_of_its_folder(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "llama"))
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    weight_map = dict.fromkeys(tiny_llama().state_dict(), "../outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for load in (lambda: load_model(str(folder), device="cpu"), lambda: stream_quietly(folder, BATCH, device="cpu")):
        with pytest.raises(InputError, match=r"lists ../outside.safetensors, which is not a file of its folder"):
            load()


@pytest.mark.parametrize(
    "content",
    ["[]", "null", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": 1}', "[" * 100_000],
)
def test_damaged_indexes(content: str, saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "llama"))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError) as caught:
        load_model(str(folder), device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "header",
    [b"[]", b"null", b'{"a": 3}', b'{"a": {"dtype": "F32"}}', b'{"a": {"data_offsets": "ab"}}', b"[" * 50_000],
)
def test_damaged_headers(header: bytes, saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "llama"))
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(InputError, match=r"`\S*model.safetensors` is no safetensors file: its header is damaged"):
        load_model(str(folder), device="cpu")


def test_a_gguf_file_is_dequantized(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    meant = write_gguf(tmp_path / "tiny-Q8_0.gguf")
    model, tokenizer = load_model(str(tmp_path / "tiny-Q8_0.gguf"), device="cpu")
    found = model.state_dict()
    assert found.keys() == meant.keys()
    for key, expected in meant.items():
        assert float((found[key] - expected).abs().max()) <= float(expected.abs().max()) / 127, key
    assert {module.kind for module in quietly(model, BATCH).modules} == {"linear"}
    assert tokenizer("It's")["input_ids"][-4:] == byte_tokenizer()("It's")["input_ids"][-4:]
    assert tokenizer.pad_token == "<pad>"
    with pytest.raises(InputError, match="is a GGUF file: it cannot be streamed; score it in memory"):
        stream_quietly(tmp_path / "tiny-Q8_0.gguf", BATCH, device="cpu")


def test_a_gguf_file_without_the_package_that_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")

    def refuse(*_: object, **__: object) -> None:
        raise ImportError("Please install torch and gguf>=0.10.0 to load a GGUF checkpoint in PyTorch.")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", refuse)
    with pytest.raises(SetupError, match=r"needs a package: Please install torch and gguf.*; pip install gguf$"):
        load_model(str(tmp_path / "model.gguf"), device="cpu")


def test_a_gguf_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"not a GGUF file")
    with pytest.raises((InputError, SetupError)) as caught:
        load_model(str(tmp_path / "model.gguf"), device="cpu")
    assert "\n" not in str(caught.value)


def test_a_folder_of_gguf_files_names_one(tmp_path: Path) -> None:
    (tmp_path / "model-Q8_0.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"holds no config.json but GGUF files; give one, \S+/model-Q8_0.gguf$"):
        find(str(tmp_path))
