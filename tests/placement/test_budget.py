"""Budgets: exact parameter counts, predicted memory, and placements that fit."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer

from plop_ext.errors import InputError
from plop_ext.lora_target import LoraTarget
from plop_ext.placement import Placement
from plop_ext.placement.budget import Budget, most_types
from plop_ext.placement.peft import rank_pattern
from plop_ext.placement.ranks import DEFAULT_RANK, most_common
from plop_ext.scores import Scores
from plop_ext.scoring.score import score
from tests.support.gain_tables import scores, table
from tests.support.paths import ROOT
from tests.support.tiny_models import DECODERS, llama, token_batch

LEVELS = [0.5, 0.8, 1.2, 2.0]


@pytest.fixture(scope="module")
def measured() -> tuple[torch.nn.Module, Scores]:
    model = llama(num_hidden_layers=3)
    return model, score(model, [token_batch([20, 30])], max_samples=None, progress=False)


def trainable(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def lora_layers(model: torch.nn.Module) -> dict[str, LoraLayer]:
    prefix = "base_model.model."
    return {name.removeprefix(prefix): m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


@pytest.mark.parametrize("make", DECODERS.values(), ids=DECODERS.keys())
@pytest.mark.parametrize("ranks", [None, "inverse-nfn"])
@pytest.mark.filterwarnings("ignore:no signal")
def test_parameter_count_is_pefts_own(make: Any, ranks: str | None) -> None:
    model = make()
    found = score(model, [token_batch([20, 30])], max_samples=None, progress=False)
    placement = found.place(types=3, r=5, ranks=ranks)
    wrapped = get_peft_model(model, placement.lora_config(task_type="CAUSAL_LM"))
    placement.verify(wrapped)
    assert placement.num_parameters() == trainable(wrapped) == wrapped.get_nb_trainable_parameters()[0]
    assert placement.cost(model, 1, 1).trainable_parameters == trainable(wrapped)


@pytest.mark.filterwarnings("ignore:no signal")
def test_ranks_by_score_reach_peft_with_alpha_over_r_constant(measured: tuple[torch.nn.Module, Scores]) -> None:
    model, found = llama(num_hidden_layers=3), measured[1]
    # Untrained weights give equal scores, so that of some is halved.
    modules = (replace(m, baseline=m.baseline * (1 + i % 2)) for i, m in enumerate(found.modules))
    found = replace(found, modules=tuple(modules))
    placement = found.place(modules=0.75, r=8, ranks="inverse-nfn")
    assert len(set(placement.ranks.values())) > 1
    config = placement.lora_config(lora_alpha=24 * placement.r // 8)
    wrapped = get_peft_model(model, config)
    layers = lora_layers(wrapped)
    assert {name: layer.r["default"] for name, layer in layers.items()} == placement.ranks
    scales = {round(layer.scaling["default"], 6) for layer in layers.values()}
    assert len(scales) == 1 and scales.pop() == pytest.approx(config.lora_alpha / placement.r)
    assert len(config.rank_pattern) == len(set(placement.ranks.values())) - 1
    nfn = dict(zip(found.module_names, found.nfn, strict=True))
    # Lower NFN never gets the lower rank, and at the same parameters as one rank for all.
    ranked = sorted(placement.ranks, key=nfn.__getitem__)
    assert all(placement.ranks[a] >= placement.ranks[b] for a, b in pairwise(ranked))
    uniform = found.place(modules=0.75, r=8)
    assert uniform.ranks == {} and uniform.lora_config().rank_pattern == {}
    assert 0.85 < placement.num_parameters() / uniform.num_parameters() <= 1


def test_rank_pattern_is_one_key_per_rank_and_names_are_escaped() -> None:
    pattern = rank_pattern({"a.0.x": 4, "a.1.x": 4, "a.2.x": 8, "a.3.x": 2}, common=8)
    assert pattern == {r"a\.3\.x": 2, r"a\.0\.x|a\.1\.x": 4}


def kept_bytes(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> int:
    """Bytes of distinct tensors that the forwards of LoRA layers save for the backward, parameters apart."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    # Keeping each saved tensor keeps its address its own.
    saved: dict[int, torch.Tensor] = {}
    inside = [0]

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if inside[0] and address not in own:
            saved[address] = tensor
        return tensor

    def enter(*_: Any) -> None:
        inside[0] += 1

    def leave(*_: Any) -> None:
        inside[0] -= 1

    for layer in lora_layers(model).values():
        layer.register_forward_pre_hook(enter)
        layer.register_forward_hook(leave)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False], ids=["float32 adapters", "adapters as the model"])
