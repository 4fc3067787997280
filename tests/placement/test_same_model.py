"""What tells another checkpoint of the same shapes: how far a norm may be off, and which weights are read."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from plop_ext.errors import InputError
from plop_ext.layers.linear import LinearAdapter
from plop_ext.lora_target import LoraTarget
from plop_ext.placement.fingerprint import Fingerprint, fingerprints_of
from plop_ext.placement.same_model import check_same_model
from plop_ext.score_data import ScoredModule
from tests.support.scored_modules import scored_module


def stack(layers: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(8, 4) for _ in range(layers)))


def check(model: nn.Sequential, factor: float = 1.0, kind: str = "linear") -> None:
    """Check the model against fingerprints whose norms are `factor` times its own."""
    targets = [LoraTarget.of_module(str(i), 8, 4) for i in range(len(model))]
    norms = {str(i): Fingerprint(kind, float(layer.weight.norm()) * factor) for i, layer in enumerate(model)}
    check_same_model(model, targets, norms)


@pytest.mark.parametrize(
    ("kind", "passes", "fails"), [("linear", 5e-4, 2e-3), ("bitsandbytes 4-bit", 0.04, 0.06)], ids=["same", "other"]
)
@pytest.mark.parametrize("sign", [1, -1])
def test_how_far_a_norm_may_be_off(kind: str, passes: float, fails: float, sign: int) -> None:
    """Rounding to bfloat16 stays within 1e-4, and 4-bit codes within 1e-2; another checkpoint is off by more."""
    check(stack(), 1 + sign * passes, kind)
    with pytest.raises(InputError, match=r"made for other weights: `0` was scored with norm .*, in this Sequential"):
        check(stack(), 1 + sign * fails, kind)


@pytest.mark.parametrize(("layers", "read"), [(1, 1), (8, 8), (9, 5), (16, 8), (40, 8)])
def test_at_most_8_weights_are_read_and_they_are_spread(
    layers: int, read: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = stack(layers), []
    original = LinearAdapter.weight_sumsq
    monkeypatch.setattr(LinearAdapter, "weight_sumsq", lambda self, m: seen.append(m) or original(self, m))
    check(model)
    places = [next(i for i, layer in enumerate(model) if layer is module) for module in seen]
    assert places == list(range(0, layers, math.ceil(layers / 8))) and len(places) == read


def test_a_wrong_weight_is_named_with_both_norms() -> None:
    model = stack(2)
    with torch.no_grad():
        model[1].weight.mul_(2)
    own = float(model[0].weight.norm()), float(model[1].weight.norm())
    fingerprints = {"0": Fingerprint("linear", own[0]), "1": Fingerprint("linear", own[1] / 2)}
    message = rf"`1` was scored with norm {own[1] / 2:.4g}, in this Sequential it has {own[1]:.4g}; score this model"
    with pytest.raises(InputError, match=message):
        check_same_model(model, [], fingerprints)


def test_what_takes_more_than_reading_a_weight_is_not_compared() -> None:
    class Packed(nn.Module):
        in_features, out_features = 8, 4

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError("no forward runs to check a placement")

    model = nn.Sequential(Packed(), nn.ReLU(), nn.Linear(8, 4, device="meta"))
    check_same_model(model, [], {name: Fingerprint("linear", 1.0) for name in "012"})


@pytest.mark.parametrize(
    ("target", "found"),
    [
        (LoraTarget.of_module("0", 8, 5), "has 8 x 4 there"),
        (LoraTarget.of_module("7", 8, 4), "has no such module"),
        (LoraTarget.of_module("1", 8, 4), "has no such module"),
        (LoraTarget("0.weight", True, 12, (8, 4)), "has 4 x 8 there"),
        (LoraTarget("0.other", True, 12, (4, 8)), "has no such module"),
        (LoraTarget("7.weight", True, 12, (4, 8)), "has no such module"),
    ],
)
def test_another_shape_or_none_is_named(target: LoraTarget, found: str) -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU())
    check_same_model(model, [LoraTarget.of_module("0", 8, 4), LoraTarget("0.weight", True, 12, (4, 8))], {})
    wanted = " x ".join(map(str, target.shape))
    with pytest.raises(InputError, match=rf"wants `{target.name}` \({wanted}\), but Sequential {found}; score this"):
        check_same_model(model, [target], {})


def part(name: str, out_features: int, norm: float | None, target: LoraTarget) -> ScoredModule:
    return ScoredModule(name, "t", 0, 8, out_features, 1.0, norm, target, kind="packed")


def test_the_norm_of_a_packed_weight_is_that_of_its_parts() -> None:
    whole = LoraTarget.of_module("qkv", 8, 12)
    parts = [part("qkv.q", 8, 3.0, whole), part("qkv.k", 4, 4.0, whole)]
    assert fingerprints_of([whole], parts) == {"qkv": Fingerprint("packed", 5.0)}
    assert fingerprints_of([whole], parts[:1]) == {}  # not all of it is scored
    assert fingerprints_of([whole], [parts[0], part("qkv.k", 4, None, whole)]) == {}


def test_only_targets_get_a_fingerprint_and_parameters_get_none() -> None:
    modules = [scored_module(name, "t", 0, 8, 4, 1.0, 2.0) for name in "ab"]
    assert fingerprints_of([modules[1].target], modules) == {"b": Fingerprint("linear", 2.0)}
    parameter = LoraTarget("experts.down", True, 12, (8, 4))
    assert fingerprints_of([parameter], [part("experts.0", 4, 1.0, parameter)]) == {}
