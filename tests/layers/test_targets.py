"""A target is placed if LoRA on it trains, merges and reloads, and refused with a reason if not."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from plop_ext.layers import LinearLayer, discover
from plop_ext.layers.targets import _READING_SIZES
from tests.support.architecture_parts import TEXT, from_config
from tests.support.architectures import ARCHITECTURES
from tests.support.tiny_models import llama


class OwnForward(nn.Conv2d):
    """Weight-standardized: LoRA made by this class would be standardized too."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight / self.weight.std(dim=(1, 2, 3), keepdim=True)
        return nn.functional.conv2d(input, weight, self.bias, self.stride, self.padding)


class OwnArguments(nn.Conv2d):
    """Made by other arguments than its base class."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3, padding=1)


CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...], str]] = {
    "1d": (nn.Conv1d(4, 6, 3, padding=1), (3, 4, 11), ""),
    "1d pointwise": (nn.Conv1d(4, 6, 1), (3, 4, 11), ""),
    "2d patches": (nn.Conv2d(3, 8, 4, stride=4), (2, 3, 16, 16), ""),
    "2d pointwise": (nn.Conv2d(3, 8, 1), (2, 3, 5, 5), ""),
    "2d same": (nn.Conv2d(2, 4, 4, padding="same"), (2, 2, 7, 6), ""),
    "3d": (nn.Conv3d(2, 5, (2, 3, 3), padding=(0, 1, 1)), (2, 2, 4, 5, 6), ""),
    "depthwise": (nn.Conv1d(4, 4, 4, padding=3, groups=4), (3, 4, 10), "grouped"),
    "grouped": (nn.Conv2d(6, 9, 3, groups=3, bias=False), (2, 6, 8, 8), "grouped"),
    "dilated": (nn.Conv2d(3, 5, 3, padding=2, dilation=2), (2, 3, 13, 9), "dilation"),
    "dilated, same size": (nn.Conv1d(3, 5, 3, padding="same", dilation=2), (2, 3, 13), "dilation"),
    "reflecting": (nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), (2, 2, 7, 6), "padding mode"),
    "circular": (nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), (2, 2, 7, 6), "padding mode"),
    "own forward": (OwnForward(2, 4, 3), (2, 2, 7, 6), "forward of its own"),
    "own arguments": (OwnArguments(4), (2, 4, 7, 6), "forward of its own"),
}


def layers(model: nn.Module, **kwargs: Any) -> dict[str, LinearLayer]:
    return {layer.name: layer for layer in discover(model, **{"scope": "all", **kwargs}).layers}


def merges(conv: nn.Module, x: Tensor) -> bool:
    """Whether PEFT wraps the module at a rank that suits its groups, and merges to what it computed before."""
    rank = 2 * conv.groups
    model = nn.Sequential(conv)
    try:
        adapted = get_peft_model(model, LoraConfig(r=rank, target_modules=["0"], init_lora_weights=False)).double()
        expected = adapted(x.double())
        merged = adapted.merge_and_unload()
    except (ValueError, TypeError, NotImplementedError, RuntimeError):
        return False
    return torch.allclose(merged(x.double()), expected, rtol=1e-9)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_are_placed_if_peft_can_merge_them(name: str) -> None:
    conv, shape, reason = CONVOLUTIONS[name]
    refused = layers(nn.Sequential(conv))["0"].target.refused
    assert (reason in refused) if reason else refused == ""
    assert merges(conv, torch.randn(shape)) == (refused == "")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name, case in CONVOLUTIONS.items() if not case[2]])
def test_the_size_of_lora_on_a_convolution(name: str) -> None:
    model = nn.Sequential(CONVOLUTIONS[name][0])
    target = layers(model)["0"].target
    adapted = get_peft_model(model, LoraConfig(r=3, target_modules=["0"]))
    assert sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad) == 3 * target.size


class Applied(nn.Module):
    """A linear layer of no class that PEFT knows."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 4, 6
        self.codes = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.codes.T


def test_a_class_that_peft_does_not_know_is_refused() -> None:
    found = layers(nn.Sequential(Applied(), nn.Linear(6, 4)))
    assert found["0"].target.refused == "PEFT does not support the class Applied" and not found["1"].target.refused
    with pytest.raises(ValueError, match="is not supported"):
        get_peft_model(nn.Sequential(Applied()), LoraConfig(target_modules=["0"]))


def tied(build: Callable[[nn.Sequential], Any]) -> nn.Module:
    model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8))
    build(model)
    return model


def share_the_object(model: nn.Sequential) -> None:
    model[2].weight = model[0].weight


def share_the_memory(model: nn.Sequential) -> None:
    model[2].weight = nn.Parameter(model[0].weight.data)


def share_a_part(model: nn.Sequential) -> None:
    whole = torch.randn(12, 8)
    model[0].weight, model[2].weight = nn.Parameter(whole[:8]), nn.Parameter(whole[4:])


def share_transposed(model: nn.Sequential) -> None:
    model[2].weight = nn.Parameter(model[0].weight.data.T)


@pytest.mark.parametrize("share", [share_the_object, share_the_memory, share_a_part, share_transposed])
def test_a_weight_in_shared_memory_is_refused_by_the_name_of_its_partner(
    share: Callable[[nn.Sequential], None],
) -> None:
    found = layers(tied(share))
    assert found["2"].target.refused.startswith("its weight is shared with `0.weight`")
    assert not found["1"].target.refused and not found["3"].target.refused


