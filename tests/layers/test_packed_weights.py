"""Packed weights: parts of one output, with token steps, half precision, probes, the published script, and PEFT."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from plop_ext import Scores, score
from plop_ext.collecting.collector import Collector
from plop_ext.collecting.rows import part_sumsq
from plop_ext.layers import Split, discover
from tests.support.architecture_parts import text_batch
from tests.support.architectures import ARCHITECTURES
from tests.support.layer_oracle import oracle
from tests.support.quiet import nfn, quietly

PACKED = ["phi3", "gpt2", "gpt_neox", "falcon_new", "bloom", "codegen"]


def scores_of(name: str, **settings: Any) -> Scores:
    return quietly(ARCHITECTURES[name].build(), [text_batch()], **settings)


@pytest.mark.parametrize(
    "split, columns, expected",
    [
        (Split(("a", "b"), (3, 2)), 5, {"a": [0, 1, 2], "b": [3, 4]}),
        (Split(("a", "b"), (1, 1)), 6, {"a": [0, 2, 4], "b": [1, 3, 5]}),
        (Split(("a", "b", "c"), (2, 1, 1)), 8, {"a": [0, 1, 4, 5], "b": [2, 6], "c": [3, 7]}),
    ],
)
def test_split_selects_columns(split: Split, columns: int, expected: dict[str, list[int]]) -> None:
    assert split.fits(columns) and not split.fits(columns + 1)
    row = torch.arange(columns)
    for index, name in enumerate(split.names):
        assert split.select(row, index).flatten().tolist() == expected[name]
        assert split.features(columns, index) == len(expected[name])
        assert split.select(row, index).untyped_storage().data_ptr() == row.untyped_storage().data_ptr()


@pytest.mark.parametrize("sizes", [(6, 4, 2), (3, 2, 1), (1, 1), (2, 1)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("step, phase", [(1, 0), (3, 2)])
def test_part_sums_of_every_layout(
    device: torch.device, sizes: tuple[int, ...], biased: bool, step: int, phase: int
) -> None:
    y, bias = torch.randn(2, 7, 12, device=device), torch.randn(12, device=device) if biased else None
    split = Split(tuple("abc")[: len(sizes)], sizes)
    centred = y if bias is None else y - bias
    whole = torch.zeros(14, device=device)
    for part in range(len(sizes)):
        start = sum(sizes[:part])
        columns = [c for c in range(12) if start <= c % sum(sizes) < start + sizes[part]]
        expected = centred[..., columns].square().sum(-1).reshape(-1)
        out = torch.full((len(expected[phase::step]),), -1.0, device=device)
        part_sumsq(out, y, bias, split, part, step, phase)
        torch.testing.assert_close(out, expected[phase::step])
        whole += expected
    torch.testing.assert_close(whole, centred.square().sum(-1).reshape(-1))


@pytest.mark.parametrize("name", PACKED)
def test_parts_in_every_third_row_add_up(name: str) -> None:
    model, batch = ARCHITECTURES[name].build(), text_batch()
    layers = discover(model).layers
    totals = []
    for step in (1, 3):
        with Collector(model, layers) as collector, torch.no_grad():
            for phase in range(step):
                collector.begin(3, batch["attention_mask"], step=step, phase=phase)
                model(**batch)
                collector.end()
        totals.append(collector.recording.queue.all().view(len(layers), step, 3, 5).sum(dim=1))
    torch.testing.assert_close(totals[0], totals[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["phi3", "gpt_neox"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_parts_in_other_types(name: str, dtype: torch.dtype) -> None:
    case = ARCHITECTURES[name]
    model = case.build().to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = score(model, [text_batch()], progress=False)
    # In bfloat16 the output was rounded to three digits by the model; the mean of 58 gains is better than one of them.
    tolerance = 5e-3 if dtype == torch.bfloat16 else 1e-9
    assert nfn(scores) == pytest.approx(oracle(model, text_batch(), scores, packed=case.packed), rel=tolerance)


@pytest.mark.parametrize("name", ["phi3", "gpt2", "gpt_neox", "bloom"])
def test_probed_parts_are_near_the_frobenius_baseline(name: str) -> None:
    exact, probed = scores_of(name), scores_of(name, baseline="probe", probes=4000)
    assert probed.module_names == exact.module_names
    assert probed.baseline == pytest.approx(
        exact.baseline, rel=0.03
    )  # E||W u|| is up to a few percent below for M = 8


@pytest.mark.parametrize("name", ["phi3", "gpt_neox", "gpt2"])
def test_the_squares_of_parts_add_up_to_the_whole(name: str) -> None:
    scores = scores_of(name)
    norms = {module.name: module.weight_norm for module in scores.modules}
    for owner, module in ARCHITECTURES[name].build().named_modules():
        parts = [norm for entry, norm in norms.items() if entry.rpartition(".")[0] == owner and norm is not None]
        if parts and owner.rsplit(".", 1)[-1] in ARCHITECTURES[name].packed:
            assert sum(norm**2 for norm in parts) == pytest.approx(float(module.weight.square().sum()), rel=1e-5)


def test_parts_are_named_typed_and_picked() -> None:
    scores = scores_of("phi3")
    assert scores.module_names[:4] == (
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.self_attn.qkv_proj.q",
        "model.layers.0.self_attn.qkv_proj.k",
        "model.layers.0.self_attn.qkv_proj.v",
    )
    families = {item.type: item.family for item in scores.by_type()}
    assert families == {
        "qkv_proj.q": "attention",
        "qkv_proj.k": "attention",
        "qkv_proj.v": "attention",
        "o_proj": "attention",
        "gate_up_proj.gate": "mlp",
        "gate_up_proj.up": "mlp",
        "down_proj": "mlp",
    }
    assert scores_of("phi3", include=["qkv_proj.q", "down_proj"]).types.__len__() == 2
    rest = scores_of("phi3", exclude=["qkv_proj"])
    assert set(rest.types) == {"o_proj", "gate_up_proj.gate", "gate_up_proj.up", "down_proj"}
    reasons = {item.name: item.reason for item in scores_of("phi3", exclude=["qkv_proj.k"]).unscored}
    assert reasons["model.layers.0.self_attn.qkv_proj.k"] == "excluded"
    assert nfn(scores_of("phi3", include=["qkv_proj.v"])) == pytest.approx(
        {name: value for name, value in nfn(scores).items() if name.endswith(".v")}
    )


def test_a_part_is_emitted_as_its_module_with_a_note() -> None:
    from peft import get_peft_model

    scores = scores_of("phi3")
    placement = scores.place(types=["qkv_proj.q", "down_proj"])
    assert placement.types == tuple(t for t in scores.types if t in ("qkv_proj.q", "down_proj"))
    assert "model.layers.0.self_attn.qkv_proj.q" in placement.modules
    assert set(placement.targets()["target_modules"]) == {
        f"model.layers.{i}.{leaf}" for i in range(2) for leaf in ("self_attn.qkv_proj", "mlp.down_proj")
    }
    (note,) = placement.notes
    assert note == (
        "PEFT adapts whole weights: `model.layers.0.self_attn.qkv_proj`, `model.layers.1.self_attn.qkv_proj` "
        "also hold 4 scored parts that were not chosen"
    )
    with pytest.warns(UserWarning, match="PEFT adapts whole weights"):
        adapted = get_peft_model(ARCHITECTURES["phi3"].build(), placement.lora_config(r=3))
    placement.verify(adapted)
    trainable = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    assert trainable == placement.num_parameters(3) == 3 * 2 * ((32 + 64) + (48 + 32))
    assert scores.place(types=["qkv_proj.q", "qkv_proj.k", "qkv_proj.v"]).notes == ()


def test_the_published_script_sees_the_whole_weight() -> None:
    scores = scores_of("phi3", compat="paper-script")
    assert "model.layers.0.self_attn.qkv_proj" in scores.module_names
    assert not any(name.endswith((".q", ".gate")) for name in scores.module_names)


def test_the_published_script_sees_no_experts() -> None:
    scores = scores_of("qwen3_moe", compat="paper-script")
    assert {module.kind for module in scores.modules} == {"linear"}
    assert set(scores.types) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    reasons = {item.name: item.reason for item in scores.unscored}
    assert reasons["model.layers.0.mlp.experts"] == "the published script reads nn.Linear only"


def test_an_unknown_fused_weight_is_scored_as_one_matrix() -> None:
    model = ARCHITECTURES["phi3"].build()
    model.config.model_type = "phi99"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = score(model, [text_batch()], progress=False)
    assert set(scores.types) == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


@pytest.mark.gpu
@pytest.mark.parametrize("name", PACKED)
def test_on_cuda_as_on_the_cpu(name: str) -> None:
    case = ARCHITECTURES[name]
    scores = score(case.build().double().cuda(), [text_batch()], progress=False)
    # transformers computes rotary embeddings, norms and softmax in float32 for every type of model.
    assert nfn(scores) == pytest.approx(nfn(score(case.build().double(), [text_batch()], progress=False)), rel=1e-6)
