"""The frobenius baseline of narrow layers: E||W u|| for every kind of layer, so that no width is favoured."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import plop_ext
from plop_ext import reference
from plop_ext.layers import LayerAdapter, LinearLayer, Split, Unsupported, discover
from plop_ext.layers import gram as gram_module
from plop_ext.layers.gram import NARROW, grams
from plop_ext.layers.opaque import OpaqueAdapter
from plop_ext.lora_target import LoraTarget
from plop_ext.scoring.baseline import frobenius_baselines, frobenius_norms, probe_baselines
from tests.support.architectures import ARCHITECTURES
from tests.support.layer_oracle import dense_weight, expert_matrices


def baselines_of(layers: Iterable[LinearLayer]) -> list[float]:
    found = list(layers)
    return frobenius_baselines(found, frobenius_norms(found).values)


def made(module: nn.Module, adapter: LayerAdapter, in_features: int, out_features: int) -> LinearLayer:
    target = LoraTarget.of_module("w", in_features, out_features)
    return LinearLayer("w", "w", 0, in_features, out_features, module, adapter, target)


@pytest.mark.parametrize("outputs", [2, 4, 16, 64, 128, 129, 160])
def test_noise_scores_1_at_every_width(outputs: int) -> None:
    model = nn.Sequential(nn.Linear(256, outputs, bias=False))
    scores = plop_ext.score(model, [torch.randn(8, 500, 256)], stop=None, progress=False)
    # The mean of 4000 gains of this standard deviation; just above the limit, the baseline is 0.1 % too high.
    tolerance = 5 / math.sqrt(2 * outputs * 4000) + (0.0015 if outputs > NARROW else 0.0)
    assert scores.nfn[0] == pytest.approx(1.0, abs=tolerance)


@pytest.mark.parametrize("sizes", [(128, 300), (300, 128), (129, 300), (300, 129)])
def test_the_limit_is_128_outputs_or_inputs(sizes: tuple[int, int]) -> None:
    out_features, in_features = sizes
    (layer,) = discover(nn.Sequential(nn.Linear(in_features, out_features))).layers
    weight = layer.module.weight
    (value,) = baselines_of([layer])
    flat = float(weight.detach().double().norm()) / math.sqrt(in_features)
    if min(sizes) > 128:
        assert value == pytest.approx(flat, rel=1e-7)
        # What is left above the limit.
        assert flat / reference.mean_gain(weight) - 1 == pytest.approx(0.001, abs=0.001)
    else:
        assert value == pytest.approx(reference.mean_gain(weight), rel=1e-7)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_above_the_limit_the_baseline_is_near_the_probed_one(decay: float) -> None:
    """The bias is 1 / (4 n), with n = (sum l)^2 / sum l^2 the effective number of the eigenvalues l of W W^T."""
    spectrum = torch.arange(1, 201, dtype=torch.float64) ** -decay
    model = nn.Sequential(nn.Linear(256, 200, bias=False))
    u, _, v = torch.linalg.svd(torch.randn(200, 256, dtype=torch.float64), full_matrices=False)
    model[0].weight.data = (u * spectrum.sqrt() @ v).float()
    found = discover(model).layers
    (exact,), (probed,) = baselines_of(found), probe_baselines(found, probes=40_000, seed=0)
    effective = float(spectrum.sum() ** 2 / spectrum.square().sum())
    # Minus 1 / (4 K), by which the norm of a normal vector is below sqrt(K).
    assert exact / probed - 1 == pytest.approx(1 / (4 * effective) - 1 / (4 * 256), abs=5e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(1, 70), (70, 1), (6, 70), (70, 6)], ids=str)
def test_every_dtype_equals_the_oracle(dtype: torch.dtype, sizes: tuple[int, int], device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(sizes[1], sizes[0])).to(device, dtype)
    (value,) = baselines_of(discover(model).layers)
    assert value == pytest.approx(reference.mean_gain(model[0].weight), rel=1e-7)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_convolutions_of_groups_are_block_diagonal(groups: int) -> None:
    model = nn.Sequential(nn.Conv1d(8, 16, 3, groups=groups))
    (value,) = baselines_of(discover(model).layers)
    assert value == pytest.approx(reference.mean_gain(dense_weight(model[0])), rel=1e-7)


@pytest.mark.parametrize("name", ["gpt2", "phi3", "gpt_neox", "modernbert"])
def test_transposed_and_packed_weights(name: str) -> None:
    model = ARCHITECTURES[name].build()
    layers = discover(model).layers
    parts = 0
    for layer, value in zip(layers, baselines_of(layers), strict=True):
        weight = dense_weight(layer.module)
        if layer.split is not None:
            parts += 1
            columns = ARCHITECTURES[name].packed[layer.name.split(".")[-2]](len(weight))
            weight = weight[columns[layer.name.rpartition(".")[2]]]
        assert value == pytest.approx(reference.mean_gain(weight), rel=1e-7), layer.name
    assert parts


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_each_expert_has_its_own(name: str) -> None:
    model = ARCHITECTURES[name].build()
    layers = [layer for layer in discover(model).layers if ".experts." in layer.name]
    assert len(layers) == 2 * 4 * 3
    some = layers[1:9:2] + layers[12:]  # not all parts of a module
    for chosen in (layers, some):
        for layer, value in zip(chosen, baselines_of(chosen), strict=True):
            expert, projection = layer.name.rsplit(".", 2)[-2:]
            weight = expert_matrices(layer.module)[projection][int(expert)]
            assert value == pytest.approx(reference.mean_gain(weight), rel=1e-7)


class Chunked(LayerAdapter):
    """Dequantizes 5 rows at a time."""

    def features(self, module: Any) -> tuple[int, int]:
        return module.weight.shape[1], module.weight.shape[0]

    def weight_chunks(self, module: Any) -> Iterable[Tensor]:
        return module.weight.detach().split(5)


def test_quantized_weights_in_chunks_and_their_parts() -> None:
    module = nn.Linear(30, 24)
    (value,) = baselines_of([made(module, Chunked(), 30, 24)])
    assert value == pytest.approx(reference.mean_gain(module.weight), rel=1e-7)
    split = Split(("a", "b"), (4, 2))
    layers = [replace(made(module, Chunked(), 30, size), part=part, split=split) for part, size in enumerate((16, 8))]
    rows = torch.arange(24).view(4, 6)
    expected = [module.weight[rows[:, :4].flatten()], module.weight[rows[:, 4:].flatten()]]
    assert baselines_of(layers) == pytest.approx([reference.mean_gain(weight) for weight in expected], rel=1e-7)


def test_a_narrow_part_of_a_wide_weight() -> None:
    module = nn.Linear(140, 150)
    split = Split(("wide", "narrow"), (140, 10))
    layers = [
        replace(made(module, Chunked(), 140, size), part=part, split=split) for part, size in enumerate((140, 10))
    ]
    flat = float(module.weight[:140].detach().double().norm()) / math.sqrt(140)
    assert baselines_of(layers) == pytest.approx([flat, reference.mean_gain(module.weight[140:])], rel=1e-7)


def test_a_weight_that_only_its_forward_knows() -> None:
    module = nn.Linear(300, 7)
    (value,) = baselines_of([made(module, OpaqueAdapter(), 300, 7)])
    assert value == pytest.approx(reference.mean_gain(module.weight), rel=1e-5)


def test_a_weight_that_cannot_be_read_or_holds_no_number_is_left_alone() -> None:
    class Unreadable(Chunked):
        def part_sumsq(self, module: Any, split: Split | None) -> Tensor:
            raise Unsupported("unreadable")

        def part_grams(self, module: Any, split: Split | None) -> list[Tensor | None]:
            raise AssertionError

    broken, zero = nn.Linear(3, 2), nn.Linear(3, 2)
    broken.weight.data[0, 0] = math.inf
    nn.init.zeros_(zero.weight)
    layers = [made(module, Chunked(), 3, 2) for module in (broken, zero)]
    assert baselines_of([made(nn.Linear(3, 2), Unreadable(), 3, 2), *layers]) == pytest.approx(
        [math.nan, math.inf, 0.0], nan_ok=True
    )


@pytest.mark.parametrize("shape", [(3, 4, 50), (3, 50, 4), (1, 1, 1), (5, 20, 20)])
def test_gram_matrices_in_small_chunks(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    stack = torch.randn(shape)
    short = stack.double() if shape[1] <= shape[2] else stack.double().mT
    expected = short @ short.mT
    for elements in (1, 30, 200, 10**6):
        monkeypatch.setattr(gram_module, "_CHUNK_ELEMENTS", elements)
        torch.testing.assert_close(grams(stack), expected, rtol=1e-12, atol=1e-12)
