"""What PEFT gets of a placement, and the check of what it made of it."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from plop_ext.errors import InputError, SetupError
from plop_ext.lora_target import LoraTarget
from plop_ext.placement import Placement
from plop_ext.placement.peft import adapters, rank_pattern


def placed(targets: Sequence[LoraTarget], **fields: Any) -> Placement:
    return Placement(("a",), ("t",), "types", "a label", "Model", tuple(targets), **fields)


MODULES = [LoraTarget.of_module(name, 8, 8) for name in ("0", "1.up", "2")]
EXPERTS = LoraTarget("experts.up", True, 32, (8, 8))


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.ModuleDict({"up": nn.Linear(8, 8)}), nn.Linear(8, 8))


def test_one_rank_for_all_is_the_placements_and_alpha_twice_the_rank() -> None:
    for arguments, expected in (
        ({}, (6, 12)),
        ({"r": 3}, (3, 6)),
        ({"lora_alpha": 5}, (6, 5)),
        ({"r": 3, "lora_alpha": 5}, (3, 5)),
    ):
        config = placed(MODULES, r=6).lora_config(**arguments)
        assert (config.r, config.lora_alpha) == expected
        assert config.rank_pattern == config.alpha_pattern == {}
        assert config.target_modules == {"0", "1.up", "2"} and config.target_parameters is None


def test_ranks_of_their_own_reach_every_layer_with_one_scale() -> None:
    placement = placed(MODULES, r=4, ranks={"0": 4, "1.up": 2, "2": 3})
    config = placement.lora_config(lora_alpha=6)
    assert (config.r, config.lora_alpha) == (4, 6)
    assert config.rank_pattern == {r"1\.up": 2, "2": 3} and config.alpha_pattern == {r"1\.up": 3, "2": 4.5}
    wrapped = get_peft_model(model(), config)
    layers = {name: layer for name, layer in wrapped.base_model.model.named_modules() if isinstance(layer, LoraLayer)}
    assert {name: layer.r["default"] for name, layer in layers.items()} == placement.ranks
    assert {layer.scaling["default"] for layer in layers.values()} == {1.5}
    given = placement.lora_config(rank_pattern={"0": 1}, alpha_pattern={"0": 2})
    assert given.rank_pattern == {"0": 1} and given.alpha_pattern == {"0": 2}


def test_parameters_are_apart_from_modules() -> None:
    assert placed(MODULES).targets() == {"target_modules": ["0", "1.up", "2"], "target_parameters": None}
    assert placed([EXPERTS]).targets() == {"target_modules": [], "target_parameters": ["experts.up"]}
    config = placed([*MODULES, EXPERTS]).lora_config(lora_dropout=0.0, use_dora=False, bias="none")
    assert config.target_modules == {"0", "1.up", "2"} and config.target_parameters == ["experts.up"]
    assert placed(MODULES).lora_config(lora_dropout=0.5).lora_dropout == 0.5


@pytest.mark.parametrize(
    ("placement", "arguments", "message"),
    [
        *(
            (placed(MODULES), {name: ["0"]}, f"`{name}` comes from the placement; leave it out")
            for name in ("target_modules", "target_parameters")
        ),
        (
            placed(MODULES, ranks={"0": 2}),
            {"r": 2},
            "`r`: every module of this placement has its own rank; leave `r` out",
        ),
        *(
            (
                placed([EXPERTS, *MODULES]),
                {name: value},
                f"`{name}`={value!r}: PEFT cannot do that on parameters, which this placement has (`experts.up`); "
                "leave it out",
            )
            for name, value in (("lora_dropout", 0.5), ("use_dora", True), ("lora_bias", "all"))
        ),
    ],
)
def test_what_peft_or_the_placement_does_not_allow(
    placement: Placement, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        placement.lora_config(**arguments)
    assert str(caught.value) == message


def test_every_note_is_a_warning() -> None:
    with pytest.warns(UserWarning) as caught:
        placed(MODULES, notes=("one", "two")).lora_config()
    assert [str(warning.message) for warning in caught] == ["one", "two"]


def test_peft_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SetupError) as caught:
        placed(MODULES).lora_config()
    assert str(caught.value) == "`lora_config` needs PEFT: pip install peft"


@pytest.mark.parametrize(
    ("adapted", "counts", "example"),
    [
        (["0", "1.up"], "1 chosen modules without LoRA and 0 others", "2"),
        (["0"], "2 chosen modules without LoRA and 0 others", "1.up"),
        (["0", "1.up", "2", "3"], "0 chosen modules without LoRA and 1 others", "3"),
        (["0", "3"], "2 chosen modules without LoRA and 1 others", "1.up"),
    ],
)
def test_another_wrap_is_refused_with_an_example(adapted: list[str], counts: str, example: str) -> None:
    wrapped = get_peft_model(model().append(nn.Linear(8, 8)), LoraConfig(target_modules=adapted))
    with pytest.raises(InputError) as caught:
        placed(MODULES).verify(wrapped)
    assert str(caught.value) == (
        f"`peft_model` does not match the placement: {counts} with it (`{example}`); wrap the model that was scored "
        "with `lora_config()`"
    )
    placed([LoraTarget.of_module(name, 8, 8) for name in adapted]).verify(wrapped)


def test_adapted_parameters_have_the_names_of_the_model_without_adapters() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Parameter(torch.ones(2, 8, 8)), nn.Parameter(torch.ones(2, 8, 8))

    wrapped = nn.Sequential(OrderedDict(experts=Experts(), head=nn.Linear(8, 8)))
    config = LoraConfig(target_modules=["head"], target_parameters=["experts.up", "experts.down"])
    assert adapters(get_peft_model(wrapped, config))["default"] == {"experts.up", "experts.down", "head"}


def test_a_rank_pattern_lists_the_ranks_upwards() -> None:
    ranks = {"a": 8, "b": 2, "c.d": 4, "e": 2, "f": 16}
    assert list(rank_pattern(ranks, common=4).items()) == [("b|e", 2), ("a", 8), ("f", 16)]
    assert rank_pattern({}, common=4) == {}


def test_ranks_are_in_the_keywords_of_a_configuration() -> None:
    shown = placed(MODULES, r=2, ranks={"0": 2, "1.up": 4, "2": 2})
    config = LoraConfig(r=64, lora_alpha=1, **shown.targets())
    wrapped = get_peft_model(model(), config)
    layers = {name: layer for name, layer in wrapped.base_model.model.named_modules() if isinstance(layer, LoraLayer)}
    found = {name: (layer.r["default"], layer.scaling["default"]) for name, layer in layers.items()}
    assert found == {"0": (2, 2.0), "1.up": (4, 2.0), "2": (2, 2.0)}


def test_a_deleted_adapter_leaves_no_trace_in_the_check() -> None:
    wrapped = get_peft_model(model(), LoraConfig(r=1, target_modules=["2"]))
    wrapped.delete_adapter("default")
    wrapped.add_adapter("default", LoraConfig(r=2, target_modules=["0", "1.up"]))
    assert isinstance(wrapped.base_model.model[2], LoraLayer)  # PEFT leaves it wrapped
    placed(MODULES[:2]).verify(wrapped)
    placed(MODULES[:2]).verify(wrapped, adapter_name="default")


def test_each_adapter_is_checked_on_its_own() -> None:
    wrapped = get_peft_model(model(), LoraConfig(r=1, target_modules=["2"]), adapter_name="first")
    wrapped.add_adapter("second", LoraConfig(r=2, target_modules=["0"]))
    placed(MODULES[2:]).verify(wrapped, "first")
    placed(MODULES[:1]).verify(wrapped, "second")
    with pytest.raises(InputError, match="1 chosen modules without LoRA and 1 others"):
        placed(MODULES[:1]).verify(wrapped, "first")
    with pytest.raises(InputError, match=r"has no adapter `c`; its adapters: `first`, `second`"):
        placed(MODULES).verify(wrapped, "c")