@pytest.mark.parametrize(
    "types",
    [["q_proj", "k_proj", "v_proj"], ["o_proj", "down_proj"], ["gate_proj", "v_proj"], ["q_proj", "o_proj"]],
)
def test_activation_memory_is_what_autograd_keeps(
    types: list[str],
    dtype: torch.dtype,
    autocast: bool,
    measured: tuple[torch.nn.Module, Scores],
    device: torch.device,
) -> None:
    model = llama(num_hidden_layers=3).to(device, dtype)
    placement = measured[1].place(types=types, r=4)
    wrapped = get_peft_model(model, placement.lora_config(), autocast_adapter_dtype=autocast)
    batch = {"input_ids": torch.randint(3, 60, (2, 16), device=device)}
    adapters = "float32" if autocast else str(dtype)
    predicted = placement.cost(model, 2, 16, adapter_dtype=adapters)
    assert kept_bytes(wrapped, batch) == predicted.activation_bytes


@pytest.mark.filterwarnings("ignore:no signal")
def test_optimizer_memory_is_adams(measured: tuple[torch.nn.Module, Scores]) -> None:
    model = llama(num_hidden_layers=3)
    placement = measured[1].place(types=2, r=3)
    wrapped = get_peft_model(model, placement.lora_config())
    parameters = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    wrapped(input_ids=torch.randint(3, 60, (1, 8))).logits.sum().backward()
    optimizer.step()
    predicted = placement.cost(model, 1, 8)
    moments = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    assert predicted.optimizer_bytes == sum(value.nbytes for value in moments)
    assert predicted.gradient_bytes == sum(p.grad.nbytes for p in parameters if p.grad is not None)
    assert predicted.parameter_bytes == sum(p.nbytes for p in parameters)


def test_the_largest_rank_that_fits_is_taken() -> None:
    found = scores(table(LEVELS))
    one = found.place(types=2).num_parameters(1)
    for allowed in (one, 2 * one - 1, 9 * one, 10 * one - 1):
        placement = found.place(types=2, max_params=allowed)
        assert placement.num_parameters() <= allowed < placement.num_parameters(placement.r + 1)
    # A rank above min(K, M) = 64 gains nothing.
    assert found.place(types=2, max_params=10**9).r == 64
    first, *others = found.modules
    narrow = replace(found, modules=(replace(first, target=LoraTarget.of_module(first.name, 64, 5)), *others))
    assert narrow.place(strategy="all", max_params=10**9).r == 5


def test_without_a_budget_the_rank_is_the_default() -> None:
    assert scores(table(LEVELS)).place().r == DEFAULT_RANK


def test_a_budget_of_memory_is_met_to_the_byte() -> None:
    found = scores(table(LEVELS))
    exact = found.place(types=2, r=9).cost("float32", 1, 64).total_bytes
    for allowed, rank in ((exact, 9), (exact - 1, 8)):
        assert found.place(types=2, max_memory=allowed, batch=1, seq=64).r == rank


def test_the_most_types_of_a_budget_are_at_least_1() -> None:
    found = scores(table(LEVELS))
    candidates = [partial(found.place, types=count) for count in (1, 2, 3, 4)]
    one = candidates[0]().num_parameters(1)
    for params, r, most in (
        (1, None, 1),
        (DEFAULT_RANK * one, None, 1),
        (3 * DEFAULT_RANK * one - 1, None, 2),
        (3 * DEFAULT_RANK * one, None, 3),
        (8 * one, 2, 4),
        (8 * one - 1, 2, 3),
    ):
        assert most_types(candidates, Budget(params, None, "float32", 1, 1), r) == most


def test_types_are_given_up_before_the_rank_falls_too_low() -> None:
    found = scores(table(LEVELS))
    one = found.place(types=1).num_parameters(1)
    assert len(found.place(max_params=3 * 8 * one).types) == 3
    assert len(found.place(max_params=3 * 8 * one - 1).types) == 2
    for page in ("README.md", "docs/statistics.md"):  # they promise rank 8
        assert re.search(r"rank\s+8", (ROOT / page).read_text(encoding="utf-8")), page
    smallest = found.place(max_params=3 * one)
    assert len(smallest.types) == 1 and smallest.r == 3
    assert smallest.reason == "the budget allows 1 of the 3 lowest types"
    assert found.place(max_params=10**9).reason == found.place(types=2, max_params=10**9).reason == ""
    fixed = found.place(max_params=100 * one, r=40)
    assert len(fixed.types) == 2 and fixed.r == 40


def test_a_fraction_is_of_the_model() -> None:
    found = scores(table(LEVELS))
    assert found.place(max_params=0.1) == found.place(max_params=100_000)
    memory = found.place(max_memory=0.25, batch=1, seq=8)
    assert memory == found.place(max_memory=1_000_000, batch=1, seq=8)
    assert memory.cost("float32", 1, 8).total_bytes <= 1_000_000
    packed = scores(table(LEVELS), weight_bytes=2_000_000)
    assert packed.place(max_memory=0.5, batch=1, seq=8) == memory


def test_memory_budget_counts_activations() -> None:
    found = scores(table(LEVELS))
    small, large = (found.place(max_memory=40_000_000, batch=1, seq=seq) for seq in (64, 2048))
    assert small.cost("float32", 1, 64).total_bytes <= 40_000_000
    assert large.cost("float32", 1, 2048).total_bytes <= 40_000_000
    assert (len(small.types), small.r) > (len(large.types), large.r)


