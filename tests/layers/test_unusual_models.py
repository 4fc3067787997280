"""Layers that break naive hooks: convolutions, shared, repeated, uncalled, wrapped, offloaded and unknown ones."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import plop_ext.layers.adapter as adapter_module
from plop_ext import InputError, score
from plop_ext.collecting.collector import Collector
from plop_ext.layers import LayerAdapter, discover, register_adapter
from tests.support.architecture_parts import finished, from_config, t5_batch, text_batch
from tests.support.architectures import ARCHITECTURES
from tests.support.layer_oracle import oracle
from tests.support.quiet import nfn, quietly
from tests.support.tiny_models import Block, Plain, llama


def called(model: nn.Module, batch: Any) -> Any:
    return model(batch["x"])


CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "1d": (nn.Conv1d(4, 6, 3, padding=1), (3, 4, 11)),
    "1d causal": (nn.Conv1d(4, 4, 4, padding=3, groups=4), (3, 4, 10)),
    "2d patches": (nn.Conv2d(3, 8, 4, stride=4), (2, 3, 16, 16)),
    "2d stride and dilation": (nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(2, 0), dilation=(2, 1)), (2, 3, 13, 9)),
    "2d groups": (nn.Conv2d(6, 9, 3, groups=3, bias=False), (2, 6, 8, 8)),
    "2d same": (nn.Conv2d(2, 4, 4, padding="same"), (2, 2, 7, 6)),
    "2d valid": (nn.Conv2d(2, 4, 3, padding="valid"), (2, 2, 7, 6)),
    "2d reflect": (nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), (2, 2, 7, 6)),
    "2d circular": (nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), (2, 2, 7, 6)),
    "3d": (nn.Conv3d(2, 5, (2, 3, 3), padding=(0, 1, 1)), (2, 2, 4, 5, 6)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_is_a_linear_map_of_patches(name: str) -> None:
    conv, shape = CONVOLUTIONS[name]
    model = finished(nn.Sequential(conv))
    x = torch.randn(shape)
    scores = quietly(model, [x])
    assert nfn(scores) == pytest.approx(oracle(model, {"x": x}, scores, run=called), rel=1e-5)
    assert scores.modules[0].kind == "convolution"
    probed = quietly(model, [x], baseline="probe", probes=5000)
    assert probed.baseline == pytest.approx(scores.baseline, rel=0.1)  # a few outputs: E||W u|| is below the RMS


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_on_cuda(name: str) -> None:
    conv, shape = CONVOLUTIONS[name]
    model, x = finished(nn.Sequential(conv)).double(), torch.randn(shape, dtype=torch.float64)
    expected = nfn(quietly(model, [x]))
    assert nfn(quietly(model.cuda(), [x.cuda()])) == pytest.approx(expected, rel=1e-9)


def test_an_image_without_a_batch_dimension() -> None:
    model = finished(nn.Sequential(nn.Conv2d(3, 4, 3)))
    x = torch.randn(3, 8, 8)

    def run(model: nn.Module, batch: Any) -> Any:
        return model(batch[0])

    scores = quietly(model, [x.unsqueeze(0)], forward=run)
    whole = quietly(model, [x.unsqueeze(0)])
    assert nfn(scores) == pytest.approx(nfn(whole))


def test_a_transposed_convolution_is_reported() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    scores = quietly(model, [torch.randn(2, 3, 8, 8)])
    assert [item.layer_class for item in scores.unscored] == ["ConvTranspose2d"]
    assert "no adapter reads its class" in scores.unscored[0].reason


class Repeating(nn.Module):
    """One block under two names and called three times, and a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        block = Block()
        self.layers = nn.ModuleList([block, block])
        self.spare = nn.ModuleList([nn.Linear(16, 16)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](self.layers[1](self.layers[0](x)))


def test_repeated_shared_and_uncalled_modules() -> None:
    model, x = finished(Repeating()), torch.randn(4, 20, 16)
    scores = quietly(model, [x])
    assert set(scores.module_names) == {"layers.0.up", "layers.0.down"}
    assert nfn(scores) == pytest.approx(oracle(model, {"x": x}, scores, run=called), rel=1e-5)
    assert scores.totals.tokens[0].tolist() == [60.0] * 4
    reasons = {item.name: item.reason for item in scores.unscored}
    assert reasons["layers.1.up"] == "the same module as `layers.0.up`"
    assert reasons["spare.0"] == "never called in the forward, or only with masked tokens"


def test_experts_with_modules_of_their_own_are_reported() -> None:
    """Their rows are a few tokens of the batch, in an order that only their router knows."""
    model = from_config(
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersConfig",
        vocab_size=96,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        num_experts=4,
        decoder_start_token_id=0,
    )()
    with pytest.warns(UserWarning, match="an expert with a module of its own"):
        scores = score(model, [t5_batch()], progress=False)
    assert not any(".experts." in name for name in scores.module_names)
    assert nfn(scores) == pytest.approx(oracle(model, t5_batch(), scores), rel=1e-5)


class TwoOutputs(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


def test_a_linear_layer_that_returns_a_tuple_is_scored_and_not_placed() -> None:
    class Model(Plain):
        def forward(self, x: Tensor, *unused: Any, **ignored: Any) -> Tensor:
            return super().forward(self.layers[0].first(x)[0])

    model = Model()
    model.layers[0].first = TwoOutputs(16, 16)
    x = torch.randn(2, 20, 16)
    scores = quietly(model, [x])
    values = nfn(scores)
    assert values == pytest.approx(oracle(model, {"x": x}, scores, run=called), rel=1e-5)
    assert [item.name for item in scores.modules if item.target.refused] == ["layers.0.first"]
    placement = scores.place(strategy="all")
    assert "its forward returns a tuple" in placement.notes[0] and len(placement.lora_targets) == len(values) - 1


def test_tied_weights_are_scored_on_their_own_inputs() -> None:
    model = finished(Plain())
    model.layers[1].up.weight = model.layers[0].up.weight
    x = torch.randn(2, 20, 16)
    scores = quietly(model, [x])
    values = nfn(scores)
    assert values == pytest.approx(oracle(model, {"x": x}, scores, run=called), rel=1e-5)
    assert values["layers.0.up"] != pytest.approx(values["layers.1.up"], rel=1e-6)


@pytest.mark.parametrize("shape", [(6, 16), (6, 1, 5, 16), (6, 2, 3, 2, 16)], ids=str)
def test_inputs_of_any_rank(shape: tuple[int, ...]) -> None:
    model, x = finished(Plain()), torch.randn(shape)
    scores = quietly(model, [x])
    assert nfn(scores) == pytest.approx(oracle(model, {"x": x}, scores, run=called), rel=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_counts_each_token_once(reentrant: bool) -> None:
    """Scoring runs without gradients; a collector around a training step sees each block again in the backward."""
    model, batch = ARCHITECTURES["llama"].build(), text_batch()
    expected = quietly(model, [batch])
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    assert nfn(quietly(model, [batch])) == pytest.approx(nfn(expected))
    with Collector(model, discover(model).layers) as collector:
        collector.begin(3, batch["attention_mask"])
        model(**batch, use_cache=False).logits.sum().backward()
        collector.end()
    torch.testing.assert_close(collector.recording.queue.all().numpy(), expected.totals.values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt2"])
def test_a_model_with_adapters_is_scored_by_its_base_layers(name: str) -> None:
    from peft import LoraConfig, get_peft_model, inject_adapter_in_model

    case = ARCHITECTURES[name]
    batch = case.batch()
    expected = quietly(case.build(), [batch])
    placement = expected.place(strategy="all")
    adapted = get_peft_model(case.build(), placement.lora_config(r=2))
    scores = quietly(adapted, [batch])
    assert nfn(scores) == pytest.approx(nfn(expected), rel=1e-5)  # fresh adapters change nothing
    assert [module.target for module in scores.modules] == [module.target for module in expected.modules]
    again = scores.place(strategy="all")
    assert again.targets() == placement.targets()
    again.verify(get_peft_model(case.build(), again.lora_config(r=2)))
    if name == "llama":
        injected = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), case.build())
        assert nfn(quietly(injected, [batch])) == pytest.approx(nfn(expected), rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("baseline", ["frobenius", "probe"])
def test_offloaded_weights(name: str, where: str, baseline: str, tmp_path: Path) -> None:
    """Under accelerate's offload a weight is on meta whenever a hook looks."""
    from accelerate import cpu_offload, disk_offload

    case = ARCHITECTURES[name]
    batch = case.batch()
    expected = quietly(case.build(), [batch], baseline=baseline)
    model = case.build()
    cpu = torch.device("cpu")
    if where == "cpu":
        cpu_offload(model, execution_device=cpu, offload_buffers=False)
    else:
        disk_offload(model, str(tmp_path), execution_device=cpu)
    assert next(model.parameters()).device.type == "meta"
    scores = quietly(model, [batch], baseline=baseline)
    assert nfn(scores) == pytest.approx(nfn(expected), rel=1e-6)
    assert next(model.parameters()).device.type == "meta"


def test_weights_that_were_never_loaded_are_reported() -> None:
    model = Plain()
    model.layers[1].up.to("meta")
    with pytest.raises(InputError, match="has no linear layer to score"):
        score(nn.Sequential(nn.Linear(4, 4, device="meta")), [torch.randn(2, 3, 4)], progress=False)
    found = discover(model)
    assert [item.reason for item in found.unscored if item.name == "layers.1.up"] == [
        "its weight is on the meta device and was never loaded"
    ]


def test_scope_of_a_multimodal_model() -> None:
    case = ARCHITECTURES["llava"]
    model, batch = case.build(), case.batch()
    language = quietly(model, [batch])
    assert all("language_model" in name for name in language.module_names)
    vision = quietly(model, [batch], scope="vision")
    assert all("vision" in name for name in vision.module_names)
    everything = quietly(model, [batch], scope="all")
    assert set(everything.module_names) == set(language.module_names) | set(vision.module_names)
    left_out = {item.name: item.reason for item in language.unscored}
    assert left_out[vision.module_names[0]] == 'not in scope="language"'
    projector = quietly(model, [batch], include=["multi_modal_projector.linear_1"])
    assert len(projector.modules) == 1
    with pytest.raises(InputError, match='`model` has no audio part; scope="audio" selects nothing'):
        score(model, [batch], scope="audio", progress=False)
    with pytest.raises(InputError, match="`scope` must be one of language, vision, audio, all, got 'text'"):
        score(model, [batch], scope="text", progress=False)
    with pytest.raises(InputError, match="has no vision part"):
        score(llama(), [text_batch()], scope="vision", progress=False)


def test_scope_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    from plop_ext.cli.main import main

    assert main(["score", "plop-tiny", "prose", "--samples", "2", "--scope", "vision", "--quiet"]) == 2
    assert 'has no vision part; scope="vision" selects nothing' in " ".join(capsys.readouterr().err.split())
    assert main(["score", "plop-tiny", "prose", "--samples", "2", "--scope", "language", "--quiet"]) == 0


def test_mamba_placements_leave_out_what_peft_refuses() -> None:
    case = ARCHITECTURES["mamba"]
    placement = quietly(case.build(), [case.batch()]).place(strategy="all")
    assert all(not name.endswith("out_proj") for name in placement.targets()["target_modules"])
    (note,) = placement.notes
    assert note.startswith("scored, no place for LoRA: ") and "fused kernel" in note
    scores = quietly(case.build(), [case.batch()], include=["in_proj", "out_proj"])
    (note,) = scores.place(strategy="all").notes
    assert note.startswith("without LoRA: `backbone.layers.0.mixer.out_proj`")
    only = scores.place(types=["out_proj"])
    for refused in (only.targets, only.lora_config, lambda: only.rank_for(1000)):
        with pytest.raises(InputError, match=r"PEFT can adapt nothing of .*PEFT refuses out_proj on mamba models"):
            refused()


class ScaledLinear(nn.Module):
    """A layer class without an adapter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width + 2, width))
        self.scale = nn.Parameter(torch.rand(width + 2) + 0.5)

    def forward(self, hidden: Tensor) -> tuple[Tensor, str]:
        return hidden @ (self.weight * self.scale[:, None]).T, "and more"


class WithScaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"odd": ScaledLinear(8), "plain": nn.Linear(10, 8)})])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0]["plain"](self.layers[0]["odd"](hidden=x)[0])


@pytest.fixture
def registry() -> Iterator[None]:
    before = list(adapter_module._ADAPTERS)
    yield
    adapter_module._ADAPTERS[:] = before


def test_an_unknown_class_is_named_and_an_adapter_makes_it_known(registry: None) -> None:
    model, x = WithScaled(), torch.randn(3, 20, 8)
    with pytest.warns(UserWarning, match=r"not scored: `layers.0.odd` \(ScaledLinear\): .*register_adapter"):
        score(model, [x], progress=False)

    @register_adapter
    class ScaledLinearAdapter(LayerAdapter):
        kind = "scaled linear"

        def matches(self, module: nn.Module) -> bool:
            return isinstance(module, ScaledLinear)

        def features(self, module: Any) -> tuple[int, int]:
            return module.weight.shape[1], module.weight.shape[0]

        def weight_chunks(self, module: Any) -> Iterator[Tensor]:
            yield module.weight * module.scale[:, None]

        def output(self, module: nn.Module, output: Any) -> Tensor:
            return output[0]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = score(model, [x], progress=False)
    odd = model.layers[0]["odd"]
    weights = {"layers.0.odd": (odd.weight * odd.scale[:, None]).detach(), "layers.0.plain": None}
    weights["layers.0.plain"] = model.layers[0]["plain"].weight.detach()
    expected = oracle(model, {"x": x}, scores, weights=weights, run=called)
    assert nfn(scores) == pytest.approx(expected, rel=1e-5)
    assert {module.kind for module in scores.modules} == {"scaled linear", "linear"}
    probed = quietly(model, [x], baseline="probe", probes=4000)
    assert probed.baseline == pytest.approx(scores.baseline, rel=0.05)
