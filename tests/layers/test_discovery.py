"""Which layers are found, what their types are called, and what is said about the rest."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import plop_ext
from plop_ext import InputError
from plop_ext.layers import LayerAdapter, Unsupported, adapter_for, discover, register_adapter
from plop_ext.layers import adapter as registry
from plop_ext.layers.routers import ROUTER
from plop_ext.module_types import family, label_types, module_path, suffixes
from plop_ext.scoring.baseline import frobenius_norms
from tests.support import tiny_models
from tests.support.tiny_models import Plain

LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
TYPES = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "gemma3": LLAMA,
    "opt": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    "bert": {"query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"},
}


@pytest.mark.parametrize("name", TYPES)
def test_types_and_blocks_of_text_models(name: str) -> None:
    model = tiny_models.TEXT_MODELS[name]()
    found = discover(model)
    assert {layer.type for layer in found.layers} == TYPES[name]
    assert [layer.layer for layer in found.layers] == [0] * len(TYPES[name]) + [1] * len(TYPES[name])
    modules = dict(model.named_modules())
    for layer in found.layers:
        assert modules[layer.name] is layer.module and layer.name.endswith("." + layer.type)
        assert (layer.out_features, layer.in_features) == tuple(layer.module.weight.shape)
    assert not [item for item in found.unscored if item.wanted]


def test_heads_are_left_out_and_named() -> None:
    assert [(item.name, item.reason) for item in discover(tiny_models.llama()).unscored] == [
        ("lm_head", "outside the repeated blocks")
    ]
    assert {item.name for item in discover(tiny_models.bert()).unscored} == {"bert.pooler.dense", "classifier"}
    everything = discover(tiny_models.bert(), everything=True)
    assert {"bert.pooler.dense", "classifier"} <= {layer.name for layer in everything.layers}
    assert not everything.unscored


def test_a_model_without_blocks_gives_all_its_layers() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    assert [(layer.name, layer.type, layer.layer) for layer in discover(model).layers] == [
        ("0", "0", None),
        ("2", "2", None),
    ]
    assert [(layer.name, layer.type) for layer in discover(nn.Linear(4, 5)).layers] == [("", "")]


def test_include_and_exclude_are_suffixes_at_a_dot() -> None:
    model = tiny_models.bert()
    names = [layer.name for layer in discover(model, include=["output.dense"]).layers]
    assert len(names) == 4 and all(name.endswith("output.dense") for name in names)
    assert [layer.name for layer in discover(model, include=["classifier"]).layers] == ["classifier"]
    kept = discover(model, exclude=["query", "layer.0.output.dense"])
    assert len(kept.layers) == 12 - 3
    assert {item.name for item in kept.unscored if item.reason == "excluded"} == {
        "bert.encoder.layer.0.attention.self.query",
        "bert.encoder.layer.1.attention.self.query",
        "bert.encoder.layer.0.output.dense",
    }
    both = discover(model, include=["dense"], exclude=["attention.output.dense"])
    assert {layer.type for layer in both.layers} == {"pooler.dense", "intermediate.dense", "output.dense"}
    assert suffixes("self.my_query") == ["my_query", "self.my_query"] and suffixes("query") == ["query"]


def test_a_pattern_that_matches_nothing() -> None:
    for settings in ({"include": ["q_proj", "nope"]}, {"exclude": ["nope"]}, {"include": ["roj"]}):
        with pytest.raises(InputError, match="in `include`/`exclude` matches no linear layer; there are "):
            discover(tiny_models.llama(), **settings)


class Holder(nn.Module):
    """Linear layers around something else."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(4, 4), "other": other})])


class Packed(nn.Module):
    """A layer whose matrix is a buffer of codes, and whose sizes go by another name than torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.infeatures, self.outfeatures = 8, 4
        self.register_buffer("qweight", torch.zeros(1, 4, dtype=torch.int32))


class PackedWithChild(nn.Module):
    """The same in a module that holds another."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 8, 4
        self.activation = nn.ReLU()
        self.register_buffer("qweight", torch.zeros(1, 4, dtype=torch.int32))


