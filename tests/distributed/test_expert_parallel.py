"""Mixtures of experts over several processes: each expert under its own name, and no token of another process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

from plop_ext import Scores
from tests.support import tiny_models
from tests.support.parallel_models import loaded
from tests.support.processes import in_processes
from tests.support.quiet import nfn, quietly

RTOL = 1e-6


def batches() -> list[dict[str, Tensor]]:
    return [tiny_models.token_batch(lengths, seed=seed) for seed, lengths in enumerate(([40, 29], [34, 36], [38, 38]))]


def qwen3_moe() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=tiny_models.VOCAB,
        hidden_size=tiny_models.HIDDEN,
        moe_intermediate_size=tiny_models.INNER,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        pad_token_id=0,
    )
    return Qwen3MoeForCausalLM(config).eval()


def from_files(model: Any, folder: Path, sizes: dict[str, Any], settings: dict[str, Any]) -> Scores:
    return quietly(loaded(model, folder, **sizes), batches(), **settings)


def one_and_many(
    folder: Path, count: int, sizes: dict[str, Any], settings: dict[str, Any]
) -> tuple[Scores, list[Scores]]:
    model: Any = qwen3_moe()
    model.save_pretrained(folder)
    return quietly(model, batches(), **settings), in_processes(count, from_files, model, folder, sizes, settings)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"token_step": 3}, {"baseline": "probe"}], ids=["default", "step", "probe"])
@pytest.mark.parametrize("count", [2, 4])
def test_experts_of_a_shared_batch(count: int, settings: dict[str, Any], tmp_path: Path) -> None:
    sizes = {"tp_size": count, "ep_size": count, "tp_plan": "auto"}
    one, many = one_and_many(tmp_path, count, sizes, settings)
    assert sum(".experts." in name for name in one.module_names) == 2 * 4 * 3
    for scores in many:
        assert scores.module_names == one.module_names
        assert [module.target for module in scores.modules] == [module.target for module in one.modules]
        np.testing.assert_allclose(scores.nfn, one.nfn, rtol=RTOL)
        np.testing.assert_array_equal(scores.totals.tokens, one.totals.tokens)
        assert scores.totals.values.tobytes() == many[0].totals.values.tobytes()
        assert nfn(scores) == nfn(many[0])


@pytest.mark.slow
def test_columns_of_experts_are_scored_and_their_partial_sums_left_out(tmp_path: Path) -> None:
    one, many = one_and_many(tmp_path, 2, {"tp_size": 2, "tp_plan": "auto"}, {})
    wanted = {name: value for name, value in nfn(one).items() if ".experts." not in name or "down_proj" not in name}
    for scores in many:
        assert nfn(scores) == pytest.approx(wanted, rel=RTOL)
        left_out = {item.name: item.reason for item in scores.unscored if item.wanted}
        assert len(left_out) == 2 * 4 and all("partial sum" in reason for reason in left_out.values())


def score_exchanging(model: Any, folder: Path, sizes: dict[str, Any]) -> list[str]:
    scores = quietly(loaded(model, folder, **sizes), batches())
    assert not any(".experts." in name for name in scores.module_names)
    return [item.reason for item in scores.unscored if item.wanted]


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        {"fsdp_size": 2, "ep_size": 2},
        {"tp_size": 2, "ep_size": 2, "tp_plan": "auto", "ep_implementation": "all_to_all"},
    ],
    ids=["other batches", "the same batch"],
)
def test_tokens_of_other_processes_are_refused_by_name(sizes: dict[str, Any], tmp_path: Path) -> None:
    model: Any = qwen3_moe()
    model.save_pretrained(tmp_path)
    for reasons in in_processes(2, score_exchanging, model, tmp_path, sizes):
        assert len(reasons) == 2 and all("all-to-all" in reason for reason in reasons)
