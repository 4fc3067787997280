"""What inference engines can serve of a placement, and the nearest placement that they can."""

from __future__ import annotations

from typing import Any

import pytest

from plop_ext.errors import InputError
from plop_ext.lora_target import LoraTarget
from plop_ext.placement import Placement
from plop_ext.placement.serving import ENGINES
from tests.support.gain_tables import scores, table
from tests.support.saved_scores import ranked

ATTENTION = [LoraTarget.of_module(f"layers.{layer}.attn.v_proj", 32, 32) for layer in (0, 1)]
DOWN = [LoraTarget(f"layers.{layer}.mlp.experts.down_proj", True, 96, (2, 32, 16)) for layer in (0, 1)]
GATE_UP = [LoraTarget(f"layers.{layer}.mlp.experts.gate_up_proj", True, 128, (2, 32, 32)) for layer in (0, 1)]
DENSE = LoraTarget("layers.2.mlp.down_proj.weight", True, 48, (32, 16))


def placed(targets: list[LoraTarget], left_out: list[LoraTarget] | None = None, **fields: Any) -> Placement:
    return Placement(("a",), ("t",), "types", "x", "M", tuple(targets), left_out=tuple(left_out or ()), **fields)


def names(placement: Placement | None) -> set[str]:
    assert placement is not None
    return {target.name for target in placement.lora_targets}


@pytest.mark.parametrize("engine", ENGINES)
def test_attention_at_one_rank_is_served_everywhere(engine: str) -> None:
    placement = placed(ATTENTION, DOWN + GATE_UP)
    found = placement.servable(engine)
    assert found and found.reasons == () and found.nearest is placement


def test_half_of_a_layers_experts_is_completed_for_vllm() -> None:
    placement = placed([ATTENTION[0], DOWN[0]], [*ATTENTION[1:], DOWN[1], *GATE_UP])
    found = placement.servable("vllm")
    reason = "it serves both halves of a layer's experts or none: with `layers.0.mlp.experts.gate_up_proj` too"
    assert not found and found.reasons == (reason,)
    assert names(found.nearest) == {ATTENTION[0].name, DOWN[0].name, GATE_UP[0].name}
    assert found.nearest is not None and found.nearest.notes == (f"for vLLM: {reason}",)
    assert names_of(found.nearest.left_out) == {ATTENTION[1].name, DOWN[1].name, GATE_UP[1].name}
    assert found.nearest.servable("vllm") and "--enable-mixed-moe-lora-format" in found.options[1]


def names_of(targets: tuple[LoraTarget, ...]) -> set[str]:
    return {target.name for target in targets}


def test_both_halves_are_served_by_vllm_only() -> None:
    placement = placed([*ATTENTION, DOWN[0], GATE_UP[0]])
    assert placement.servable("vllm")
    for engine in ("sglang", "llama.cpp"):
        found = placement.servable(engine)
        assert "stacked experts: without `layers.0.mlp.experts.down_proj`" in found.reasons[0]
        assert names(found.nearest) == names_of(tuple(ATTENTION))


def test_a_half_whose_other_half_cannot_get_lora_is_left_out() -> None:
    refused = LoraTarget(GATE_UP[0].name, True, 128, (2, 32, 32), "PEFT refuses it")
    for left_out in ([refused], []):
        found = placed([ATTENTION[0], DOWN[0]], left_out).servable("vllm")
        assert names(found.nearest) == {ATTENTION[0].name}
        assert found.reasons == (f"it serves both halves of a layer's experts or none: without `{DOWN[0].name}`",)
        assert placed([DOWN[0]], left_out).servable("vllm").nearest is None


@pytest.mark.parametrize("engine", ["sglang", "llama.cpp"])
def test_ranks_of_their_own_become_one_without_more_parameters(engine: str) -> None:
    placement = placed(ATTENTION, r=8, ranks={ATTENTION[0].name: 4, ATTENTION[1].name: 13})
    assert placement.servable("vllm").options == ("--enable-lora --max-lora-rank 16",)
    found = placement.servable(engine)
    assert "rank 8 for all" in found.reasons[0]
    assert found.nearest is not None and (found.nearest.r, found.nearest.ranks) == (8, {})
    assert found.nearest.num_parameters() <= placement.num_parameters()
    same = placed(ATTENTION, r=4, ranks={target.name: 4 for target in ATTENTION})
    assert same.servable(engine)


