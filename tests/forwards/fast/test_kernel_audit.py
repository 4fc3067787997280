"""What the audit of kernel calls knows of an op comes from the op's schema, by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from plop_ext import ops
from plop_ext.forwards.fast.kernel_audit import Audit, Roles, roles_of

ROLES = {
    "add_rms_norm_": Roles(("normed", "hidden", "x", "residual"), ("normed", "hidden"), ("x_sumsq", "normed_sumsq")),
    "gated_activation_": Roles(("out", "gate", "up"), ("out",), ("gate_sumsq", "up_sumsq", "out_sumsq")),
    "gated_projection_": Roles(("out", "x"), ("out",), ("gate_sumsq", "up_sumsq", "out_sumsq")),
    "rotary_": Roles(("q_out", "k_out", "q", "k", "cos", "sin"), ("q_out", "k_out"), ("q_sumsq", "k_sumsq")),
}


@pytest.mark.parametrize("op", ROLES)
def test_the_roles_of_every_fused_op(op: str) -> None:
    assert roles_of(op) == ROLES[op]


@pytest.fixture
def widened(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """`add_rms_norm_` with three more arguments in the middle: a tensor of the rows, a weight and a number."""
    schema = str(torch.ops.plop_ext.add_rms_norm_.default._schema).split("(", 1)[1]
    schema = schema.replace("Tensor x,", "Tensor x, Tensor scale, Tensor scale_weight, int heads,")
    library = torch.library.Library("plop_ext", "FRAGMENT")
    library.define(f"widened_norm_({schema}")

    def kernel(scale: Tensor, scale_weight: Tensor, heads: int, **arguments: Any) -> None:
        assert scale.shape == arguments["x"].shape and scale_weight.dim() == 1
        ops.add_rms_norm_pytorch(**arguments)

    monkeypatch.setattr(ops, "widened_norm_pytorch", kernel, raising=False)
    yield "widened_norm_"
    library._destroy()
    roles_of.cache_clear()


@pytest.mark.parametrize("wrong", [None, "normed", "hidden", "x_sumsq", "normed_sumsq"])
def test_an_argument_in_the_middle_shifts_nothing(widened: str, wrong: str | None) -> None:
    x, residual, weight = torch.randn(6, 16), torch.randn(6, 16), torch.randn(16)
    norm = {"normed": torch.empty(6, 16), "hidden": torch.empty(6, 16), "x": x, "residual": residual, "weight": weight}
    norm |= {"x_sumsq": torch.empty(3), "normed_sumsq": torch.empty(3)}
    arguments: dict[str, Any] = {**norm, "eps": 1e-5, "step": 2, "phase": 1}
    ops.add_rms_norm_pytorch(**arguments)
    if wrong is not None:
        arguments[wrong][-1] *= 1.1
    audit = Audit()
    audit.compare(widened, {**arguments, "scale": torch.rand(6, 16), "scale_weight": torch.rand(4), "heads": 4})
    found = audit.disagreement()
    assert (found is None) == (wrong is None)
    assert wrong is None or found == "a row of widened_norm is off by 1.0e-01, more than 1.0e-05"
