"""Quantized checkpoints are streamed as they are stored, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from plop_ext import InputError
from tests.support.checkpoint import saved
from tests.support.quiet import quietly, stream_quietly
from tests.support.tiny_models import llama, token_batch

BATCHES = [token_batch([30, 12]), token_batch([17], seed=1)]
FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}


@pytest.mark.parametrize(
    "settings, kind",
    [
        (FOUR_BITS, "bitsandbytes 4-bit"),
        ({**FOUR_BITS, "bnb_4bit_use_double_quant": True}, "bitsandbytes 4-bit"),
        ({"load_in_8bit": True}, "bitsandbytes 8-bit"),
    ],
    ids=["nf4", "nf4 of which the statistics are quantized", "int8"],
)
def test_bitsandbytes(settings: dict[str, Any], kind: str, tmp_path: Path, device: torch.device) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    plain = saved(llama(hidden_size=64, intermediate_size=128).to(torch.bfloat16), tmp_path / "plain")
    options = {"dtype": torch.bfloat16, "device_map": {"": device}}
    quantized = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=BitsAndBytesConfig(**settings), **options
    )
    folder = saved(quantized, tmp_path / "quantized", "30KB")
    whole = quietly(AutoModelForCausalLM.from_pretrained(folder, device_map={"": device}), BATCHES)
    streamed = stream_quietly(folder, BATCHES, device=device)
    assert streamed.modules == whole.modules and {module.kind for module in whole.modules} == {kind}
    np.testing.assert_array_equal(streamed.totals, whole.totals)
    assert streamed.provenance["streaming"]["block"] == pytest.approx(held(quantized.model.layers[0]), rel=0.1)


def held(block: torch.nn.Module) -> int:
    """Bytes of the tensors that a block holds: parameters, and what bitsandbytes keeps beside them."""
    tensors = []
    for parameter in block.parameters():
        state = getattr(parameter, "quant_state", None)
        tensors += [parameter, getattr(parameter, "SCB", None)]
        tensors += [] if state is None else list(state.as_dict(packed=True).values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def test_a_kind_that_cannot_be_streamed_is_named(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    folder = saved(llama(), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    method = {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}
    config["quantization_config"] = {"quant_method": "torchao", "quant_type": {"default": method}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r'quantized by torchao cannot be streamed; load it with `device_map="auto"`'):
        stream_quietly(folder, BATCHES, device="cpu")
