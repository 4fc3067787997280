"""Block-diagonal layers of transformers: one matrix, one row per token, and no LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from plop_ext import reference
from plop_ext.layers import adapter_for
from tests.support.checkpoint import saved
from tests.support.quiet import nfn, quietly, stream_quietly
from tests.support.tiny_models import token_batch

GROUPS = 4


def deepseek_v4() -> nn.Module:
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    config = DeepseekV4Config(
        vocab_size=64,
        hidden_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=8,
        head_dim=16,
        q_lora_rank=16,
        o_groups=GROUPS,
        o_lora_rank=12,
        n_routed_experts=4,
        num_experts_per_tok=2,
        index_n_heads=2,
        index_head_dim=8,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return DeepseekV4ForCausalLM(config).eval()


def expected(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, float]:
    """NFN of each `o_a_proj`, as one dense matrix with zeros outside of the blocks."""
    layers = {name: module for name, module in model.named_modules() if name.endswith("o_a_proj")}
    inputs: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_hook(lambda _, args, __, name=name: inputs.update({name: args[0].detach()}))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    values = {}
    for name, layer in layers.items():
        weight = torch.block_diag(*layer.weight.detach().double().chunk(GROUPS))
        z = inputs[name].double().flatten(2)[batch["attention_mask"].bool()]
        gains = (z @ weight.T).norm(dim=1) / z.norm(dim=1)
        values[name] = float(gains.mean() / reference.frobenius_baseline(weight))
    return values


def test_deepseek_v4s_o_a_proj(tmp_path: Path) -> None:
    model, batch = deepseek_v4(), token_batch([24, 15])
    scores = quietly(model, [batch])
    wanted = expected(model, batch)
    assert {name: value for name, value in nfn(scores).items() if name in wanted} == pytest.approx(wanted, rel=1e-5)
    for item, tokens in zip(scores.modules, scores.totals.tokens.tolist(), strict=True):
        if item.name in wanted:
            assert tokens == [24, 15]
            assert item.kind == "block-diagonal linear" and item.in_features == 8 * 16
    streamed = stream_quietly(saved(model, tmp_path), [batch])
    assert nfn(streamed) == nfn(scores)

    placement = scores.place(types=["o_a_proj", "q_b_proj"])
    assert "`model.layers.0.self_attn.o_a_proj`" in placement.notes[0] and "block-diagonal" in placement.notes[0]
    adapted = peft.get_peft_model(model, placement.lora_config(r=2))
    placement.verify(adapted)
    adapted(**batch)


def fp8_linear(values: Tensor, block: int) -> Any:
    """A layer as a checkpoint in FP8 has it, of these values; its forward needs a GPU."""
    from transformers.integrations.finegrained_fp8 import FP8GroupedLinear

    rows, columns = values.shape
    layer = FP8GroupedLinear(columns, rows, GROUPS, block_size=(block, block))
    blocks = values.view(rows // block, block, columns // block, block)
    scale = blocks.abs().amax(dim=(1, 3)) / 448
    layer.weight.data = (blocks / scale[:, None, :, None]).view(rows, columns).to(torch.float8_e4m3fn)
    layer.weight_scale_inv.data = scale
    return layer


def test_its_fp8_form_is_dequantized() -> None:
    values = torch.randn(GROUPS * 8, 16)
    layer = fp8_linear(values, 8)
    adapter = adapter_for(layer)
    assert adapter is not None and adapter.features(layer) == (GROUPS * 16, GROUPS * 8)
    assert adapter.against_lora(layer) and adapter.kind == "fine-grained FP8"
    # float8 has a mantissa of three bits: each value is off by at most 1/16
    sums = adapter.weight_sumsq(layer)
    torch.testing.assert_close(sums.double(), values.double().square().sum(dim=1), rtol=0.05, atol=0)
    x = torch.randn(2, 5, GROUPS, 16)
    assert adapter.input(layer, (x,), {}).shape == (2, 5, GROUPS * 16)
    assert adapter.output(layer, torch.randn(2, 5, GROUPS, 8)).shape == (2, 5, GROUPS * 8)
