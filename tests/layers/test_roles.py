"""Types of one path and several roles: by the kind of layer, by class, and PEFT adapts the chosen ones only."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plop_ext import InputError, Scores, score
from plop_ext.layers import discover
from plop_ext.layers.roles import Traits, roles_of
from plop_ext.module_types import family, with_role, without_role
from tests.support.architecture_parts import TEXT, from_config, long_batch


def traits(path: str, owner: str, shape: tuple[int, int] = (8, 8), kind: str = "") -> Traits:
    return Traits(path, (owner,), shape, kind)


def test_one_class_and_one_shape_are_one_role() -> None:
    assert roles_of([traits("q", "A", kind="sliding"), traits("q", "A", kind="full"), traits("k", "B")]) == [""] * 3
    assert roles_of([]) == []


def test_classes_and_shapes_that_follow_the_kind_of_layer_are_named_after_it() -> None:
    by_class = [
        traits("q", "Delta", kind="linear"),
        traits("q", "Full", kind="full"),
        traits("k", "Full", kind="full"),
    ]
    assert roles_of(by_class) == ["linear", "full", ""]
    by_shape = [traits("q", "A", (8, 8), "sliding"), traits("q", "A", (8, 16), "full")]
    assert roles_of(by_shape) == ["sliding", "full"]
    # Two kinds that are alike are one role.
    alike = [traits("q", "A", kind="a"), traits("q", "B", kind="b"), traits("q", "A", kind="c")]
    assert roles_of(alike) == ["a+c", "b", "a+c"]


def test_classes_that_follow_no_kind_are_named_themselves() -> None:
    assert roles_of([traits("q", "A"), traits("q", "B"), traits("q", "A")]) == ["A", "B", "A"]
    mixed = [traits("q", "A", kind="x"), traits("q", "B", kind="x")]
    assert roles_of(mixed) == ["A", "B"]
    # The innermost class that differs.
    deep = [Traits("q", owners, (8, 8), "") for owners in (("A", "X", "Wrap"), ("A", "Y", "Wrap"), ("B", "Y", "Wrap"))]
    assert roles_of(deep) == ["X", "Y", "Y"]


def test_widths_alone_are_no_role() -> None:
    assert roles_of([traits("q", "A", (8, 8)), traits("q", "A", (16, 16))]) == ["", ""]
    assert roles_of([traits("q", "A", (8, 8), "x"), traits("q", "A", (16, 16), "x")]) == ["", ""]


def test_labels_carry_the_role_at_their_end() -> None:
    assert with_role("self_attn.q_proj", "full") == "self_attn.q_proj@full" and with_role("q", "") == "q"
    assert without_role("q_proj@full") == "q_proj" == without_role("q_proj")
    assert family("down_proj@MoE", "layers.0.x.down_proj") == "mlp"


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.o_proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(self.q_proj(x).tanh())


class LinearAttention(_Attention):
    """Another kind of attention under the same names."""


class FullAttention(_Attention):
    """The second kind under the same names."""


class _Layer(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.self_attn, self.up = attention, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(x + self.self_attn(x))


class Hybrid(nn.Module):
    """Three layers of linear to one of full attention."""

    def __init__(self, layer_types: list[str] | None) -> None:
        super().__init__()
        self.config = SimpleNamespace(layer_types=layer_types, model_type="hybrid")
        kinds = (LinearAttention, LinearAttention, FullAttention, LinearAttention)
        self.layers = nn.ModuleList([_Layer(kind()) for kind in kinds])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def scores_of(model: nn.Module) -> Any:
    return score(model, [torch.randn(8, 30, 8)], stop=None, progress=False)


@pytest.mark.parametrize(
    ("kinds", "labels"),
    [
        (["linear", "linear", "full", "linear"], ["linear", "full"]),
        (None, ["LinearAttention", "FullAttention"]),
        (["linear"], ["LinearAttention", "FullAttention"]),  # of another length than the model
    ],
)
def test_a_hybrid_has_a_type_for_each_role(kinds: list[str] | None, labels: list[str]) -> None:
    scores = scores_of(Hybrid(kinds))
    expected = {"up", *(f"{leaf}_proj@{label}" for leaf in "qo" for label in labels)}
    assert set(scores.types) == expected
    assert {item.type: item.modules for item in scores.by_type()}[f"q_proj@{labels[0]}"] == 3
    # A role alone needs no name.
    assert {layer.type for layer in discover(Hybrid(kinds), exclude="layers.2.self_attn.q_proj").layers} == (
        expected - {f"q_proj@{label}" for label in labels} | {"q_proj"}
    )


def test_peft_adapts_the_role_that_was_chosen() -> None:
    from peft import get_peft_model

    scores = scores_of(Hybrid(["linear", "linear", "full", "linear"]))
    placement = scores.place(types=["q_proj@linear", "up"])
    assert set(placement.types) == {"q_proj@linear", "up"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(Hybrid(None), placement.lora_config(r=2))
    placement.verify(adapted)
    names = {name.split(".lora_A")[0] for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert {name.removeprefix("base_model.model.") for name in names} == {
        *(f"layers.{i}.up" for i in range(4)),
        *(f"layers.{i}.self_attn.q_proj" for i in (0, 1, 3)),
    }


def test_a_name_without_role_stands_for_all_roles() -> None:
    scores = scores_of(Hybrid(["linear", "linear", "full", "linear"]))
    placement = scores.place(types="q_proj")
    assert set(placement.types) == {"q_proj@linear", "q_proj@full"} and len(placement.modules) == 4
    with pytest.raises(
        InputError, match=r"there is no type `q_proj@sparse`; there are o_proj@full, o_proj@linear, q_"
    ):
        scores.place(types=["q_proj@sparse"])


def test_merged_runs_keep_the_roles() -> None:
    model = Hybrid(["linear", "linear", "full", "linear"])
    parts = [score(model, [torch.randn(4, 30, 8)], stop=None, progress=False, data_name=name) for name in "ab"]
    merged = Scores.merge(parts)
    assert set(merged.types) == {"up", *(f"{leaf}_proj@{kind}" for leaf in "qo" for kind in ("linear", "full"))}
    whole = merged.nfn[[module.type == "q_proj@linear" for module in merged.modules]]
    assert {item.type: item.nfn for item in merged.by_type()}["q_proj@linear"] == pytest.approx(whole.mean())


def test_kimi_linear() -> None:
    """Linear and full attention under one name, forget gates, and experts."""
    from peft import get_peft_model

    build = from_config(
        "KimiLinearForCausalLM",
        "KimiLinearConfig",
        **{**TEXT, "num_key_value_heads": TEXT["num_attention_heads"]},
        layer_types=["linear_attention", "full_attention"],
        mlp_layer_types=["dense", "sparse"],
        moe_intermediate_size=24,
        num_local_experts=4,
        num_experts_per_tok=2,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        linear_head_dim=8,
        linear_num_heads=4,
    )
    model = build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = score(model, [long_batch()], stop=None, progress=False)
    leaves = ("q_proj", "o_proj")
    assert {f"{leaf}@{kind}_attention" for leaf in leaves for kind in ("linear", "full")} <= set(scores.types)
    assert {item.type for item in scores.no_place_by_type()} == {
        "b_proj",
        "f_a_proj",
        "f_b_proj",
        "g_a_proj",
        "g_b_proj",
    }
    placement = scores.place(types=["q_proj@linear_attention"])
    adapted = get_peft_model(model, placement.lora_config(r=2))
    placement.verify(adapted)
    assert placement.modules == ("model.layers.0.self_attn.q_proj",)
