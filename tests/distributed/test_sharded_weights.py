"""Models whose weights FSDP shards have bitwise the scores of one process, and are at rest again."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn

from plop_ext import find_plop_target_modules
from tests.support import tiny_models
from tests.support.processes import in_processes
from tests.support.quiet import quietly
from tests.support.sharded_models import HALF, held, sharded


def batches() -> list[dict[str, Tensor]]:
    return [tiny_models.token_batch(lengths, seed=seed) for seed, lengths in enumerate(([20, 9], [14, 17], [8, 8]))]


def bits(scores: Any) -> tuple[Any, ...]:
    """All numbers of scores, and what they are of."""
    totals = scores.totals
    return (
        [(module.name, module.type, module.baseline, module.weight_norm, module.target) for module in scores.modules],
        np.asarray(getattr(totals, "values", totals)).tobytes(),
        {(item.name, item.reason) for item in scores.unscored},
        scores.provenance["model"],
    )


def score_sharded(model: nn.Module, wrap: str, settings: dict[str, Any]) -> tuple[Any, bool]:
    """The scores of a sharded copy, and whether the copy is held as before."""
    copied = sharded(model, wrap)
    with torch.no_grad():  # FSDP prepares itself in the first forward
        copied(torch.ones(1, 4, dtype=torch.long))
    if "not resharded" not in wrap:
        quietly(copied, batches()[:1])
    before = held(copied)
    found = bits(quietly(copied, batches(), **settings))
    return found, held(copied) == before


def assert_bitwise(model: nn.Module, wrap: str, count: int, **settings: Any) -> None:
    expected = bits(quietly(model, batches(), **settings))
    for found, at_rest in in_processes(count, score_sharded, model, wrap, settings):
        for part, wanted in zip(found, expected, strict=True):
            assert part == wanted
        assert at_rest


@pytest.mark.parametrize("wrap", ["FSDP2", "FSDP1", "FSDP1, original parameters"])
def test_a_sharded_model_is_bitwise_identical_to_one_process(wrap: str) -> None:
    assert_bitwise(tiny_models.qwen2(), wrap, 2)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3, 4])
@pytest.mark.parametrize("wrap", ["FSDP2", "FSDP1", "FSDP1, original parameters"])
def test_any_number_of_processes_is_bitwise_identical_to_one(wrap: str, count: int) -> None:
    assert_bitwise(tiny_models.qwen2(), wrap, count)


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrap",
    ["FSDP2, root only", "FSDP2, each layer", "FSDP2, not resharded", "FSDP2, gathered", "FSDP2, resharded to one"],
)
def test_every_way_to_shard_is_bitwise_identical_to_one_process(wrap: str) -> None:
    assert_bitwise(tiny_models.qwen2(), wrap, 2)


@pytest.mark.slow
def test_hybrid_shards_are_bitwise_identical_to_one_process() -> None:
    assert_bitwise(tiny_models.qwen2(), "HSDP", 4)


@pytest.mark.slow
@pytest.mark.parametrize("build", [tiny_models.gpt2, tiny_models.mixtral, tiny_models.gemma3, tiny_models.bert])
def test_every_kind_of_layer_is_bitwise_identical_to_one_process(build: Any) -> None:
    model = build()
    wrap = "FSDP2" if hasattr(model, "model") or hasattr(model, "transformer") else "FSDP2, root only"
    assert_bitwise(model, wrap, 2)


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["FSDP2", "FSDP1, original parameters"])
def test_probes_of_a_sharded_model_are_bitwise_identical_to_one_process(wrap: str) -> None:
    assert_bitwise(tiny_models.qwen2(), wrap, 2, baseline="probe")


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(2 * x, self.weight, self.bias)


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["FSDP2", "FSDP1"])
def test_a_forward_of_its_own_is_tried_on_whole_weights(wrap: str) -> None:
    model: Any = tiny_models.llama()
    for block in model.model.layers:
        block.mlp.up_proj.__class__ = Doubled
    assert_bitwise(model, wrap, 2)


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["FSDP2, mixed precision", "FSDP1, mixed precision"])
def test_norms_under_mixed_precision_are_those_of_the_weights_that_the_forward_uses(wrap: str) -> None:
    model = tiny_models.qwen2()
    expected = {
        module.name: module.weight_norm
        for module in quietly(copy.deepcopy(model).to(HALF.param_dtype), batches()).modules
    }
    for norms in in_processes(2, norms_of, model, wrap):
        assert norms == expected


def norms_of(model: nn.Module, wrap: str) -> dict[str, float]:
    return {module.name: module.weight_norm for module in quietly(sharded(model, wrap), batches()).modules}


def adapted(model: Any) -> nn.Module:
    with_lora: nn.Module = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    for name, weight in with_lora.named_parameters():
        if "lora_" in name:
            nn.init.constant_(weight, 0.1)
    return with_lora


@pytest.mark.slow
def test_base_layers_under_adapters_are_bitwise_identical_to_one_process() -> None:
    assert_bitwise(adapted(tiny_models.qwen2()), "FSDP2, each block", 2)


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["compiled", "compiled blocks"])
def test_compiled_and_sharded_models_are_bitwise_identical_to_one_process(wrap: str) -> None:
    assert_bitwise(tiny_models.qwen2(), f"FSDP2, {wrap}", 2)


def targets_of(model: nn.Module, wrap: str) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return find_plop_target_modules(sharded(model, wrap), batches(), types=2, max_samples=None, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["FSDP2", "FSDP1", "FSDP1, original parameters"])
def test_the_one_liner_names_the_modules_of_the_plain_model(wrap: str) -> None:
    model = tiny_models.qwen2()
    expected = quietly(model, batches()).place(types=2).targets()
    for found in in_processes(2, targets_of, model, wrap):
        assert found == expected
