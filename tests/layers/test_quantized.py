"""Quantized weights: NFN is that of the values the forward really applies, by every library that is installed."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plop_ext import InputError, Scores, score
from plop_ext.layers import adapter_for
from plop_ext.layers.quantized import CHUNK_ELEMENTS, FP8LinearAdapter
from plop_ext.provenance import describe_model
from tests.support.architecture_parts import from_config, text_batch
from tests.support.architectures import ARCHITECTURES
from tests.support.layer_oracle import oracle


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed; pip install 'plop_ext[quantized]'")


def wide_llama() -> nn.Module:
    """Rows of 64 elements, as quantizers want them."""
    fields = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return from_config("LlamaForCausalLM", "LlamaConfig", **fields, **heads, attention_bias=True)()


def wide_phi3() -> nn.Module:
    fields = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
    return from_config("Phi3ForCausalLM", "Phi3Config", **fields, **heads)()


def replace_linears(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """`model` with every linear layer of its blocks made anew."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in name:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, make(module))
    return model


def nf4(linear: nn.Linear, quant_type: str = "nf4", nested: bool = False) -> nn.Module:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=torch.float32,
        quant_type=quant_type,
        compress_statistics=nested,
    )
    layer.weight = bnb.nn.Params4bit(
        linear.weight.data.clone(), requires_grad=False, quant_type=quant_type, compress_statistics=nested
    ).to("cpu")
    layer.bias = linear.bias
    # Some CPUs have a kernel that rounds scales and activations to bfloat16, for every compute type.
    layer.support_avx512bf16_for_cpu = False
    return layer


def int8(linear: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, bias=linear.bias is not None, has_fp16_weights=False
    )
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def torchao(config: str) -> Callable[[nn.Linear], nn.Module]:
    def make(linear: nn.Linear) -> nn.Module:
        from torchao import quantization

        linear = copy.deepcopy(linear)
        quantization.quantize_(linear, getattr(quantization, config)())
        return linear

    return make


def hqq(linear: nn.Linear) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=64)
    return HQQLinear(copy.deepcopy(linear), config, compute_dtype=torch.float32, device="cpu")