def test_neighbours_in_one_storage_are_not_tied() -> None:
    def halves(model: nn.Sequential) -> None:
        whole = torch.randn(16, 8)
        model[0].weight, model[2].weight = nn.Parameter(whole[:8]), nn.Parameter(whole[8:])

    assert not any(layer.target.refused for layer in layers(tied(halves)).values())


def test_merging_a_placement_on_tied_weights_would_change_the_partner() -> None:
    """What the refusal is for, and that a copy of the weight is not refused."""
    model = tied(share_the_object)
    before = model[0].weight.clone()
    adapted = get_peft_model(model, LoraConfig(target_modules=["2"], init_lora_weights=False))
    assert not torch.equal(adapted.merge_and_unload()[0].weight, before)
    model[2].weight = nn.Parameter(model[0].weight.clone())
    assert not layers(model)["2"].target.refused


def test_one_module_in_two_places_is_refused_and_one_place_with_two_names_is_not() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            self.alias = self.inner
            self.again = nn.Sequential(self.inner[1])

    refused = {name: layer.target.refused for name, layer in layers(Shared()).items()}
    assert refused["inner.0"] == "" and refused["inner.1"].startswith("its weight is shared with `again.0.weight`")


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_a_tied_head_is_refused_and_an_untied_one_is_not(name: str) -> None:
    model: Any = ARCHITECTURES[name].build()
    assert layers(model, include="lm_head")["lm_head"].target.refused.startswith("its weight is shared with `")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    assert not layers(model, include="lm_head")["lm_head"].target.refused


def test_a_tied_head_that_is_offloaded_is_found_by_what_the_model_declares() -> None:
    from accelerate import cpu_offload

    model = cpu_offload(ARCHITECTURES["gpt2"].build(), execution_device=torch.device("cpu"))
    assert layers(model, include="lm_head")["lm_head"].target.refused
    assert not any(layer.target.refused for layer in layers(model).values())


def test_blocks_that_share_their_weights_are_refused_and_others_are_not() -> None:
    model = from_config(
        "ZambaForCausalLM",
        "ZambaConfig",
        **{**TEXT, "num_hidden_layers": 6},
        attention_hidden_size=64,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
        n_mamba_heads=1,
        use_mamba_kernels=False,
    )()
    found = layers(model)
    shared = {name for name, layer in found.items() if "shared with" in layer.target.refused}
    assert shared and all("shared_transf" in name for name in shared)
    assert shared == {name for name in found if "shared_transf" in name}


def test_leaves_that_peft_rewrites_by_the_type_of_the_model_are_parameters_without_any_expert() -> None:
    fields = {**TEXT, "head_dim": 8, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
    model = from_config("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **fields, mlp_only_layers=[0, 1])()
    targets = {layer.target.name for layer in layers(model).values()}
    assert "model.layers.0.mlp.down_proj.weight" in targets and "model.layers.0.self_attn.q_proj" in targets
    assert not any(layer.target.parameter for layer in layers(llama()).values())


def test_a_model_that_peft_cannot_wrap_is_refused_as_a_whole() -> None:
    class Named(nn.Sequential):
        _tied_weights_keys: ClassVar = {"1.weight": "0.weight"}

        def get_input_embeddings(self) -> nn.Module:
            raise NotImplementedError

    model = Named(nn.Linear(4, 4), nn.Linear(4, 4))
    reasons = {layer.target.refused for layer in layers(model).values()}
    assert reasons == {"PEFT cannot wrap Named, whose `get_input_embeddings` is not implemented"}
    with pytest.raises(NotImplementedError):
        get_peft_model(model, LoraConfig(target_modules=["0"]))


def test_convolutions_whose_sizes_the_model_reads_are_refused_and_would_crash_or_be_ignored() -> None:
    model = from_config("MobileNetV1Model", "MobileNetV1Config", image_size=32, depth_multiplier=0.25)()
    refused = [layer.target.refused for layer in layers(model).values()]
    assert all("MobileNetV1ConvLayer reads its stride" in reason or "grouped" in reason for reason in refused)
    adapted = get_peft_model(model, LoraConfig(target_modules=["conv_stem.convolution"]))
    with pytest.raises(AttributeError, match="stride"):
        adapted(pixel_values=torch.randn(1, 3, 32, 32))


# A name that stands for a convolution, and an attribute that PEFT's wrapper lacks, outside of constructors.
_READ = re.compile(r"\b(?:conv\w*|\w*_layer)\.(?:stride|kernel_size|dilation)\b")


def test_the_table_of_classes_that_read_sizes_is_complete() -> None:
    """By the sources of transformers: classes with a method that reads such an attribute, but for constructors."""
    import transformers

    reading: set[str] = set()
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source) if _READ.search(source) else ast.Module([], [])
        for owner in tree.body:
            for node in owner.body if isinstance(owner, ast.ClassDef) else [owner]:
                built = isinstance(node, ast.FunctionDef) and node.name not in ("__init__", "_init_weights")
                if built and _READ.search(ast.unparse(node)):
                    reading.add(owner.name)
    # The function of MobileNet is called by its layers; transposed convolutions are not scored.
    assert reading - {"apply_tf_padding", "EncodecConvTranspose1d"} == _READING_SIZES - {
        "MobileNetV1ConvLayer",
        "MobileNetV2ConvLayer",
    }
