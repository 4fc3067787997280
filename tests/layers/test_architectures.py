"""One table over many architectures: all is scored or reported, right, and PEFT adapts exactly what was placed."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from plop_ext import score
from plop_ext.scores import Scores
from tests.support.architectures import ARCHITECTURES, Architecture
from tests.support.layer_oracle import oracle


def is_lookup(module: nn.Module) -> bool:
    """Whether its weights are tables of vectors, which no activation is multiplied with."""
    return isinstance(module, nn.Embedding) or "embedding" in type(module).__name__.lower()


def scored(case: Architecture) -> tuple[nn.Module, dict[str, torch.Tensor], Scores]:
    model, batch = case.build(), case.batch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = score(model, [batch], progress=False, **case.kwargs)
    return model, batch, scores


def without_gradient(adapted: nn.Module, batch: dict[str, torch.Tensor]) -> list[str]:
    """Names of the matrices B of LoRA whose gradient is exactly zero, or that the forward does not call."""
    output = adapted(**batch)
    values = [value for value in output.values() if isinstance(value, torch.Tensor) and value.requires_grad]
    sum((value * torch.randn_like(value)).mean() for value in values).backward()  # type: ignore[union-attr]
    matrices = {name: weight.grad for name, weight in adapted.named_parameters() if "lora_B" in name}
    return [name for name, gradient in matrices.items() if gradient is None or not gradient.any()]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(name: str, tmp_path: Path) -> None:
    from peft import PeftModel, get_peft_model

    case = ARCHITECTURES[name]
    model, batch, scores = scored(case)

    # Every matrix is scored or reported with a reason.
    targets = {module.target.name for module in scores.modules}
    reported = {item.name for item in scores.unscored}
    assert all(item.reason for item in scores.unscored)
    for parameter_name, parameter in model.named_parameters():
        module_name = parameter_name.rpartition(".")[0]
        if parameter.dim() < 2 or is_lookup(model.get_submodule(module_name)):
            continue
        known = {parameter_name, module_name} & (targets | reported)
        assert known or any(entry.startswith(module_name + ".") for entry in reported), parameter_name
    assert len(scores.types) == case.types, scores.types

    # Every score is right.
    expected = oracle(model, batch, scores, packed=case.packed)
    tolerance = 1e-4 if any(module.kind == "stacked experts" for module in scores.modules) else 1e-5
    actual = dict(zip(scores.module_names, scores.nfn.tolist(), strict=True))
    assert actual == pytest.approx(expected, rel=tolerance)
    for leaf in case.packed:
        assert any(f".{leaf}." in entry for entry in actual), f"{leaf} is not scored by parts"

    # What is placed is what PEFT wraps, at the size it says, also after a reload.
    placement = scores.place(strategy="all")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, placement.lora_config(r=2))
    placement.verify(adapted)
    assert without_gradient(adapted, batch) == []
    trainable = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    assert trainable == placement.num_parameters(2)
    adapted.save_pretrained(tmp_path)
    fresh = case.build()
    placement.check_model(fresh)
    placement.verify(PeftModel.from_pretrained(fresh, tmp_path))
