"""Stacked experts: every implementation, the few-token rule, what PEFT adapts, and a restored model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import plop_ext
from benchmarks.overhead import count_waits
from plop_ext import InputError, Scores, score
from plop_ext.collecting.collector import Collector
from plop_ext.collecting.routed_experts import _weighted_sum
from plop_ext.layers import discover
from tests.support.architecture_parts import from_config, long_batch, text_batch
from tests.support.architectures import ARCHITECTURES
from tests.support.layer_oracle import expert_matrices, oracle
from tests.support.quiet import nfn, quietly

MOE = ["mixtral", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3"]
IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]


def nemotron_h() -> nn.Module:
    """Experts without a gate, in a hybrid of Mamba, attention and experts."""
    build = from_config(
        "NemotronHForCausalLM",
        "NemotronHConfig",
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        layers_block_type=["mamba", "moe", "attention", "moe"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        mamba_num_heads=8,
        mamba_head_dim=8,
        n_groups=2,
        ssm_state_size=8,
        chunk_size=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=24,
        n_group=1,
        topk_group=1,
    )
    return build()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_every_implementation_gives_the_same_scores(name: str, implementation: str) -> None:
    model, batch = ARCHITECTURES[name].build(), text_batch()
    model.set_experts_implementation(implementation)
    with torch.no_grad():
        before = model(**batch).logits
    scores = quietly(model, [batch])
    assert nfn(scores) == pytest.approx(oracle(model, batch, scores), rel=1e-4)
    assert scores.provenance["experts_implementation"] == implementation
    assert model.config._experts_implementation == implementation
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("name", MOE)
def test_the_observed_forward_gives_the_output_of_grouped_mm(name: str) -> None:
    model, batch = ARCHITECTURES[name].build(), text_batch()
    model.set_experts_implementation("grouped_mm")
    with torch.no_grad():
        expected = model(**batch).logits
        with Collector(model, discover(model).layers) as collector:
            collector.begin(len(batch["input_ids"]), batch["attention_mask"])
            # transformers' sort need not be stable: rows of one expert may be multiplied in another order.
            torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=2e-6)
            collector.end()


def test_experts_without_a_gate() -> None:
    model, batch = nemotron_h(), text_batch()
    scores = quietly(model, [batch])
    types = {module.type for module in scores.modules if module.kind == "stacked experts"}
    assert types == {"experts.up_proj", "experts.down_proj"}
    assert nfn(scores) == pytest.approx(oracle(model, batch, scores), rel=1e-4)
    assert [item.type for item in scores.no_place_by_type()] == ["out_proj"]
    placement = scores.place(types=list(scores.types))
    assert not any(name.endswith("mixer.out_proj") for name in placement.targets()["target_modules"])


def test_an_expert_has_its_tokens_and_masked_ones_do_not_count() -> None:
    model, batch = ARCHITECTURES["qwen3_moe"].build(), long_batch()
    chosen = []
    experts = model.model.layers[0].mlp.experts
    handle = experts.register_forward_hook(lambda module, args, output: chosen.append(args[1]))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    counted = batch["attention_mask"].reshape(-1).bool()
    scores = quietly(model, [batch])
    samples = torch.arange(12).repeat_interleave(24)
    for expert in range(4):
        routed = (chosen[0] == expert).any(-1) & counted
        for projection in ("gate_proj", "up_proj", "down_proj"):
            row = scores.module_names.index(f"model.layers.0.mlp.experts.{expert}.{projection}")
            expected = [int(routed[samples == sample].sum()) for sample in range(12)]
            assert scores.totals.tokens[row].tolist() == expected


def test_experts_with_too_few_tokens_are_named_and_left_out_of_the_type() -> None:
    model, batch = ARCHITECTURES["qwen3_moe"].build(), text_batch()
    with torch.no_grad():  # the router of layer 0 sends nothing to expert 3, and little to expert 2
        weight = model.model.layers[0].mlp.gate.weight
        weight[3] = 0
        weight[:2] *= 20
    with pytest.warns(UserWarning, match=r"expert projections of 24 are not scored: fewer than 16 tokens"):
        scores = score(model, [batch], progress=False)
    few = [item for item in scores.unscored if "experts." in item.name]
    assert few and {item.reason for item in few} == {"too few tokens were routed to it"}
    reasons = {item.name: item.detail for item in few}
    assert all(0 <= int(detail.removesuffix(" of at least 16")) < 16 for detail in reasons.values())
    assert not any(name in scores.module_names for name in reasons)
    assert all(type_score.nfn == type_score.nfn for type_score in scores.by_type())
    assert nfn(scores) == pytest.approx(oracle(model, batch, scores), rel=1e-4)
    mean = [value for name, value in nfn(scores).items() if name.endswith("up_proj")]
    assert next(s.nfn for s in scores.by_type() if s.type == "up_proj") == pytest.approx(sum(mean) / len(mean))


def test_batches_add_up_and_every_third_row_is_a_sample_of_them() -> None:
    model, batch = ARCHITECTURES["mixtral"].build(), text_batch()
    single = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(3)]
    whole = quietly(model, [batch])
    assert nfn(quietly(model, list(single))) == pytest.approx(nfn(whole), rel=1e-5)
    layers = discover(model).layers
    parts = []
    for phase in range(3):
        with Collector(model, layers) as collector, torch.no_grad():
            collector.begin(3, batch["attention_mask"], step=3, phase=phase)
            model(**batch)
            collector.end()
        parts.append(collector.recording.queue.all())
    rows = [index for index, layer in enumerate(layers) if layer.name in set(whole.module_names)]
    torch.testing.assert_close(sum(parts)[rows].numpy(), whole.totals.values, rtol=1e-9, atol=1e-9)


def test_one_projection_can_be_scored_alone() -> None:
    model, batch = ARCHITECTURES["deepseek_v3"].build(), text_batch()
    scores = quietly(model, [batch], include=["experts.up_proj"])
    assert scores.types == ("up_proj",) and len(scores.modules) <= 8
    assert nfn(scores) == pytest.approx(oracle(model, batch, scores), rel=1e-4)
    everything = quietly(model, [batch], exclude=["experts"])
    assert not any(".experts." in name for name in everything.module_names)
    with pytest.raises(InputError, match=r"`experts.3.up_proj` in `include`/`exclude` matches no linear layer"):
        score(model, [batch], include=["experts.3.up_proj"], progress=False)


def test_probe_baseline_is_near_the_frobenius_one() -> None:
    model, batch = ARCHITECTURES["gpt_oss"].build(), text_batch()
    scores = quietly(model, [batch], baseline="probe", probes=4000)
    matrices = expert_matrices(model.model.layers[1].mlp.experts)
    for module in scores.modules:
        if ".layers.1.mlp.experts." in module.name:
            expert, projection = module.name.rsplit(".", 2)[-2:]
            weight = matrices[projection][int(expert)]
            exact = float(weight.norm()) / weight.shape[1] ** 0.5
            assert module.baseline == pytest.approx(exact, rel=0.02)
            assert module.baseline_from == "probe"


def test_the_implementation_comes_back_after_an_exception() -> None:
    model, batch = ARCHITECTURES["qwen3_moe"].build(), text_batch()
    model.set_experts_implementation("batched_mm")
    with pytest.raises(IndexError):
        score(model, [{**batch, "input_ids": batch["input_ids"] + 10_000}], progress=False)
    assert model.config._experts_implementation == "batched_mm"
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", MOE)
@pytest.mark.parametrize("types", [1, 2, 4])
def test_partial_placements_wrap_exactly_what_is_placed(name: str, types: int, tmp_path: Path) -> None:
    """PEFT would turn a dense or shared `down_proj` in `target_modules` into all experts of all layers."""
    from peft import PeftModel, get_peft_model

    case = ARCHITECTURES[name]
    scores = quietly(case.build(), [case.batch()])
    for strategy in ("lowest", "inverse"):
        placement = scores.place(types=types, strategy=strategy)
        targets = placement.targets()
        assert isinstance(targets["target_modules"], list)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = get_peft_model(case.build(), placement.lora_config(r=4))
        placement.verify(adapted)
        trainable = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
        assert trainable == placement.num_parameters(4)
        adapted.save_pretrained(tmp_path / strategy)
        placement.verify(PeftModel.from_pretrained(case.build(), tmp_path / strategy))


def test_single_modules_of_a_mixture_are_placed_exactly() -> None:
    from peft import get_peft_model

    case = ARCHITECTURES["deepseek_v3"]
    scores = quietly(case.build(), [case.batch()])
    dense = "model.layers.0.mlp.down_proj"
    placement = scores.place(types=["mlp.down_proj", "o_proj"])
    assert placement.targets()["target_parameters"] == [f"{dense}.weight"]
    assert placement.targets()["target_modules"] == [f"model.layers.{i}.self_attn.o_proj" for i in range(3)]
    placement.verify(get_peft_model(case.build(), placement.lora_config(r=2)))
    with pytest.raises(InputError, match="others with it"):  # what PEFT makes of the obvious list
        config = placement.lora_config(r=2)
        config.target_modules, config.target_parameters = [dense], None
        placement.verify(get_peft_model(case.build(), config))


def test_experts_that_cannot_be_scored_still_make_it_a_mixture() -> None:
    """PEFT rewrites by model type, independent of the quantization of the experts."""
    model = ARCHITECTURES["deepseek_v3"].build()
    for layer in model.model.layers[1:]:
        layer.mlp.experts.down_proj = nn.Parameter(layer.mlp.experts.down_proj.to(torch.int8), requires_grad=False)
    layers = discover(model).layers
    assert not any(layer.adapter.kind == "stacked experts" for layer in layers)
    targets = {layer.name: layer.target for layer in layers}
    assert targets["model.layers.0.mlp.down_proj"].parameter
    assert targets["model.layers.1.mlp.shared_experts.gate_proj"].name.endswith("gate_proj.weight")
    assert not targets["model.layers.0.self_attn.o_proj"].parameter


def test_experts_of_another_class_make_it_a_mixture_too() -> None:
    from transformers.integrations.finegrained_fp8 import FP8Experts

    model = ARCHITECTURES["deepseek_v3"].build()
    for layer in model.model.layers[1:]:
        layer.mlp.experts = FP8Experts(model.config, block_size=(128, 128))
    found = discover(model)
    assert all(
        "no adapter reads its class" in item.reason for item in found.unscored if item.layer_class == "FP8Experts"
    )
    assert {layer.name: layer.target.parameter for layer in found.layers}["model.layers.0.mlp.down_proj"]


def test_up_without_gate_is_said_and_emitted_as_the_whole_parameter() -> None:
    case = ARCHITECTURES["qwen3_moe"]
    scores = quietly(case.build(), [long_batch()])
    placement = scores.place(types=["up_proj"])
    names = [f"model.layers.{i}.mlp.experts.gate_up_proj" for i in range(2)]
    assert placement.targets() == {"target_modules": [], "target_parameters": names}
    assert len(placement.modules) == 8 and placement.modules[0].endswith("experts.0.up_proj")
    (note,) = placement.notes
    assert note.startswith("PEFT adapts whole weights: `model.layers.0.mlp.experts.gate_up_proj`")
    assert note.endswith("also hold 8 scored parts that were not chosen")
    with pytest.warns(UserWarning, match="PEFT adapts whole weights"):
        placement.lora_config()
    assert placement.num_parameters(3) == 3 * 2 * 4 * (32 + 48)


@pytest.mark.parametrize("option", [{"lora_dropout": 0.1}, {"use_dora": True}])
def test_what_peft_cannot_do_on_parameters_is_refused(option: dict[str, Any]) -> None:
    case = ARCHITECTURES["mixtral"]
    placement = quietly(case.build(), [case.batch()]).place(types=["down_proj"])
    name = next(iter(option))
    with pytest.raises(InputError, match=rf"`{name}`=.*: PEFT cannot do that on parameters"):
        placement.lora_config(**option)
    with pytest.raises(InputError, match="`target_parameters` comes from the placement"):
        placement.lora_config(target_parameters=[])


def test_a_placement_of_experts_survives_a_file(tmp_path: Path) -> None:
    case = ARCHITECTURES["deepseek_v3"]
    scores = quietly(case.build(), [case.batch()])
    scores.save(tmp_path / "scores.json")
    placement = Scores.load(tmp_path / "scores.json").place(types=5)
    placement.save(tmp_path / "placement.json")
    loaded = plop_ext.Placement.load(tmp_path / "placement.json")
    assert loaded == placement == scores.place(types=5)
    loaded.check_model(case.build())
    with pytest.raises(InputError, match="made for another model"):
        loaded.check_model(ARCHITECTURES["mixtral"].build())


@pytest.mark.gpu
@pytest.mark.parametrize("name", MOE)
def test_on_cuda_as_on_the_cpu(name: str) -> None:
    model, batch = ARCHITECTURES[name].build(), text_batch()
    expected = nfn(quietly(model, [batch]))
    model.cuda()
    actual = nfn(quietly(model, [batch]))
    assert actual == pytest.approx(expected, rel=5e-3)  # float32 matmuls of the model itself may run in TF32
    assert quietly(model, [batch]).totals.values.tobytes() == quietly(model, [batch]).totals.values.tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_weighted_sum_of_the_chosen_experts(device: torch.device, dtype: torch.dtype) -> None:
    y, weights = torch.randn(60, 33, device=device).to(dtype), torch.rand(20, 3, device=device).to(dtype)
    rows = torch.randperm(60, device=device).view(20, 3)
    exact = (y.double()[rows] * weights.double().unsqueeze(-1)).sum(dim=1)
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    with torch.no_grad():
        torch.testing.assert_close(_weighted_sum(y, rows, weights).double(), exact, **tolerance)
        wide = _weighted_sum(y, rows, weights.double())  # routers that keep their weights in another type
    torch.testing.assert_close(wide.double(), exact, **tolerance)
    torch.testing.assert_close(_weighted_sum(y.double(), rows, weights.double()), exact)


@pytest.mark.gpu
def test_observing_experts_synchronizes_no_more_than_the_model_does() -> None:
    model = ARCHITECTURES["qwen3_moe"].build().to("cuda", torch.bfloat16)
    batch = {key: value.cuda() for key, value in text_batch().items()}
    mask = text_batch()["attention_mask"]

    def forward() -> None:
        model(input_ids=batch["input_ids"], use_cache=False)

    with torch.no_grad():
        forward()  # allocates
        plain = count_waits(forward)
        with Collector(model, discover(model).layers) as collector:

            def scored() -> None:
                collector.begin(3, mask)
                forward()
                collector.end()

            scored()
            assert count_waits(scored) <= plain
        assert collector.recording.queue.all().isfinite().all()