class CodesLinear(nn.Module):
    """A packed format without an adapter: codes and scales, and a forward that unpacks them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scales = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 7
        self.register_buffer("scales", scales)
        self.register_buffer("codes", (linear.weight.detach() / scales).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.codes * self.scales, self.bias)


def by_identity(module: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """W as the forward applies it, one unit vector at a time: knows no format, and none of our code."""
    size = adapter_for(module).features(module)[0]
    with torch.no_grad():
        zero = module.forward(torch.zeros(1, size, dtype=dtype)).double()
        columns = [module.forward(torch.eye(size, dtype=dtype)[k : k + 1]).double() - zero for k in range(size)]
    return torch.cat(columns).T


def check(model: nn.Module, kind: str, baseline_from: str, rel: float, **kwargs: Any) -> Scores:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = text_batch()
        scores = score(model, [batch], progress=False, **kwargs)
        modules = dict(model.named_modules())
        weights = {name: by_identity(modules[name]) for name in {module.target.name for module in scores.modules}}
        expected = oracle(model, batch, scores, weights=weights, packed=ARCHITECTURES["phi3"].packed)
    assert {module.kind for module in scores.modules} == {kind}
    assert {module.baseline_from for module in scores.modules} == {baseline_from}
    assert dict(zip(scores.module_names, scores.nfn.tolist(), strict=True)) == pytest.approx(expected, rel=rel)
    for module in scores.modules:
        if module.name in weights:
            assert module.weight_norm == pytest.approx(float(weights[module.name].norm()), rel=rel)
    return scores


@needs("bitsandbytes")
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
def test_bitsandbytes_4bit(quant_type: str, nested: bool) -> None:
    model = replace_linears(wide_llama(), lambda linear: nf4(linear, quant_type, nested))
    scores = check(model, "bitsandbytes 4-bit", "dequantized", 1e-5)
    check_peft(scores, model)


@needs("bitsandbytes")
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
def test_a_weight_that_a_forward_packed_for_the_cpu_is_the_same_matrix(nested: bool) -> None:
    """Some CPUs store the codes in another order and the scales transposed, in bfloat16, after the first forward."""
    import bitsandbytes as bnb

    layer: Any = nf4(nn.Linear(192, 64, bias=False), nested=nested)
    adapter = adapter_for(layer)
    before = torch.cat(list(adapter.weight_chunks(layer)))
    pack = bnb.functional._convert_weight_packed_for_cpu
    layer.weight.data, layer.weight.quant_state = pack(layer.weight.data, layer.weight.quant_state)
    torch.testing.assert_close(torch.cat(list(adapter.weight_chunks(layer))), before, rtol=2**-8, atol=0)


@needs("bitsandbytes")
def test_provenance_counts_the_weights_in_4_bits_and_their_real_bytes() -> None:
    full, model = describe_model(wide_llama()), replace_linears(wide_llama(), nf4)
    model.is_loaded_in_4bit = True  # as the quantizer of transformers marks it
    packed = describe_model(model)
    assert packed["parameters"] == full["parameters"]
    assert full["parameters"] * 4 <= full["weight_bytes"] < full["parameters"] * 4 + 1000
    linears = sum(m.in_features * m.out_features for m in model.modules() if type(m).__name__ == "Linear4bit")
    assert linears and full["weight_bytes"] - packed["weight_bytes"] == pytest.approx(linears * 3.5)


@needs("bitsandbytes")
def test_bitsandbytes_4bit_is_read_in_chunks() -> None:
    """Several chunks, and rows that are no whole number of quantization blocks."""
    import bitsandbytes as bnb

    linear = nn.Linear(1000, 3 * CHUNK_ELEMENTS // 2000, bias=False)
    layer = nf4(linear, nested=True)
    adapter = adapter_for(layer)
    chunks = list(adapter.weight_chunks(layer))
    assert len(chunks) == 2 and max(chunk.numel() for chunk in chunks) <= CHUNK_ELEMENTS
    whole = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(torch.cat(chunks), whole)
    torch.testing.assert_close(adapter.weight_sumsq(layer).double(), whole.double().square().sum(1), rtol=1e-6, atol=0)


@needs("bitsandbytes")
def test_bitsandbytes_8bit() -> None:
    """The forward rounds activations to int8 too, which is no part of W: a module is off by up to 0.14 %."""
    model = replace_linears(wide_llama(), int8)
    layer = model.model.layers[0].mlp.up_proj
    exact = layer.weight.data.double() * (adapter_for(layer)._scales(layer).double() / 127)[:, None]
    assert float(adapter_for(layer).weight_sumsq(layer).sum()) == pytest.approx(float(exact.square().sum()), rel=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = score(model, [text_batch()], progress=False)
        modules = dict(model.named_modules())
        weights = {
            name: modules[name].weight.data.double()
            * (adapter_for(layer)._scales(modules[name]).double() / 127)[:, None]
            for name in scores.module_names
        }
        expected = oracle(model, text_batch(), scores, weights=weights)
    assert dict(zip(scores.module_names, scores.nfn.tolist(), strict=True)) == pytest.approx(expected, rel=3e-3)


@needs("bitsandbytes")
def test_parts_of_a_quantized_fused_weight() -> None:
    model = replace_linears(wide_phi3(), nf4)
    batch = text_batch()
    scores = score(model, [batch], progress=False)
    modules = dict(model.named_modules())
    weights = {name: by_identity(modules[name]) for name in {module.target.name for module in scores.modules}}

    def qkv(columns: int) -> dict[str, Tensor]:
        return dict(zip("qkv", torch.arange(columns).split([64, 32, 32]), strict=True))

    def gate_up(columns: int) -> dict[str, Tensor]:
        return dict(zip(("gate", "up"), torch.arange(columns).chunk(2), strict=True))

    expected = oracle(model, batch, scores, weights=weights, packed={"qkv_proj": qkv, "gate_up_proj": gate_up})
    assert dict(zip(scores.module_names, scores.nfn.tolist(), strict=True)) == pytest.approx(expected, rel=1e-5)
    assert len(scores.types) == 7


@needs("torchao")
@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_torchao_weight_only(config: str) -> None:
    model = replace_linears(wide_llama(), torchao(config))
    # torchao multiplies by the scales after the matmul, in another order than W z.
    scores = check(model, "torchao", "dequantized", 1e-4)
    check_peft(scores, model)


@needs("hqq")
def test_hqq() -> None:
    check(replace_linears(wide_llama(), hqq), "HQQ", "dequantized", 1e-5)


@pytest.mark.parametrize("block", [(32, 64), (128, 128), None], ids=str)
def test_fine_grained_fp8(block: tuple[int, int] | None) -> None:
    """The forward needs a GPU kernel; the norm does not. Edges are no whole blocks."""
    from transformers.integrations.finegrained_fp8 import FP8Linear

    layer = FP8Linear(200, 144, block_size=block)
    layer.weight.data = (torch.randn(144, 200) * 2).to(torch.float8_e4m3fn)
    scale = torch.tensor(0.7) if block is None else torch.rand(layer.weight_scale_inv.shape) + 0.5
    layer.weight_scale_inv.data = scale
    adapter = adapter_for(layer)
    assert isinstance(adapter, FP8LinearAdapter)
    expected = layer.weight.data.double()
    for row in range(144):
        for column in range(200):
            factor = scale if block is None else scale[row // block[0], column // block[1]]
            expected[row, column] *= float(factor)
    torch.testing.assert_close(adapter.weight_sumsq(layer).double(), expected.square().sum(1), rtol=1e-6, atol=0)


def test_an_unknown_format_is_measured_from_outside() -> None:
    model = replace_linears(wide_llama(), CodesLinear)
    check(model, "unreadable weight", "identity", 1e-5)


def test_probe_baseline_needs_no_weight() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = replace_linears(wide_llama(), CodesLinear)
        probed = score(model, [text_batch()], baseline="probe", probes=2000, progress=False)
        exact = score(model, [text_batch()], progress=False)
    assert {module.baseline_from for module in probed.modules} == {"probe"}
    assert probed.baseline == pytest.approx(exact.baseline, rel=0.02)


def test_what_cannot_be_measured_is_reported_with_its_error() -> None:
    class Refusing(CodesLinear):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 1 and x.dim() == 2:
                raise RuntimeError("this kernel takes 16 rows at most\nand more text")
            return super().forward(x)

    class Curved(CodesLinear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).square()

    model = replace_linears(wide_llama(), lambda linear: linear)
    block = model.model.layers[0]
    block.mlp.up_proj, block.mlp.down_proj = Refusing(block.mlp.up_proj), Curved(block.mlp.down_proj)
    with pytest.warns(UserWarning, match=r"not scored: .*(up|down)_proj"):
        scores = score(model, [text_batch()], progress=False)
    reasons = {item.name: item.reason for item in scores.unscored}
    error = "its weight cannot be read (RuntimeError: this kernel takes 16 rows at most)"
    assert reasons["model.layers.0.mlp.up_proj"] == error
    assert reasons["model.layers.0.mlp.down_proj"] == "its forward is not linear"
    assert "model.layers.1.mlp.up_proj" in scores.module_names
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        probed = score(model, [text_batch()], baseline="probe", progress=False)
    assert {item.name: item.reason for item in probed.unscored}["model.layers.0.mlp.up_proj"] == error


@needs("bitsandbytes")
def test_a_weight_that_was_never_quantized_is_reported() -> None:
    import bitsandbytes as bnb

    model = nn.Sequential(bnb.nn.Linear4bit(64, 64))
    with pytest.raises(InputError, match="no linear layer to score; not scored: Linear4bit"):
        score(model, [torch.randn(2, 5, 64)], progress=False)


@needs("bitsandbytes")
@pytest.mark.filterwarnings("ignore:no signal", "ignore:.*counted tokens")
@pytest.mark.parametrize("make", [nf4, int8])
def test_a_placement_of_the_full_weights_fits_the_quantized_ones(make: Callable[[nn.Linear], nn.Module]) -> None:
    placement = score(wide_llama(), [text_batch()], progress=False).place(types=3)
    placement.check_model(replace_linears(wide_llama(), make))
    other = wide_llama()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter *= 1.1
    with pytest.raises(InputError, match="was made for other weights"):
        placement.check_model(replace_linears(other, make))


def check_peft(scores: Scores, model: nn.Module) -> None:
    from peft import get_peft_model

    placement = scores.place(types=3)
    placement.check_model(model)
    adapted = get_peft_model(model, placement.lora_config(r=2))
    placement.verify(adapted)
    trainable = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    assert trainable == placement.num_parameters(2)
