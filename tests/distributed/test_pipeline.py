"""Stages of a pipeline: together they give bitwise the scores of the whole model, on every process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from plop_ext import InputError, Scores, StopRule
from tests.support import tiny_models
from tests.support.parallel_models import loaded
from tests.support.processes import in_processes
from tests.support.quiet import quietly


def batches() -> list[dict[str, Tensor]]:
    return [tiny_models.token_batch(lengths, seed=seed) for seed, lengths in enumerate(([20, 9], [14, 16], [8, 8]))]


def from_files(model: Any, folder: Path, sizes: dict[str, Any], settings: dict[str, Any]) -> Scores:
    return quietly(loaded(model, folder, **sizes), batches(), **settings)


def described(scores: Scores) -> tuple[Any, ...]:
    modules = [(module.type, module.target, module.kind, module.no_place) for module in scores.modules]
    return modules, {(item.name, item.reason) for item in scores.unscored}


def assert_one_model(model: Any, folder: Path, count: int, settings: dict[str, Any], **sizes: Any) -> None:
    model.save_pretrained(folder)
    one = quietly(model, batches(), **settings)
    for scores in in_processes(count, from_files, model, folder, sizes, settings):
        assert scores.module_names == one.module_names
        assert described(scores) == described(one)
        assert scores.nfn.tobytes() == one.nfn.tobytes()
        assert scores.totals.values.tobytes() == one.totals.values.tobytes()
        wanted = {**one.provenance["model"], "name": None}
        assert {**scores.provenance["model"], "name": None} == wanted
        assert scores.provenance["stop"] == one.provenance["stop"]


def llama(layers: int = 2) -> nn.Module:
    return tiny_models.llama(num_hidden_layers=layers)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "layers"), [(2, 2), (2, 3), (3, 4), (4, 4)])
def test_stages_are_bitwise_the_whole_model(count: int, layers: int, tmp_path: Path) -> None:
    assert_one_model(llama(layers), tmp_path, count, {}, pp_size=count)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"baseline": "probe"},
        {"token_step": 3},
        {"stop": StopRule(types=2, confidence=0.6, min_samples=2), "max_samples": 128},
        {"include": ["layers.0.mlp.up_proj", "lm_head"]},
        {"include": ["layers.1.mlp.up_proj"]},
    ],
    ids=["probe", "step", "stop", "include", "one stage"],
)
def test_settings(settings: dict[str, Any], tmp_path: Path) -> None:
    assert_one_model(llama(), tmp_path, 2, settings, pp_size=2)


@pytest.mark.slow
def test_stages_of_a_model_with_biases_and_tied_embeddings(tmp_path: Path) -> None:
    model = tiny_models.llama(attention_bias=True, tie_word_embeddings=True)
    assert_one_model(model, tmp_path, 2, {}, pp_size=2)


@pytest.mark.slow
def test_stages_of_experts(tmp_path: Path) -> None:
    assert_one_model(tiny_models.mixtral(), tmp_path, 2, {}, pp_size=2)


def score_quantized(model: Any, folder: Path) -> str:
    stage: Any = loaded(model, folder, pp_size=2)
    stage.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(InputError) as caught:
        quietly(stage, batches())
    return str(caught.value)


@pytest.mark.slow
def test_stages_with_quantized_weights_are_refused(tmp_path: Path) -> None:
    model: Any = llama()
    model.save_pretrained(tmp_path)
    for message in in_processes(2, score_quantized, model, tmp_path):
        assert "quantized weights" in message or "unsupported" in message