def test_heads_are_left_out() -> None:
    head = LoraTarget.of_module("lm_head", 32, 64)
    for engine in ENGINES:
        found = placed([head, *ATTENTION]).servable(engine)
        assert found.reasons == ("it serves no LoRA on heads and embeddings: without `lm_head`",)
        assert names(found.nearest) == names_of(tuple(ATTENTION))
        assert placed([head]).servable(engine).nearest is None


@pytest.mark.parametrize(("rank", "needed"), [(1, 1), (8, 8), (9, 16), (17, 32), (300, 320), (512, 512)])
def test_vllm_is_told_the_next_rank_that_it_knows(rank: int, needed: int) -> None:
    wide = LoraTarget.of_module("layers.0.v_proj", 2048, 2048)
    assert placed([wide], r=rank).servable("vllm").options == (f"--enable-lora --max-lora-rank {needed}",)


def test_ranks_above_the_largest_are_capped() -> None:
    wide = [LoraTarget.of_module(f"layers.{layer}.v_proj", 2048, 2048) for layer in (0, 1)]
    found = placed(wide, r=600, ranks={wide[0].name: 700, wide[1].name: 4}).servable("vllm")
    assert found.reasons == ("its largest rank is 512, not 700",)
    assert found.nearest is not None and found.nearest.ranks_at() == {wide[0].name: 512, wide[1].name: 4}


def test_modules_of_parameters_are_named_to_sglang() -> None:
    assert placed([DENSE]).servable("sglang").options == ("--lora-target-modules down_proj",)
    assert placed([DENSE, ATTENTION[0]]).servable("sglang").options == ()


def test_an_unknown_engine_is_named_with_those_there_are() -> None:
    with pytest.raises(InputError, match=r"`engine` must be one of .*llama.cpp.*, got 'tgi'"):
        placed(ATTENTION).servable("tgi")


class TestPlacing:
    def test_for_an_engine_gives_what_it_serves(self) -> None:
        for engine in ENGINES:
            found = ranked().place(types=2, serve=engine)
            assert found.servable(engine) and found.fingerprints == ranked().place(types=2).fingerprints != {}
        assert ranked().place(types=2, serve="vllm", ranks="inverse-nfn").ranks

    def test_ranks_are_refused_where_one_is_applied(self) -> None:
        with pytest.raises(InputError, match="`ranks`: SGLang applies one rank to all modules"):
            ranked().place(types=2, serve="sglang", ranks="inverse-nfn")

    def test_an_unknown_engine_is_refused(self) -> None:
        with pytest.raises(InputError, match="`serve` must be one of"):
            scores(table([0.5, 0.8])).place(types=1, serve="x")

    def test_experts_are_completed_within_the_budget(self) -> None:
        found = mixture()
        half = found.place(types=["down"], r=4)
        whole = found.place(types=["down"], serve="vllm", r=4)
        assert not half.servable("vllm") and whole.servable("vllm")
        assert len(whole.lora_targets) == 2 * len(half.lora_targets)
        most = half.num_parameters() * 2
        fitted = found.place(types=["down"], serve="vllm", max_params=most)
        assert fitted.num_parameters() <= most and fitted.servable("vllm")


def mixture() -> Any:
    """Scores of a model whose experts hold two stacked weights a layer."""
    from dataclasses import replace

    plain = ranked(types=("down", "gate_up", "v_proj"))
    modules = []
    for module in plain.modules:
        if module.type != "v_proj":
            name = f"model.layers.{module.layer}.mlp.experts.{module.type}_proj"
            target = LoraTarget(name, True, 128, (2, 32, 32))
            module = replace(module, name=name, target=target, kind="stacked experts")
        modules.append(module)
    return replace(plain, modules=tuple(modules))
