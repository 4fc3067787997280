"""Modules whose forward is not that of their kind: scored right, or reported by name, against a float64 oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from plop_ext import reference
from plop_ext.layers import ProductAdapter, adapter_for, discover
from plop_ext.layers.linear import LinearAdapter
from plop_ext.layers.own_forward import ResponseAdapter
from tests.support.model_state import assert_unchanged, state
from tests.support.quiet import nfn, quietly

K, M, G = 16, 24, 4


class Named(nn.Linear):
    """Calls what it inherits."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Transposing(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias


class Standardized(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, standardized(self.weight), self.bias)


class AddingInPlace(Standardized):
    def forward(self, x: Tensor) -> Tensor:
        y = functional.linear(x, standardized(self.weight))
        y += 3 * torch.ones_like(y) if self.bias is None else self.bias
        return y


class Normalized(nn.Linear):
    """As of a head that normalizes its rows."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, functional.normalize(self.weight), self.bias)


class ScaledOutput(nn.Linear):
    def __init__(self, *sizes: int, **settings: Any) -> None:
        super().__init__(*sizes, **settings)
        self.scale = nn.Parameter(torch.linspace(0.1, 3, self.out_features))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class ScaledInput(nn.Linear):
    def __init__(self, *sizes: int, **settings: Any) -> None:
        super().__init__(*sizes, **settings)
        self.register_buffer("scale", torch.linspace(0.1, 3, self.in_features))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.scale)


class Elementwise(nn.Linear):
    """Multiplies without a matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        y = (x.unsqueeze(-2) * self.weight).sum(-1)
        return y if self.bias is None else y + self.bias


class Clipping(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-1, 1))