def test_both_budgets_and_uneven_ranks_hold_together() -> None:
    found = scores(table(LEVELS, own_layer_sd=0.1))
    placement = found.place(max_params=300_000, max_memory=30_000_000, batch=1, seq=64, ranks="inverse-nfn")
    assert placement.num_parameters() <= 300_000
    assert placement.cost("float32", 1, 64).total_bytes <= 30_000_000
    assert len(set(placement.ranks.values())) > 1 and placement.r == most_common(placement.ranks)
    at_rank = found.place(types=2, r=9, max_params=900_000, ranks="inverse-nfn")
    assert len(set(at_rank.ranks.values())) > 1
    assert at_rank.num_parameters() <= found.place(types=2, r=9).num_parameters()


def test_automatic_k_falls_back_to_the_budget() -> None:
    tied = scores(table([0.5, 0.501, 0.502, 0.503, 0.504], own_layer_sd=0.1))
    one = tied.place(types=1).num_parameters(16)
    placement = tied.place(types="auto", max_params=4 * one)
    assert len(placement.types) == 4
    assert "no cut passes every test, so this is the most that the budget allows" in placement.reason
    unlimited = tied.place(types="auto")
    assert len(unlimited.types) == 3 and "so this is the paper's number" in unlimited.reason
    clear = scores(table([0.5, 0.5, 2.0, 2.0, 2.0], own_layer_sd=0.05))
    assert len(clear.place(types="auto", max_params=4 * one).types) == 2


def test_a_placement_keeps_its_ranks_in_its_file(tmp_path: Any) -> None:
    placement = scores(table(LEVELS, own_layer_sd=0.2)).place(types="auto", max_params=200_000, ranks="inverse-nfn")
    placement.save(tmp_path / "p.json")
    assert Placement.load(tmp_path / "p.json") == placement


NOTHING_FITS = (
    "nothing fits {}: `lowest-1` at rank 1 has 49,920 parameters and adds 25.1 MiB; raise the budget, or place fewer "
    "modules"
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(({"max_params": value}, NOTHING_FITS.format("10 parameters")) for value in (10, 10.0, 1.05e-5)),
        ({"max_params": 1}, NOTHING_FITS.format("1 parameters")),
        ({"max_memory": 2**20}, NOTHING_FITS.format("1.0 MiB at 8 x 1024 tokens")),
        (
            {"max_params": 2000, "max_memory": 2**31, "batch": 2, "seq": 3},
            "nothing fits 2,000 parameters and 2,048.0 MiB at 2 x 3 tokens: `lowest-1` at rank 1 has 49,920 "
            "parameters and adds 0.8 MiB; raise the budget, or place fewer modules",
        ),
        (
            {"types": 2, "r": 8, "max_params": 100_000},
            "nothing fits 100,000 parameters: `lowest-2` at rank 8 has 798,720 parameters and adds 42.2 MiB; raise "
            "the budget, or place fewer",
        ),
        *(
            ({name: value}, f"`{name}` must be {wanted} or a fraction (0.25, 5%), got {value}")
            for name, wanted in (("max_params", "a number (24, 10M)"), ("max_memory", "a size (6GiB, 500MB)"))
            for value in (0, -1, 1.5, True, float("nan"), float("inf"))
        ),
        ({"r": 0}, "`r` must be at least 1"),
        ({"ranks": "equal"}, "`ranks` must be one of None, inverse-nfn"),
        ({"types": "auto", "strategy": "inverse"}, 'strategy="inverse" needs a number'),
        ({"max_memory": 10**9, "seq": 0}, "`seq` must be at least 1"),
    ],
)
def test_bad_budgets(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        scores(table(LEVELS)).place(**arguments)


def test_unknown_sizes_and_types_are_named() -> None:
    with pytest.raises(InputError, match="lack the size of the model"):
        scores(table(LEVELS), parameters=None).place(max_params=0.1)
    with pytest.raises(InputError, match="lack the size of the model"):
        scores(table(LEVELS), weight_bytes=None).place(max_memory=0.1)
    with pytest.raises(InputError, match="the model's weights are int8, whose memory cannot be predicted"):
        scores(table(LEVELS), dtype="int8").place(max_memory=10**9)
    assert scores(table(LEVELS), dtype="int8").place(types=1, max_params=10**9).r == 64
    unsaid = scores(table(LEVELS), dtype=None).place(max_memory=10**8, batch=1, seq=8)
    assert unsaid == scores(table(LEVELS), dtype="float32").place(max_memory=10**8, batch=1, seq=8)
    placement = scores(table(LEVELS, own_layer_sd=0.2)).place(ranks="inverse-nfn")
    with pytest.raises(InputError, match="every module of this placement has its own rank"):
        placement.lora_config(r=8)
    with pytest.raises(InputError, match="values of type int8"):
        placement.cost("int8", 1, 1)
