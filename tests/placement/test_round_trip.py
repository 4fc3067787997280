"""`verify` sends the values of an adapter through PEFT's saving and loading, and leaves no trace of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn

from plop_ext.errors import InputError
from plop_ext.layers import discover
from plop_ext.placement.round_trip import check_round_trip
from tests.support.architectures import ARCHITECTURES
from tests.support.renaming import old_names
from tests.support.tiny_models import llama

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"]


@pytest.fixture
def loses_q_proj() -> Iterator[None]:
    """The rule of Laguna in small: its pattern, with a dot for any character, also fits the name of today."""
    with old_names("llama", r"self_attn.q.", "self_attn.q_proj."):
        yield


def state(model: nn.Module) -> dict[str, Any]:
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "pointers": {name: weight.data_ptr() for name, weight in model.named_parameters()},
        "flags": {name: (weight.requires_grad, id(weight)) for name, weight in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "random": torch.get_rng_state(),
    }


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    values = all(torch.equal(value, after["values"][name]) for name, value in before["values"].items())
    rest = all(before[part] == after[part] for part in ("pointers", "flags", "modes"))
    return values and rest and torch.equal(before["random"], after["random"])


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 3, "target_modules": NAMES, **fields})


def with_a_second_adapter() -> nn.Module:
    model = get_peft_model(llama(), lora())
    model.add_adapter("second", lora(target_modules=NAMES[:1], r=2))
    return model


WRAPPED: dict[str, Callable[[], nn.Module]] = {
    "fresh": lambda: get_peft_model(llama(), lora()),
    "trained": lambda: get_peft_model(llama(), lora(init_lora_weights=False)),
    "rank one": lambda: get_peft_model(llama(), lora(r=1)),
    "bfloat16": lambda: get_peft_model(llama().bfloat16(), lora(), autocast_adapter_dtype=False),
    "with biases": lambda: get_peft_model(llama(attention_bias=True), lora(bias="all")),
    "with a whole module": lambda: get_peft_model(llama(), lora(modules_to_save=["lm_head"])),
    "dora": lambda: get_peft_model(llama(), lora(use_dora=True)),
    "two adapters": with_a_second_adapter,
    "injected": lambda: inject_adapter_in_model(lora(), llama()),
    "of no transformers model": lambda: get_peft_model(
        nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"])
    ),
    "training": lambda: get_peft_model(llama(), lora()).train(),
    "in data parallel": lambda: nn.DataParallel(get_peft_model(llama(), lora())),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WRAPPED)
def test_an_adapter_that_survives_passes_and_is_as_before(name: str) -> None:
    model = WRAPPED[name]()
    before = state(model)
    check_round_trip(model)
    assert same(before, state(model))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in WRAPPED if "transformers" not in name and name != "bfloat16"])
def test_lost_values_are_named_and_the_adapter_is_as_before(name: str, loses_q_proj: None) -> None:
    model = WRAPPED[name]()
    before = state(model)
    with pytest.raises(
        InputError, match=r"PEFT loads \d+ of \d+ values of the adapter other than it saves them \(`.*q_proj"
    ):
        check_round_trip(model)
    assert same(before, state(model))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_stacked_experts_survive(name: str) -> None:
    model = ARCHITECTURES[name].build()
    names = {layer.target.name: layer.target.parameter for layer in discover(model).layers}
    config = LoraConfig(
        r=2,
        target_modules=[name for name, parameter in names.items() if not parameter],
        target_parameters=[name for name, parameter in names.items() if parameter],
    )
    adapted = get_peft_model(model, config)
    before = state(adapted)
    check_round_trip(adapted)
    assert same(before, state(adapted))


def test_values_on_the_meta_device_are_not_checked(loses_q_proj: None) -> None:
    with torch.device("meta"):
        check_round_trip(get_peft_model(llama(), lora()))


def test_what_peft_loses_is_refused_before_it_is_placed(loses_q_proj: None) -> None:
    refused = {layer.name: layer.target.refused for layer in discover(llama()).layers}
    assert {name for name, reason in refused.items() if "renames" in reason} == {
        f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)
    }
    assert {reason for name, reason in refused.items() if "q_proj" not in name} == {""}


def test_a_rule_that_fails_on_a_value_refuses_that_module_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.utils import transformers_weight_conversion as conversion

    def convert(model: nn.Module, config: LoraConfig, values: dict[str, Tensor], adapter: str) -> dict[str, Tensor]:
        if any("layers.1.mlp.up_proj" in name for name in values):
            raise ValueError("stack expects each tensor to be equal size")
        return values

    monkeypatch.setattr(conversion, "convert_peft_adapter_state_dict_for_transformers", convert)
    with old_names("llama", "never", "never"):
        refused = {layer.name for layer in discover(llama()).layers if layer.target.refused}
    assert refused == {"model.layers.1.mlp.up_proj"}