class ReturningATuple(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return super().forward(x), None


class Wider(nn.Linear):
    """As of Idefics: rows of another weight follow."""

    def __init__(self, *sizes: int, **settings: Any) -> None:
        super().__init__(*sizes, **settings)
        self.more = nn.Linear(self.in_features, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((super().forward(x), self.more(x)), -1)


class Activated(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


class Centred(nn.Linear):
    """Reads the other rows of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.flatten(0, -2).mean(0))


class CentredAndScaled(Centred):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Routed(nn.Linear):
    """Takes more than an input."""

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return super().forward(x)


class RoutedAndScaled(nn.Linear):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return super().forward(x) * scale


class Blocks(nn.Linear):
    """Block-diagonal: [..., G, K] to [..., G, M / G]."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...gk,gmk->...gm", x, self.weight.view(G, -1, self.in_features))


class NotALinear(nn.Module):
    """As of I-BERT: the attributes of `nn.Linear`, and a tuple."""

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.randn(out_features)) if bias else None

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return functional.linear(x, self.weight, self.bias), None


def standardized(weight: Tensor) -> Tensor:
    flat = weight.flatten(1)
    flat = (flat - flat.mean(1, keepdim=True)) / (flat.std(1, keepdim=True) + 1e-6)
    return flat.view_as(weight)


def diagonal(weight: Tensor) -> Tensor:
    return torch.block_diag(*weight.view(G, -1, weight.shape[1]))


class Model(nn.Module):
    """Two blocks, each with one layer; `call` runs a layer on x."""

    def __init__(self, layers: list[Any], call: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self._call = call

    def forward(self, x: Tensor) -> None:
        for layer in self.layers:
            self._call(layer, x)


def call(layer: Any, x: Tensor) -> Any:
    return layer(x)


def oracle(weight: Tensor, z: Tensor, probes: int = 0) -> float:
    """NFN by its definition, with the baseline by the norm or by probes; rows of zeros do not count."""
    w, z = weight.detach().double(), z.detach().double().reshape(-1, weight.shape[1])
    u = torch.randn(probes, w.shape[1], dtype=torch.float64)
    baseline = gains(w, u).mean() if probes else reference.frobenius_baseline(w)
    return float(gains(w, z[z.norm(dim=1) > 0]).mean() / baseline)


def gains(w: Tensor, z: Tensor) -> Tensor:
    return (z @ w.T).norm(dim=1) / z.norm(dim=1)


def one(layer: Any) -> Tensor:
    """The weight as it is."""
    return layer.weight


# Class, the matrix that it applies to its input, and whether PEFT can adapt it.
LINEARS: dict[str, tuple[type[nn.Module], Callable[[Any], Tensor], bool]] = {
    "calls its parent": (Named, one, True),
    "x @ W.T": (Transposing, one, True),
    "standardized": (Standardized, lambda layer: standardized(layer.weight), True),
    "bias added in place": (AddingInPlace, lambda layer: standardized(layer.weight), True),
    "normalized": (Normalized, lambda layer: functional.normalize(layer.weight), True),
    "scaled output": (ScaledOutput, lambda layer: layer.weight * layer.scale[:, None], True),
    "scaled input": (ScaledInput, lambda layer: layer.weight * layer.scale, True),
    "no matrix product": (Elementwise, one, True),
    "a tuple": (ReturningATuple, one, False),
    "not a Linear": (NotALinear, one, False),
}


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("case", LINEARS)
@pytest.mark.parametrize("settings", [{}, {"baseline": "probe", "probes": 4096}], ids=["frobenius", "probe"])
def test_a_linear_layer_is_scored_by_the_matrix_that_it_applies(case: str, bias: bool, settings: Any) -> None:
    kind, matrix, adapts = LINEARS[case]
    model, x = Model([kind(K, M, bias=bias) for _ in range(2)], call), torch.randn(3, 40, K) + 0.5
    before = state(model)
    scores = quietly(model, [x], **settings)
    assert_unchanged(before, model)

    rtol = 0.02 if settings else 1e-5  # the error of the probes
    probes = settings.get("probes", 0)
    expected = {f"layers.{i}": oracle(matrix(layer), x, probes) for i, layer in enumerate(model.layers)}
    assert nfn(scores) == pytest.approx(expected, rel=rtol)
    assert all(bool(item.target.refused) != adapts for item in scores.modules)
    if adapts:
        _train_once(model, scores, x)


def _train_once(model: nn.Module, scores: Any, x: Tensor) -> None:
    placed = scores.place(strategy="all")
    adapted = peft.get_peft_model(model, placed.lora_config(r=2))
    placed.verify(adapted)
    outputs = [layer(x) for layer in adapted.base_model.model.layers]
    sum(output.square().sum() for output in outputs).backward()


def test_block_diagonal_weights_are_scored_as_one_matrix_and_not_placed() -> None:
    model = Model([Blocks(K, M, bias=False) for _ in range(2)], call)
    x = torch.randn(3, 40, G, K)
    mask = torch.ones(3, 40, dtype=torch.long)
    mask[1, 25:] = 0
    data = {"x": x, "attention_mask": mask}
    scores = quietly(model, [data], forward=lambda model, batch: model(batch["x"]))
    kept = x.flatten(2)[mask.bool()]
    expected = {f"layers.{i}": oracle(diagonal(layer.weight), kept) for i, layer in enumerate(model.layers)}
    assert nfn(scores) == pytest.approx(expected, rel=1e-5)
    assert scores.totals.tokens.sum(axis=0).tolist() == [80, 50, 80]
    assert {(item.in_features, item.out_features) for item in scores.modules} == {(G * K, M)}
    placement = scores.place(strategy="all")
    assert not placement.lora_targets
    assert "PEFT cannot adapt a block-diagonal weight" in placement.notes[0]
    probed = quietly(model, [data], forward=lambda model, batch: model(batch["x"]), baseline="probe", probes=4096)
    assert nfn(probed) == pytest.approx(expected, rel=0.02)


def test_transposed_layers_with_a_forward_of_their_own() -> None:
    from transformers.pytorch_utils import Conv1D

    class Standard(Conv1D):
        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x.view(-1, K), standardized(self.weight)).view(*x.shape[:-1], M)

    class Scaled(Conv1D):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.linspace(0.1, 3, M)

    model, x = Model([Standard(M, K), Scaled(M, K)], call), torch.randn(3, 40, K)
    nn.init.normal_(model.layers[1].bias)
    scale = torch.linspace(0.1, 3, M)
    expected = {
        "layers.0": oracle(standardized(model.layers[0].weight).T, x),
        "layers.1": oracle((model.layers[1].weight * scale).T, x),
    }
    assert nfn(quietly(model, [x])) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "kind, changed",
    [(Clipping, lambda x: x.clamp(-1, 1)), (Centred, lambda x: x - x.mean((0, 1)))],
    ids=["clipped", "centred"],
)
def test_a_changed_input_is_scored_as_it_reaches_the_matrix(kind: Any, changed: Callable[[Tensor], Tensor]) -> None:
    model, x = Model([kind(K, M) for _ in range(2)], call), 2 * torch.randn(3, 40, K) + 0.5
    expected = {f"layers.{i}": oracle(layer.weight, changed(x)) for i, layer in enumerate(model.layers)}
    assert nfn(quietly(model, [x])) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "kind, scored",
    [(Activated, ()), (Wider, ("layers.0.more",)), (CentredAndScaled, ())],
    ids=["activated", "wider", "centred and scaled"],
)
def test_a_forward_that_returns_no_product_is_reported_by_name(kind: Any, scored: tuple[str, ...]) -> None:
    model = Model([kind(K, M), nn.Linear(K, M)], call)
    scores = quietly(model, [torch.randn(3, 40, K)])
    assert scores.module_names == (*scored, "layers.1")
    (reported,) = scores.unscored
    assert reported.name == "layers.0" and reported.wanted
    assert reported.reason == "its own forward is not a product with its weight"


