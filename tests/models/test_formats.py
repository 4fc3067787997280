"""Quantized checkpoints: read as what they stand for, or refused with what to do; never misread."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from plop_ext import weight_formats
from plop_ext.errors import InputError
from plop_ext.models import load_model, quantization
from plop_ext.streaming import skeleton
from tests.support.edited_checkpoint import edit_config, edit_weights, write_llama
from tests.support.paths import ROOT
from tests.support.quantized_checkpoint import FP8, compressed_tensors, to_fp8, to_int4, to_mxfp4
from tests.support.quiet import quietly, stream_quietly
from tests.support.tiny_lm import byte_tokenizer
from tests.support.tiny_models import token_batch

BATCH = [token_batch([12, 7])]
Q = "model.layers.0.self_attn.q_proj."
ORIGINAL = "give the 16-bit checkpoint that it was made from"


def modelopt(folder: Path) -> None:
    """NVIDIA ModelOpt's FP8, as it writes it today."""
    to_fp8(folder, "weight_scale", {"input_scale": torch.tensor(0.1)})
    edit_config(folder, quantization_config={"quant_method": "modelopt", "quant_algo": "FP8"})


def modelopt_of_before(folder: Path) -> None:
    """The same in a file of its own."""
    to_fp8(folder, "weight_scale", {"input_scale": torch.tensor(0.1)})
    content = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(content))


def undeclared_fp8(folder: Path) -> None:
    to_fp8(folder, "weight_scale_inv")


def undeclared_int4(folder: Path) -> None:
    to_int4(folder)


def undeclared_gptq(folder: Path) -> None:
    def change(weights: dict[str, Any]) -> None:
        del weights[Q + "weight"]
        weights[Q + "qweight"] = torch.zeros(4, 32, dtype=torch.int32)
        weights[Q + "qzeros"] = torch.zeros(1, 4, dtype=torch.int32)
        weights[Q + "scales"] = torch.ones(1, 32, dtype=torch.float16)

    edit_weights(folder, change)


def undeclared_nf4(folder: Path) -> None:
    def change(weights: dict[str, Any]) -> None:
        weights[Q + "weight"] = torch.zeros(512, 1, dtype=torch.uint8)
        weights[Q + "weight.absmax"] = torch.ones(16)
        weights[Q + "weight.quant_map"] = torch.ones(16)

    edit_weights(folder, change)


def of_an_unknown_tool(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "shrink-ray", "bits": 3})


def of_a_tool_without_a_name(folder: Path) -> None:
    edit_config(folder, quantization_config={"bits": 3})


def exllama(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "exl2"})


REFUSED: dict[Callable[[Path], None], str] = {
    modelopt: r"is quantized by modelopt \(says its config.json\): transformers does not read the scales of NVIDIA",
    modelopt_of_before: r"is quantized by modelopt \(FP8, says its hf_quant_config.json\)",
    undeclared_fp8: r"14 scales would be ignored, such as \S+_scale_inv \(format: fine-grained FP8\).*lost its quant",
    undeclared_int4: r"14 scales would be ignored, such as \S+ \(format: ModelOpt or compressed-tensors\)",
    undeclared_gptq: r"2 scales would be ignored, such as \S+qzeros \(format: GPTQ, AWQ or MXFP4\)",
    undeclared_nf4: r"2 scales would be ignored, such as \S+absmax \(format: bitsandbytes\)",
    of_an_unknown_tool: r"is quantized by shrink-ray \(.*\): transformers does not know this format",
    of_a_tool_without_a_name: r"is quantized by an unnamed format \(.*\): its quantization_config has no quant_method",
    exllama: r"is quantized by exl2 \(.*\): it is a format of ExLlamaV2",
}


@pytest.mark.parametrize("write", REFUSED, ids=lambda write: write.__name__)
def test_a_format_that_would_be_misread_is_refused_with_what_to_do(
    write: Callable[[Path], None], tmp_path: Path
) -> None:
    folder = write_llama(tmp_path, intermediate_size=64)
    write(folder)
    for load in (lambda: load_model(str(folder), device="cpu"), lambda: stream_quietly(folder, BATCH, device="cpu")):
        with pytest.raises(InputError, match=REFUSED[write]) as caught:
            load()
        assert ORIGINAL in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_of_the_users_that_was_misread_is_refused(tmp_path: Path) -> None:
    """transformers loads the codes, and logs that it does not use the scales."""
    from transformers import AutoModelForCausalLM

    folder = write_llama(tmp_path)
    modelopt(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(
        InputError, match=r"loaded from a checkpoint that is quantized by modelopt, without the scales"
    ):
        quietly(model, BATCH)
    del model.config.quantization_config
    assert len(quietly(model, BATCH).modules) == 14


def test_a_format_declared_within_the_language_model_counts(tmp_path: Path) -> None:
    """Multimodal checkpoints declare it there, and transformers reads it there."""
    from transformers import AutoConfig

    from plop_ext.models.quantization import method_of, prepare

    outer = AutoConfig.for_model("gemma3")
    outer.text_config.quantization_config = {"quant_method": "shrink-ray"}
    assert method_of(outer) == "shrink-ray"
    with pytest.raises(InputError, match="is quantized by shrink-ray"):
        prepare("m", tmp_path, outer)


def test_what_is_not_a_scale_of_a_weight_is_no_reason_to_refuse(tmp_path: Path) -> None:
    """Scales of the key-value cache, unused scales of layers, and masks stored as bytes, beside plain weights."""
    folder = write_llama(tmp_path)
    extra = {
        "model.layers.0.self_attn.k_scale": torch.tensor(1.0),
        "model.layers.0.self_attn.bias": torch.ones(4, 4, dtype=torch.uint8),
        "model.layers.0.self_attn.q_proj.input_scale": torch.tensor(1.0),
        "model.layers.0.layer_scale": torch.ones(32),
        "model.logit_scale": torch.tensor(1.0),
    }
    of_the_cache = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(of_the_cache))
    plain = stream_quietly(folder, BATCH, device="cpu").nfn.tolist()
    edit_weights(folder, lambda weights: weights.update(extra))
    model, _ = load_model(str(folder), device="cpu")
    assert quietly(model, BATCH).nfn.tolist() == plain
    assert stream_quietly(folder, BATCH, device="cpu").nfn.tolist() == plain


