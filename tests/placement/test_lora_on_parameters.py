"""LoRA on a parameter changes W itself within the forward; the base layer is scored."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import plop_ext
from plop_ext.collecting.collector import Collector
from plop_ext.layers import discover
from tests.support.architecture_parts import long_batch, text_batch
from tests.support.architectures import ARCHITECTURES
from tests.support.layer_oracle import dense_weight, expert_gains, expert_matrices, gains, nfn_of
from tests.support.quiet import nfn, quietly


def adapt(model: nn.Module, *parameters: str) -> nn.Module:
    """`model` with LoRA whose B is far from zero."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=32, target_modules=[], target_parameters=list(parameters))
    config.init_lora_weights = False
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        return get_peft_model(model, config)


def calls_of(model: nn.Module, module: nn.Module, batch: dict[str, Tensor]) -> tuple[Any, ...]:
    """Arguments of the one call of `module` when `model` runs."""
    calls = []
    handle = module.register_forward_hook(lambda module, args, output: calls.append(args))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    (args,) = calls
    return args


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("parameters", [["down_proj"], ["gate_up_proj"], ["gate_up_proj", "down_proj"]], ids="+".join)
def test_adapted_experts_are_scored_by_their_own_weights(name: str, parameters: list[str]) -> None:
    model, batch = ARCHITECTURES[name].build(), long_batch()
    experts = [layer.mlp.experts for layer in model.model.layers]
    adapted = adapt(model, *(f"mlp.experts.{parameter}" for parameter in parameters))
    scores = quietly(adapted, [batch])
    counted = batch["attention_mask"].reshape(-1).bool()
    actual, expected = nfn(scores), {}
    for index, module in enumerate(experts):
        hidden, chosen, *_ = calls_of(adapted, module, batch)
        for entry, values in expert_gains(module, hidden.reshape(-1, hidden.shape[-1]), chosen, counted).items():
            expert, projection = entry.split(".")
            full = f"model.layers.{index}.mlp.experts.{entry}"
            # The oracle's input of the last projection is that of unadapted first ones.
            if full in actual and not (projection == "down_proj" and "gate_up_proj" in parameters):
                expected[full] = nfn_of(expert_matrices(module)[projection][int(expert)], values)
    assert len(expected) >= 12
    assert {entry: actual[entry] for entry in expected} == pytest.approx(expected, rel=1e-4)


def test_the_adapted_model_goes_on_as_it_would() -> None:
    model, batch = ARCHITECTURES["qwen3_moe"].build(), text_batch()
    plain = model(**batch).logits
    adapted = adapt(model, "mlp.experts.gate_up_proj", "mlp.experts.down_proj", "q_proj.weight")
    model.set_experts_implementation("grouped_mm")
    with torch.no_grad():
        expected = adapted(**batch).logits
        with Collector(adapted, discover(adapted).layers) as collector:
            collector.begin(3, batch["attention_mask"])
            actual = adapted(**batch).logits
            collector.end()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6)
    assert (expected - plain).abs().max() > 0.1


def test_an_adapted_linear_weight_is_scored_by_itself() -> None:
    model, batch = ARCHITECTURES["llama"].build(), text_batch()
    layers = [(index, layer.self_attn.q_proj) for index, layer in enumerate(model.model.layers)]
    adapted = adapt(model, "q_proj.weight")
    scores = nfn(quietly(adapted, [batch]))
    mask = batch["attention_mask"].bool()
    for index, module in layers:
        (z,) = calls_of(adapted, module, batch)
        expected = nfn_of(dense_weight(module), gains(dense_weight(module), z[mask]))
        assert scores[f"model.layers.{index}.self_attn.q_proj"] == pytest.approx(expected, rel=1e-5)


def test_what_cannot_be_told_apart_is_reported() -> None:
    adapted = adapt(ARCHITECTURES["gpt2"].build(), "mlp.c_fc.weight")
    with pytest.warns(UserWarning, match="c_fc"):
        scores = plop_ext.score(adapted, [text_batch()], progress=False)
    reported = {item.name: item.reason for item in scores.unscored}
    for layer in range(2):
        assert reported[f"transformer.h.{layer}.mlp.c_fc"].startswith(
            "PEFT adds LoRA to the weight within the forward"
        )
    assert "mlp.c_proj" in scores.types
