"""Predicted memory, term by term, from plain values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from plop_ext.errors import InputError
from plop_ext.lora_target import LoraTarget
from plop_ext.placement.cost import Cost, cost


def module(name: str, in_features: int = 32, out_features: int = 8) -> LoraTarget:
    return LoraTarget.of_module(name, in_features, out_features)


def activations(*names: str, model: str = "bfloat16", adapters: str = "bfloat16", tokens: int = 1) -> int:
    """Bytes kept of a forward by adapters of rank 1, without their own values of r."""
    targets = [module(name) for name in names]
    width = 2 if adapters == "bfloat16" else 4
    found = cost(targets, dict.fromkeys(names, 1), model, tokens, 1, adapter_dtype=adapters)
    return found.activation_bytes - len(names) * width * tokens


def test_every_term() -> None:
    targets = [module("a.q_proj"), module("a.up", 16, 4), LoraTarget("a.experts", True, 100, (3, 5, 7))]
    found = cost(targets, {"a.q_proj": 2, "a.up": 3, "a.experts": 5}, "float16", 2, 10, adapter_dtype="float32")
    parameters = 2 * 40 + 3 * 20 + 5 * 100
    kept = 20 * 4 * (32 + 16) + 20 * 4 * (2 + 3) + 2 * 3 * 5 * 7
    assert found == Cost(parameters, 4 * parameters, 4 * parameters, 8 * parameters, kept)
    assert found.total_bytes == 16 * parameters + kept


def test_adapters_are_float32_by_default() -> None:
    assert cost([module("a")], {"a": 1}, "bfloat16", 1, 1).parameter_bytes == 4 * 40


def test_siblings_share_one_input_and_other_parents_or_widths_do_not() -> None:
    assert activations("a.q_proj", "a.k_proj", "a.v_proj") == 2 * 32
    assert activations("a.q_proj", "b.q_proj") == 2 * 2 * 32
    assert activations("q_proj", "k_proj") == 2 * 32
    wide = [module("a.q_proj"), module("a.other", 16)]
    assert cost(wide, {"a.q_proj": 1, "a.other": 1}, "bfloat16", 1, 1, adapter_dtype="bfloat16").activation_bytes == (
        2 * (32 + 16) + 2 * 2
    )


@pytest.mark.parametrize(
    "leaf", ["o_proj", "out_proj", "c_proj", "down_proj", "fc2", "wo", "w2", "dense", "dense_4h_to_h", "lin2"]
)
def test_a_projection_back_to_the_residual_stream_has_an_input_of_its_own(leaf: str) -> None:
    """Also where its width is that of its siblings, as of `o_proj` and `q_proj`."""
    assert activations("a.q_proj", "a.k_proj", f"a.{leaf}") == 2 * 2 * 32
    assert activations(f"a.{leaf}") == 2 * 32


def test_adapters_of_another_type_keep_a_copy_each() -> None:
    assert activations("a.q_proj", "a.k_proj", adapters="float32", tokens=3) == 3 * 2 * 4 * 32
    assert activations("a.q_proj", "a.k_proj", model="float32", adapters="float32", tokens=3) == 3 * 4 * 32


@pytest.mark.parametrize(("dtype", "width"), [("float64", 8), ("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_the_bytes_of_every_type(dtype: str, width: int) -> None:
    of_type = getattr(torch, dtype)
    for model in (dtype, f"torch.{dtype}", of_type, nn.Linear(2, 2).to(of_type)):
        found = cost([module("a")], {"a": 1}, model, 1, 1, adapter_dtype=dtype)
        assert found.parameter_bytes == 40 * width and found.activation_bytes == (32 + 1) * width


def test_the_type_of_a_model_is_that_of_its_first_floating_point_parameter() -> None:
    model = nn.Module()
    model.codes = nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    for wanted in ("float32", "bfloat16"):
        found = cost([module("a.q"), module("a.k")], {"a.q": 1, "a.k": 1}, model, 1, 1, adapter_dtype=wanted)
        # Without a parameter of a floating-point type: float32.
        assert found.activation_bytes == (4 * 32 + 8 if wanted == "float32" else 2 * 2 * 32 + 4)
    model.norm = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    shared = cost([module("a.q"), module("a.k")], {"a.q": 1, "a.k": 1}, model, 1, 1, adapter_dtype="bfloat16")
    assert shared.activation_bytes == 2 * 32 + 4


@pytest.mark.parametrize(("batch", "seq", "name"), [(0, 1, "batch"), (1, 0, "seq"), (-1, 1, "batch")])
def test_sizes_below_1_are_refused(batch: int, seq: int, name: str) -> None:
    with pytest.raises(InputError, match=f"`{name}` must be at least 1, got"):
        cost([module("a")], {"a": 1}, "float32", batch, seq)


def test_unknown_types_are_named_with_those_there_are() -> None:
    message = "`model` has values of type int8; name one of float64, float32, bfloat16, float16"
    for model in ("int8", torch.int8):
        with pytest.raises(InputError, match=message):
            cost([module("a")], {"a": 1}, model, 1, 1)
