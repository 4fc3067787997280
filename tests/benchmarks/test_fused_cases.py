"""The PyTorch rival of a fused op does the same work."""

from __future__ import annotations

import pytest
import torch

from benchmarks.fused_cases import CASES, FusedCase


@pytest.mark.parametrize("model", ["llama-3.1-8b", "qwen3-0.6b", "gemma-2-9b"])
@pytest.mark.parametrize("kind", CASES)
def test_the_rival_does_what_the_op_does(kind: type[FusedCase], model: str) -> None:
    case = kind(model, 6, torch.float32, torch.device("cpu"))
    tensors = case.tensors()
    case.run(tensors)
    expected = case.modules(tensors)
    for name, value in zip(case.written, expected, strict=True):
        torch.testing.assert_close(tensors[name], value, rtol=1e-5, atol=1e-5)
    values = {**tensors, **dict(zip(case.written, expected, strict=True))}
    sums = {name.removesuffix("_sumsq"): value for name, value in tensors.items() if name.endswith("_sumsq")}
    assert len(sums) == case.vectors
    for name, value in sums.items():
        torch.testing.assert_close(value, values[name].reshape(6, -1).square().sum(1), rtol=1e-5, atol=0.0)
    activations = [value for name, value in tensors.items() if name not in ("cos", "sin")]
    assert case.bytes == sum(value.nbytes for value in activations)
