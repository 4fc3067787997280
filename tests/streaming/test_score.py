"""A streamed model has the scores of one in memory, to the bit: architectures, layouts of checkpoints, settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import plop_ext
from plop_ext.scores import Scores
from tests.support.architectures import ARCHITECTURES
from tests.support.checkpoint import saved
from tests.support.markdown import python_blocks
from tests.support.paths import ROOT
from tests.support.quiet import quietly, stream_quietly
from tests.support.stream_cases import CASES
from tests.support.tiny_models import gemma3, llama, qwen2, token_batch

# Two lists of blocks, or one block that runs many times.
REFUSED = {
    "whisper": "the layers to score are in 2 lists of blocks",
    "t5": "the layers to score are in 2 lists of blocks",
    "albert": "AlbertModel cannot be streamed: block 0 is called more than once",
}
STREAMED = [name for name in ARCHITECTURES if name not in REFUSED]


def in_memory(folder: Path, batches: Sequence[Any], device: torch.device, **settings: Any) -> Scores:
    """The scores of the model as transformers loads it."""
    import transformers

    config = json.loads((folder / "config.json").read_text())
    cls = getattr(transformers, config["architectures"][0])
    model: nn.Module = cls.from_pretrained(folder, dtype="auto").eval().to(device)
    return quietly(model, batches, **settings)


def assert_same(streamed: Scores, whole: Scores) -> None:
    assert streamed.modules == whole.modules
    assert streamed.unscored == whole.unscored
    np.testing.assert_array_equal(streamed.totals, whole.totals)
    np.testing.assert_array_equal(streamed.sample_ids, whole.sample_ids)
    np.testing.assert_array_equal(streamed.sample_batches, whole.sample_batches)
    for key in ("settings", "model", "data", "experts_implementation"):
        assert streamed.provenance[key] == whole.provenance[key], key


@pytest.mark.parametrize("name", STREAMED)
def test_every_architecture_has_the_scores_of_the_model_in_memory(
    name: str, tmp_path: Path, device: torch.device
) -> None:
    case = ARCHITECTURES[name]
    first = case.batch()
    second = {key: value.flip(0) if key == "input_ids" else value for key, value in first.items()}
    folder = saved(case.build(), tmp_path, "5KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    streamed = stream_quietly(folder, [first, second], device=device, **case.kwargs)
    assert_same(streamed, in_memory(folder, [first, second], device, **case.kwargs))


@pytest.mark.parametrize("name", REFUSED)
def test_architectures_that_do_not_fit_are_refused(name: str, tmp_path: Path) -> None:
    case = ARCHITECTURES[name]
    folder = saved(case.build(), tmp_path)
    with pytest.raises(plop_ext.InputError, match=REFUSED[name]) as caught:
        stream_quietly(folder, [case.batch()], device="cpu", **case.kwargs)
    assert 'load it with `device_map="auto"`' in str(caught.value)


def test_one_of_two_lists_of_blocks_can_be_chosen(tmp_path: Path) -> None:
    case = ARCHITECTURES["whisper"]
    folder = saved(case.build(), tmp_path)
    names = {name for name, module in case.build().named_modules() if isinstance(module, nn.Linear)}
    decoder = sorted(name for name in names if "decoder.layers" in name)
    streamed = stream_quietly(folder, [case.batch()], device="cpu", include=decoder)
    assert_same(streamed, in_memory(folder, [case.batch()], torch.device("cpu"), include=decoder))


@pytest.mark.parametrize("name", ["packed", "qwen2_5_vl", "deberta"])
def test_blocks_have_the_streams_of_the_whole_model(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    folder = saved(case.build(), tmp_path)
    streamed = stream_quietly(folder, [case.batch()], device="cpu", max_samples=None)
    assert_same(streamed, in_memory(folder, [case.batch()], torch.device("cpu"), max_samples=None))


def test_keys_of_cross_attention_have_the_rows_of_the_encoder(tmp_path: Path) -> None:
    case = CASES["bart"]
    folder = saved(case.build(), tmp_path)
    names = sorted(name for name, module in case.build().named_modules() if isinstance(module, nn.Linear))
    decoder = [name for name in names if "decoder.layers" in name]
    streamed = stream_quietly(folder, [case.batch()], device="cpu", include=decoder)
    assert_same(streamed, in_memory(folder, [case.batch()], torch.device("cpu"), include=decoder))
    tokens = dict(zip(streamed.module_names, streamed.totals.tokens.tolist(), strict=True))
    assert tokens["model.decoder.layers.0.encoder_attn.k_proj"] == [11, 6, 3]
    assert tokens["model.decoder.layers.0.encoder_attn.q_proj"] == [4, 9, 7]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shard", ["20KB", "1GB"])
def test_dtypes_in_shards_and_in_a_single_file(
    dtype: torch.dtype, shard: str, tmp_path: Path, device: torch.device
) -> None:
    folder = saved(qwen2().to(dtype), tmp_path, shard)
    assert (folder / "model.safetensors").exists() == (shard == "1GB")
    batches = [token_batch([30, 21]), token_batch([17], seed=1)]
    streamed = stream_quietly(folder, batches, device=device)
    assert streamed.provenance["model"]["dtype"] == str(dtype).removeprefix("torch.")
    assert_same(streamed, in_memory(folder, batches, device))


def test_another_dtype_than_the_checkpoint(tmp_path: Path) -> None:
    folder = saved(llama().to(torch.bfloat16), tmp_path)
    streamed = stream_quietly(folder, [token_batch([30])], device="cpu", dtype="float32")
    model = type(llama()).from_pretrained(folder, dtype=torch.float32).eval()
    np.testing.assert_array_equal(streamed.totals, quietly(model, [token_batch([30])]).totals)


@pytest.mark.parametrize("stored", ["embedding", "head"])
def test_tied_weights_stored_under_either_name(stored: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = saved(gemma3(), tmp_path, "1GB")
    if stored == "head":
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    streamed = stream_quietly(folder, [token_batch([30, 12])], device="cpu")
    whole = quietly(gemma3(), [token_batch([30, 12])])
    assert streamed.modules == whole.modules
    np.testing.assert_array_equal(streamed.totals, whole.totals)


@pytest.mark.parametrize(
    "settings",
    [
        {"mask": "completion"},
        {"mask": "all"},
        {"token_step": 3, "seed": 5},
        {"baseline": "probe", "probes": 8},
        {"exclude": ["q_proj"]},
        {"max_samples": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_settings_and_padding_on_either_side(settings: dict[str, Any], side: str, tmp_path: Path) -> None:
    folder = saved(gemma3(), tmp_path)
    batches = [token_batch([30, 9], side=side), token_batch([25, 14, 3], side=side, seed=1)]
    batches[0]["sample_ids"] = torch.tensor([7, 3])
    streamed = stream_quietly(folder, batches, device="cpu", **settings)
    assert_same(streamed, in_memory(folder, batches, torch.device("cpu"), **settings))


def test_it_stops_after_the_last_block_asked_for_and_never_reads_the_head(tmp_path: Path) -> None:
    model = llama(num_hidden_layers=4)
    folder = saved(model, tmp_path)
    sizes = {name: parameter.numel() * 4 for name, parameter in model.named_parameters()}
    streamed = stream_quietly(folder, [token_batch([30])], device="cpu", include=["layers.1.mlp.up_proj"])
    assert streamed.module_names == ("model.layers.1.mlp.up_proj",)
    wanted = sum(
        size for name, size in sizes.items() if not name.startswith(("lm_head", "model.layers.2", "model.layers.3"))
    )
    assert streamed.provenance["streaming"]["bytes_read"] == wanted
    assert streamed.provenance["streaming"]["blocks"] == 2


def test_the_rest_of_the_process_is_left_alone(tmp_path: Path) -> None:
    import os
    import random
    import threading

    folder = saved(llama(), tmp_path / "model")
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())  # type: ignore[union-attr]
    environment, threads = dict(os.environ), threading.active_count()
    stream_quietly(folder, [token_batch([30])], device="cpu")
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])
    assert dict(os.environ) == environment and threading.active_count() == threads
    assert torch.is_grad_enabled()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def unpadded_only(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"input_ids": batch["input_ids"]}


def test_batches_without_a_mask(tmp_path: Path) -> None:
    folder = saved(llama(), tmp_path)
    batches = [unpadded_only(token_batch([30, 30])), unpadded_only(token_batch([12], seed=1))]
    streamed = stream_quietly(folder, batches, device="cpu")
    assert_same(streamed, in_memory(folder, batches, torch.device("cpu")))


def test_the_alternative_works(tmp_path: Path) -> None:
    """What the error for a model that cannot be streamed advises: device_map, here with blocks on disk."""
    folder = saved(llama(), tmp_path / "model")
    batches = [token_batch([30, 12])]
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = type(llama()).from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "offload")
    assert model.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    offloaded = quietly(model.eval(), batches)
    np.testing.assert_array_equal(offloaded.totals, stream_quietly(folder, batches, device="cpu").totals)


def test_the_example_of_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = python_blocks((ROOT / "docs" / "streaming.md").read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    for block, values in zip(blocks, ({}, {"folder": "model", "plop_ext": plop_ext}), strict=True):
        if values:
            saved(llama(), tmp_path / "model")
            values["dataloader"] = [token_batch([30, 21])]
        exec(block, values)