def test_float8_values_without_scales_are_what_they_are(tmp_path: Path) -> None:
    folder = write_llama(tmp_path)
    edit_weights(folder, lambda weights: {k: v.to(FP8) if ".mlp." in k else v for k, v in weights.items()})
    model, _ = load_model(str(folder), device="cpu")
    up = model.model.layers[0].mlp.up_proj.weight
    assert up.dtype == torch.bfloat16 and torch.equal(up, up.to(FP8).to(up.dtype))


def test_fp8_in_blocks_is_scored_as_what_it_stands_for(tmp_path: Path) -> None:
    """As DeepSeek stores it, here with one block for each matrix."""
    folder = write_llama(tmp_path)
    edit_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    meant = to_fp8(folder, "weight_scale_inv")
    model, _ = load_model(str(folder), device="cpu")
    found = model.state_dict()
    for key, expected in meant.items():
        torch.testing.assert_close(found[key].float(), expected, rtol=2**-8, atol=0)
    scores = quietly(model, BATCH)
    assert len(scores.modules) == len(meant)
    assert stream_quietly(folder, BATCH, device="cpu").nfn.tolist() == scores.nfn.tolist()


def compressed_fp8(folder: Path) -> dict[str, torch.Tensor]:
    compressed_tensors(folder, 8, "float", "channel", "float-quantized")
    return to_fp8(folder, "weight_scale", per_row=True)


def compressed_int4(folder: Path) -> dict[str, torch.Tensor]:
    compressed_tensors(folder, 4, "int", "group", "pack-quantized", group_size=32)
    return to_int4(folder)


needs_compressed_tensors = pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None,
    reason="compressed-tensors is not installed; pip install 'plop_ext[quantized]'",
)


@needs_compressed_tensors
@pytest.mark.parametrize("write", [compressed_fp8, compressed_int4], ids=["FP8", "int4"])
def test_compressed_tensors_are_scored_as_what_they_stand_for(
    write: Callable[[Path], dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder = write_llama(tmp_path, intermediate_size=64)
    meant = write(folder)
    model, _ = load_model(str(folder), device="cpu")
    found = model.state_dict()
    for key, expected in meant.items():
        assert torch.equal(found[key], expected.to(torch.bfloat16)), key
    scores = quietly(model, BATCH)
    assert len(scores.modules) == len(meant) == 14
    assert {module.kind for module in scores.modules} == {"linear"}
    streamed = stream_quietly(folder, BATCH, device="cpu")
    assert streamed.nfn.tolist() == scores.nfn.tolist()


@needs_compressed_tensors
@pytest.mark.parametrize("write", [compressed_fp8, compressed_int4], ids=["FP8", "int4"])
def test_a_compressed_model_of_the_users_is_refused_until_it_is_decompressed(
    write: Callable[[Path], dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder = write_llama(tmp_path, intermediate_size=64)
    write(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(InputError, match=r"its weights are compressed; load it with .*dequantize=True"):
        quietly(model, BATCH)
    with torch.no_grad():
        model(BATCH[0]["input_ids"])
    assert len(quietly(model, BATCH).modules) == 14


def test_mxfp4_experts_are_scored_as_what_they_stand_for(tmp_path: Path) -> None:
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
    GptOssForCausalLM(GptOssConfig(**sizes, **heads)).bfloat16().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    edit_config(tmp_path, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    meant = to_mxfp4(tmp_path)
    model, _ = load_model(str(tmp_path), device="cpu")
    found = model.state_dict()
    for key, expected in meant.items():
        assert torch.equal(found[key], expected.to(torch.bfloat16)), key
    batch = [token_batch([120] * 4)]  # enough tokens for every expert
    scores = quietly(model, batch)
    assert len(meant) == 4 and len(scores.modules) == 2 * (4 + 2 * 3)
    assert stream_quietly(tmp_path, batch, device="cpu").nfn.tolist() == scores.nfn.tolist()


def test_the_page_lists_the_formats() -> None:
    page = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    rows = [line for line in page.split("## Quantized checkpoints")[1].splitlines() if line.startswith("| `")]
    plain = {
        name for row in rows if "| plain weights | plain weights |" in row for name in re.findall(r"`([^`]+)`", row)
    }
    refused = {name for row in rows if "| refused | refused |" in row for name in re.findall(r"`([^`]+)`", row)}
    streamed = {name for row in rows if "| refused |" not in row for name in re.findall(r"`([^`]+)`", row)}
    assert plain == set(quantization._DEQUANTIZED)
    assert refused == set(weight_formats.REASONS)
    assert streamed == set(skeleton._QUANTIZERS)