class EmbeddingProjection(nn.Module):
    """A matrix product that is an embedding by name only."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(4, 4))


@pytest.mark.parametrize(
    "module, reason",
    [
        (Packed(), r"no adapter reads its class \(qweight\)"),
        (PackedWithChild(), r"no adapter reads its class \(qweight\)"),
        (EmbeddingProjection(), r"no adapter reads its class \(matrix\)"),
        (nn.Bilinear(3, 4, 5), r"no adapter reads its class \(weight\)"),
        (nn.MultiheadAttention(8, 2), r"no adapter reads its class \(in_proj_weight\)"),
        (nn.Linear(4, 3, device="meta"), r"its weight is on the meta device and was never loaded"),
    ],
    ids=["buffer", "buffer and child", "embedding by name", "Bilinear", "MultiheadAttention", "meta"],
)
def test_what_cannot_be_scored_is_named_with_its_reason(module: nn.Module, reason: str) -> None:
    import re

    found = discover(Holder(module))
    item = next(item for item in found.unscored if item.name == "layers.0.other")
    assert re.match(reason, item.reason) and item.wanted and item.layer_class == type(module).__name__
    assert "layers.0.up" in {layer.name for layer in found.layers}


def test_a_quantized_weight_is_not_taken_for_its_codes() -> None:
    class Coded(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.float().T / 8 + self.bias

    coded = Coded(4, 4)
    codes = torch.randint(-9, 9, (4, 4))
    coded.weight = nn.Parameter(codes.to(torch.int8), requires_grad=False)
    layer = next(layer for layer in discover(Holder(coded)).layers if layer.name == "layers.0.other")
    assert frobenius_norms([layer]).values == pytest.approx([float(codes.double().norm()) / 8], rel=1e-5)


@pytest.mark.parametrize(
    "name, out_features, config, reason",
    [
        ("shared_gate", 1, None, ""),
        ("gate", 1, {"num_experts": 4}, ""),
        ("anything", 2, None, ""),
        ("gate", 4, {"num_experts": 4}, ROUTER),
        ("router", 4, {"n_routed_experts": 8}, ROUTER),
        ("gate", 5, {"num_local_experts": 4}, ""),
        ("gate", 4, None, ""),
        ("gate_proj", 4, {"num_experts": 4}, ""),
    ],
)
def test_a_linear_router_is_not_scored(
    name: str, out_features: int, config: dict[str, int] | None, reason: str
) -> None:
    model = Holder(nn.Identity())
    model.layers[0][name] = nn.Linear(4, out_features)
    model.layers[0]["up"] = nn.Linear(4, 8)
    model.config = SimpleNamespace(**config) if config else None
    found = discover(model)
    assert (f"layers.0.{name}" in {layer.name for layer in found.layers}) == (not reason)
    assert [(item.name, item.reason, item.wanted) for item in found.unscored] == (
        [(f"layers.0.{name}", reason, False)] if reason else []
    )
    everything = discover(model, everything=True)
    assert f"layers.0.{name}" in {layer.name for layer in everything.layers}


def test_a_single_output_outside_the_blocks_is_a_head() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
    assert [(layer.name, layer.no_place) for layer in discover(model).layers] == [("0", ""), ("1", "")]
    router = nn.ModuleDict({"router": nn.ModuleDict({"classifier": nn.Linear(4, 4)})})
    model = Holder(router)
    model.config = SimpleNamespace(num_experts=4)
    assert [(item.name, item.reason) for item in discover(model).unscored] == [
        ("layers.0.other.router.classifier", ROUTER)
    ]


def test_weights_that_are_no_linear_map_are_not_mentioned() -> None:
    masked = nn.Module()
    masked.register_buffer("mask", torch.ones(4, 4))
    quiet = nn.ModuleList([nn.Embedding(4, 4), nn.LayerNorm((2, 4)), nn.BatchNorm1d(4), nn.GroupNorm(2, 4), masked])
    assert not discover(Holder(quiet)).unscored


def test_a_shared_module_is_one_layer_and_tied_weights_are_two() -> None:
    model = Plain(depth=3)
    model.layers[2] = model.layers[0]
    assert [layer.name for layer in discover(model).layers if layer.type == "up"] == ["layers.0.up", "layers.1.up"]
    scores = plop_ext.score(model, [torch.randn(2, 20, 16)], progress=False)
    assert scores.totals.tokens[:, 0].tolist() == [40, 40, 20, 20]
    tied = Plain()
    tied.layers[1].up.weight = tied.layers[0].up.weight
    assert [layer.name for layer in discover(tied).layers if layer.type == "up"] == ["layers.0.up", "layers.1.up"]


def test_a_new_kind_of_layer_is_one_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(16, 16))

        def forward(self, x: Tensor) -> tuple[Tensor, str]:
            return x @ self.w, "extra"

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Transposed()])

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[0](x)[0]

    monkeypatch.setattr(registry, "_ADAPTERS", list(registry._ADAPTERS))

    @register_adapter
    class TransposedAdapter(LayerAdapter):
        def matches(self, module: nn.Module) -> bool:
            return isinstance(module, Transposed)

        def check(self, module: nn.Module) -> None:
            if module.w.shape[0] != 16:
                raise Unsupported("too small")

        def features(self, module: nn.Module) -> tuple[int, int]:
            in_features, out_features = module.w.shape
            return in_features, out_features

        def weight_rows(self, module: nn.Module) -> Tensor:
            return module.w.T

        def output(self, module: nn.Module, output: Any) -> Tensor:
            return output[0]

    adapter = adapter_for(Transposed())
    assert isinstance(adapter, TransposedAdapter)
    assert adapter.features(Transposed()) == (16, 16)
    model, x = Model(), torch.randn(2, 40, 16)
    scores = plop_ext.score(model, [x], progress=False)
    from plop_ext import reference

    expected = reference.token_gains(model.layers[0].w.T, x).mean()
    assert scores.gain[0] == pytest.approx(float(expected), rel=1e-5)


def test_paths_and_labels() -> None:
    model = tiny_models.t5()
    lists = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    paths = [module_path(name, lists) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    labels = dict(zip([path.name for path in paths], label_types(paths), strict=True))
    assert labels["encoder.block.0.layer.0.SelfAttention.q"] != labels["decoder.block.0.layer.0.SelfAttention.q"]
    assert labels["decoder.block.0.layer.1.EncDecAttention.q"] == labels["decoder.block.1.layer.1.EncDecAttention.q"]
    assert labels["decoder.block.0.layer.1.EncDecAttention.q"] == "EncDecAttention.q"
    for first in paths:
        for second in paths:
            assert (labels[first.name] == labels[second.name]) == (first.type_path == second.type_path)


@pytest.mark.parametrize(
    "label, name, expected",
    [
        ("q_proj", "model.layers.0.self_attn.q_proj", "attention"),
        ("query", "bert.encoder.layer.0.attention.self.query", "attention"),
        ("attention.output.dense", "bert.encoder.layer.0.attention.output.dense", "attention"),
        ("output.dense", "bert.encoder.layer.0.output.dense", "mlp"),
        ("intermediate.dense", "bert.encoder.layer.0.intermediate.dense", "mlp"),
        ("down_proj", "model.layers.0.mlp.down_proj", "mlp"),
        ("fc1", "model.decoder.layers.0.fc1", "mlp"),
        ("out_proj", "model.decoder.layers.0.self_attn.out_proj", "attention"),
        ("up", "layers.0.up", "other"),
        ("lm_head", "lm_head", "other"),
    ],
)
def test_family(label: str, name: str, expected: str) -> None:
    assert family(label, name) == expected