def test_a_forward_that_takes_more_is_compared_on_the_first_batch() -> None:
    model = Model([Routed(K, M), RoutedAndScaled(K, M)], lambda layer, x: layer(x, 1 + torch.arange(M)))
    x = torch.randn(3, 40, K)
    scores = quietly(model, [x, x])
    assert nfn(scores) == pytest.approx({"layers.0": oracle(model.layers[0].weight, x)}, rel=1e-5)
    assert [item.name for item in scores.unscored] == ["layers.1"]


def test_which_adapter_reads_what() -> None:
    assert type(adapter_for(nn.Linear(K, M))) is LinearAdapter
    assert type(adapter_for(Named(K, M))) is LinearAdapter
    assert type(adapter_for(Standardized(K, M))) is ProductAdapter
    assert type(adapter_for(ScaledInput(K, M))) is ResponseAdapter
    patched = nn.Linear(K, M)
    patched.forward = lambda x: 2 * functional.linear(x, patched.weight.cumsum(0))  # type: ignore[method-assign]
    assert type(adapter_for(patched)) is ResponseAdapter


class WeightStandardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = standardized(self.weight)
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Causal(nn.Conv1d):
    """Pads on the left alone, and returns a tuple."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return super().forward(functional.pad(x, ((self.kernel_size[0] - 1) * self.dilation[0], 0))), None


class SamePadding(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(functional.pad(x, (1, 1, 1, 1)), weight, bias)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_convolutions_with_a_forward_of_their_own(bias: bool, groups: int) -> None:
    x = torch.randn(3, 4, 9, 8)
    conv = WeightStandardized(4, 6, 3, stride=2, padding=1, bias=bias, groups=groups)
    same = SamePadding(4, 6, 3, bias=bias, groups=groups)
    scores = quietly(Model([conv, same], call), [x])
    patches = functional.unfold(x.double(), 3, padding=1, stride=2).transpose(1, 2)
    expected = {
        "layers.0": oracle(_dense(standardized(conv.weight), groups), patches),
        "layers.1": oracle(_dense(same.weight, groups), functional.unfold(x.double(), 3, padding=1).transpose(1, 2)),
    }
    assert nfn(scores) == pytest.approx(expected, rel=1e-5)
    assert all(item.target.refused for item in scores.modules)  # PEFT makes LoRA by the class


def test_a_causal_convolution_has_one_row_per_token() -> None:
    x = torch.randn(2, 4, 12)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 5:] = 0
    model = Model([Causal(4, 6, 3), Causal(4, 6, 3, dilation=2)], call)
    data = {"x": x, "attention_mask": mask}
    scores = quietly(model, [data], forward=lambda model, batch: model(batch["x"]))
    for index, (name, value) in enumerate(nfn(scores).items()):
        conv = model.layers[index]
        span = 2 * conv.dilation[0]
        padded = functional.pad(x.double(), (span, 0))
        taps = [padded[..., start : start + 12] for start in range(0, span + 1, conv.dilation[0])]
        z = torch.stack(taps, dim=2).flatten(1, 2).transpose(1, 2)
        assert value == pytest.approx(oracle(conv.weight.flatten(1), z[mask.bool()]), rel=1e-5), name
        assert "returns a tuple" in scores.modules[index].target.refused
    assert scores.totals.tokens.sum(axis=0).tolist() == [24, 10]


def _dense(weight: Tensor, groups: int) -> Tensor:
    return torch.block_diag(*weight.flatten(1).chunk(groups))


def test_bits_weight_standardized_convolutions() -> None:
    from transformers import BitConfig, BitModel

    torch.manual_seed(0)
    model = BitModel(BitConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[2, 1], num_groups=4)).eval()
    images = torch.randn(2, 3, 64, 64)
    inputs: dict[str, Tensor] = {}
    convolutions = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    for name, module in convolutions.items():
        module.register_forward_pre_hook(
            lambda module, args, name=name: inputs.update({name: padded(module, args[0])})
        )
    scores = quietly(model, [{"pixel_values": images}])
    assert len(scores.modules) >= 6
    for name, value in nfn(scores).items():
        conv = convolutions[name]
        patches = functional.unfold(inputs[name], conv.kernel_size, stride=conv.stride).transpose(1, 2)
        flat = conv.weight.detach().double().flatten(1)
        flat = (flat - flat.mean(1, keepdim=True)) / (flat.var(1, unbiased=False, keepdim=True) + conv.eps).sqrt()
        assert value == pytest.approx(oracle(flat, patches), rel=1e-5), name


def padded(conv: Any, x: Tensor) -> Tensor:
    x = x.double() if conv.pad is None else conv.pad(x).double()
    return functional.pad(x, [side for size in reversed(conv.padding) for side in (size, size)])


def test_spectral_and_weight_norm_leave_a_training_model_as_it_is() -> None:
    model, x = Model([nn.Linear(K, M), nn.Linear(K, M)], call).train(), torch.randn(3, 40, K)
    nn.utils.parametrizations.spectral_norm(model.layers[0])
    nn.utils.parametrizations.weight_norm(model.layers[1])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    scores = quietly(model, [x])
    assert model.training and all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.eval()
    expected = {f"layers.{i}": oracle(layer.weight, x) for i, layer in enumerate(model.layers)}
    assert nfn(scores) == pytest.approx(expected, rel=1e-5)


def test_a_weight_that_a_hook_computes_is_not_that_of_the_last_forward() -> None:
    model, x = Model([nn.Linear(K, M), nn.Linear(K, M)], call), torch.randn(3, 40, K)
    nn.utils.weight_norm(model.layers[0])
    nn.utils.spectral_norm(model.layers[1])
    with torch.no_grad():
        model.layers[0].weight_g.copy_(torch.linspace(0.1, 5, M)[:, None])
        model.layers[1].weight_orig.copy_(torch.randn(M, K).cumsum(0))
    scores = quietly(model, [x])
    model.eval()(x)
    expected = {f"layers.{i}": oracle(layer.weight, x) for i, layer in enumerate(model.layers)}
    assert nfn(scores) == pytest.approx(expected, rel=1e-5)


def test_quantization_aware_training_is_tried_without_a_trace() -> None:
    from torch.ao.nn.qat import Linear
    from torch.ao.quantization import get_default_qat_qconfig

    layer = Linear(K, M, qconfig=get_default_qat_qconfig("fbgemm"))
    before = state(layer)
    assert isinstance(adapter_for(layer), ProductAdapter)
    assert_unchanged(before, layer)
    model, x = Model([layer], call), torch.randn(3, 40, K)
    value = nfn(quietly(model, [x]))["layers.0"]
    assert value == pytest.approx(oracle(layer.weight_fake_quant(layer.weight), x), rel=1e-5)


def test_the_forward_is_unchanged_afterwards() -> None:
    model, x = Model([Standardized(K, M)], call), torch.randn(2, 20, K)
    found = discover(model)
    quietly(model, [x])
    assert "forward" not in vars(model.layers[0])
    assert [layer.name for layer in found.layers] == ["layers.0"]


def test_inference_mode_and_bfloat16() -> None:
    model, x = Model([Standardized(K, M, dtype=torch.bfloat16)], call), torch.randn(2, 20, K, dtype=torch.bfloat16)
    expected = oracle(standardized(model.layers[0].weight), x)
    assert nfn(quietly(model, [x]))["layers.0"] == pytest.approx(expected, rel=2e-3)  # outputs are rounded
    with torch.inference_mode():
        assert nfn(quietly(model, [x]))["layers.0"] == pytest.approx(expected, rel=2e-3)
