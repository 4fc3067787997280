"""Ranks that do not hold the same model are refused, with what they hold."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import distributed, nn

from plop_ext.scoring.score import score
from tests.support import tiny_models
from tests.support.processes import ends_of

pytestmark = pytest.mark.slow

BATCH = {"input_ids": torch.arange(3, 51).view(2, 24)}


class RowLinear(nn.Linear):
    """A column shard, whose partial sums are added: the form of Megatron and of most hand-written parallelism."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        distributed.all_reduce(y)
        return y


def shards_by_hand(size: int) -> None:
    rank = distributed.get_rank()
    model = tiny_models.llama()
    rows, columns = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")
    for name, module in list(model.named_modules()):
        leaf = name.rpartition(".")[2]
        if leaf in rows + columns:
            part: Any = module.weight.detach().chunk(size, int(leaf in columns))[rank]  # type: ignore[operator,union-attr]
            shard = (RowLinear if leaf in columns else nn.Linear)(part.shape[1], part.shape[0], bias=False)
            shard.weight.data.copy_(part)
            setattr(model.get_submodule(name.rpartition(".")[0]), leaf, shard)
    quietly(model)


def stages(size: int) -> None:
    rank = distributed.get_rank()
    model = tiny_models.llama()
    model.get_submodule("model").layers = model.get_submodule("model.layers")[rank : rank + 1]  # type: ignore[index]
    quietly(model)


def renamed_stages(size: int) -> None:
    rank = distributed.get_rank()
    model = tiny_models.llama()
    model.get_submodule("model.layers")[1 - rank] = nn.Identity()  # type: ignore[index]
    quietly(model)


def quietly(model: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        score(model, [BATCH], max_samples=None, progress=False)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (shards_by_hand, "`model`: the weight of `model.layers.0.self_attn.q_proj` has the norm "),
        (stages, "`model`: the weight of `model.layers.0.self_attn.q_proj` has the norm "),
        (
            renamed_stages,
            "`model`: rank 1 holds other layers than rank 0, such as `model.layers.0.mlp.down_proj`",
        ),
    ],
)
def test_parts_of_a_model_without_marks_are_refused(function: Any, expected: str) -> None:
    for found in ends_of(2, function, 2):
        assert found.error.startswith(f"InputError: {expected}"), found
        assert "pass process_group=None" in found.error


def other_settings(name: str, values: tuple[Any, Any]) -> None:
    options = {"max_samples": None, "progress": False, name: values[distributed.get_rank()]}
    score(tiny_models.llama(), [{**BATCH, "labels": BATCH["input_ids"]}], **options)


@pytest.mark.parametrize(
    ("name", "values"),
    [("mask", ("attention", "completion")), ("token_step", (1, 4)), ("seed", (0, 1)), ("max_samples", (1, 2))],
)
def test_ranks_with_other_settings_are_refused(name: str, values: tuple[Any, Any]) -> None:
    for found in ends_of(2, other_settings, name, values):
        expected = f"InputError: `{name}` is {values[1]!r} on rank 1 and {values[0]!r} on rank 0; "
        assert found.error.startswith(expected), found
