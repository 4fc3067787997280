"""What is adapted for what was chosen, and the notes on where the two differ."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from plop_ext.errors import InputError
from plop_ext.lora_target import LoraTarget
from plop_ext.placement import Placement
from plop_ext.placement.targets import notes_of, targets_of
from plop_ext.score_data import ScoredModule
from plop_ext.score_data.modules import FEW_ROUTED
from plop_ext.unscored import UnscoredModule
from tests.support.gain_tables import scores, table
from tests.support.made_scores import few_tokens, made
from tests.support.scored_modules import scored_module


def plain(name: str) -> ScoredModule:
    return scored_module(name, "t", 0, 8, 4)


def parts_of(name: str, count: int) -> list[ScoredModule]:
    whole = LoraTarget.of_module(name, 8, 4 * count)
    return [replace(plain(f"{name}.{i}"), target=whole) for i in range(count)]


def refused(name: str, reason: str = "PEFT refuses it") -> ScoredModule:
    module = plain(name)
    return replace(module, target=replace(module.target, refused=reason))


def test_a_target_is_there_once_in_the_models_order_and_none_that_is_refused() -> None:
    qkv = parts_of("qkv", 3)
    chosen = [plain("a"), qkv[0], refused("b"), qkv[2], plain("c")]
    assert [target.name for target in targets_of(chosen)] == ["a", "qkv", "c"]


def test_no_note_where_peft_adapts_just_what_was_chosen() -> None:
    everything = [plain("a"), *parts_of("qkv", 2), refused("b")]
    assert notes_of(everything[:3], everything) == ()


@pytest.mark.parametrize(
    ("chosen", "note"),
    [
        ([0], "PEFT adapts whole weights: `x` also hold 2 scored parts that were not chosen"),
        ([0, 2], "PEFT adapts whole weights: `x` also hold 1 scored part that was not chosen"),
        ([0, 3], "PEFT adapts whole weights: `x`, `y` also hold 3 scored parts that were not chosen"),
    ],
)
def test_parts_that_come_along_are_counted(chosen: list[int], note: str) -> None:
    everything = [*parts_of("x", 3), *parts_of("y", 2)]
    assert notes_of([everything[i] for i in chosen], everything) == (note,)


def test_what_peft_refuses_is_named_by_reason() -> None:
    chosen = [*(refused(f"m{i}") for i in range(5)), refused("n", "it is odd")]
    assert notes_of(chosen, chosen) == (
        "without LoRA: `m0`, `m1`, `m2` and 2 more: PEFT refuses it",
        "without LoRA: `n`: it is odd",
    )
    assert notes_of(chosen[:4], chosen) == ("without LoRA: `m0`, `m1`, `m2` and 1 more: PEFT refuses it",)
    assert notes_of(chosen[:3], chosen) == ("without LoRA: `m0`, `m1`, `m2`: PEFT refuses it",)


def placed(**fields: Any) -> Placement:
    made = {"modules": ("a",), "types": ("t",), "strategy": "types", "label": "t", "model": "M", "lora_targets": ()}
    return Placement(**{**made, **fields})


def test_all_names_the_experts_that_it_leaves_out_and_why() -> None:
    experts = few_tokens()
    shared = replace(experts.modules[0].target, name="layers.0.q_proj")
    with_the_others = replace(experts.modules[0], target=shared)
    scored = made(
        few_tokens=replace(experts, modules=(with_the_others, experts.modules[1])),
        unscored=(
            UnscoredModule("layers.1.experts", "Odd", "no adapter reads its class"),
            UnscoredModule("conv", "Conv1d", "never called"),
            UnscoredModule("layers.0.experts.1", "Experts", FEW_ROUTED),
            UnscoredModule("lm_head", "Linear", "outside the repeated blocks", wanted=False),
        ),
    )
    notes = scored.place(strategy="all").notes
    assert notes == (
        "without LoRA: `layers.0.experts.1`: too few tokens were routed to it",
        "without LoRA: `layers.1.experts`: no adapter reads its class",
    )
    assert scored.place(strategy="attention").notes == ()


def test_a_placement_without_a_target_says_why() -> None:
    nothing = placed(notes=("without LoRA: `a`: PEFT refuses it", "and more"))
    message = "PEFT can adapt nothing of `t`: without LoRA: `a`: PEFT refuses it; and more; place other modules"
    for use in (nothing.targets, nothing.lora_config, lambda: nothing.rank_for(10)):
        with pytest.raises(InputError, match=message):
            use()


def test_the_ranks_of_targets() -> None:
    targets = tuple(LoraTarget.of_module(name, 8, 4) for name in "ab")
    placement = placed(lora_targets=targets, r=5, ranks={"b": 7})
    assert placement.ranks_at() == {"a": 5, "b": 7} and placement.ranks_at(3) == {"a": 3, "b": 3}
    assert placement.num_parameters() == 12 * 12 and placement.num_parameters(3) == 12 * 6
    assert placed().r == 16 and placed().reason == "" and placed().fingerprints == {}


def test_a_target_of_a_module_and_its_largest_rank() -> None:
    assert LoraTarget.of_module("a", 8, 4) == LoraTarget("a", False, 12, (8, 4), "")
    assert LoraTarget.of_module("a", 8, 4).max_rank == LoraTarget("a", True, 1, (2, 9, 4)).max_rank == 4


@pytest.mark.parametrize(
    "change",
    [
        {"name": 3},
        {"parameter": 0},
        {"size": 0},
        {"size": True},
        {"size": 12.0},
        {"shape": [8]},
        {"shape": [8, 0]},
        {"shape": ["8", "4"]},
        {"shape": 8},
        {"refused": None},
        {"surplus": 1},
    ],
    ids=str,
)
def test_a_damaged_target_is_refused(change: dict[str, Any]) -> None:
    fields = LoraTarget("a", True, 12, (8, 4), "no").to_dict()
    assert LoraTarget.from_dict({**fields, "shape": [8, 4]}) == LoraTarget("a", True, 12, (8, 4), "no")
    with pytest.raises((TypeError, ValueError)):
        LoraTarget.from_dict({**fields, **change})


def test_the_smallest_target_there_can_be_is_read() -> None:
    smallest = LoraTarget("a", False, 1, (1, 1))
    assert LoraTarget.from_dict(smallest.to_dict()) == smallest
    with pytest.raises(ValueError, match=r"no LoRA target: LoraTarget\(name='a', parameter=False, size=0, .*"):
        LoraTarget.from_dict({**smallest.to_dict(), "size": 0})


def test_modules_that_peft_all_refuses_can_be_placed_but_not_configured() -> None:
    found = scores(table([0.5, 2.0]))
    modules = tuple(replace(m, target=replace(m.target, refused="it is odd")) for m in found.modules)
    for arguments in ({}, {"ranks": "inverse-nfn"}, {"max_params": 100}, {"max_params": 100, "ranks": "inverse-nfn"}):
        placement = replace(found, modules=modules).place(types=1, **arguments)
        assert placement.lora_targets == () and placement.num_parameters() == 0 and placement.ranks == {}
        with pytest.raises(InputError, match=r"PEFT can adapt nothing of `lowest-1`: without LoRA: .*: it is odd"):
            placement.lora_config()
