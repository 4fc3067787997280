"""The matrices that are no place for LoRA: found in a model, overridden by `include`, and up to date."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from torch import nn

from plop_ext.errors import InputError
from plop_ext.layers import Discovery, discover
from plop_ext.layers import no_place as table
from plop_ext.layers.no_place import SINGLE_OUTPUT, TABLE, NoPlace, reason_against
from plop_ext.layers.routers import ROUTER
from tests.support.architectures import ARCHITECTURES


def named(name: str, **children: nn.Module) -> nn.Module:
    """A module whose class is called `name`."""
    made = type(name, (nn.Module,), {})()
    for child, module in children.items():
        made.add_module(child, module)
    return made


def blocks(make: Callable[[], nn.Module], count: int = 2) -> nn.Module:
    return named("Model", layers=nn.ModuleList([make() for _ in range(count)]))


def linear(out_features: int = 6) -> nn.Module:
    return nn.Linear(4, out_features, bias=False)


def reasons(found: Discovery) -> dict[str, str]:
    return {layer.name: layer.no_place for layer in found.layers}


def attention() -> nn.Module:
    indexer = named("SomeIndexer", wq_b=linear(), scorer=named("Inner", weights_proj=linear()))
    return named("Layer", mixer=named("SomeAttention", q_proj=linear(), indexer=indexer, gate=linear(1)))


def test_a_matrix_is_judged_by_what_holds_it_and_by_its_outputs() -> None:
    found = reasons(discover(blocks(attention, 1)))
    assert found == {
        "layers.0.mixer.q_proj": "",
        "layers.0.mixer.indexer.wq_b": table.INDEXER,
        "layers.0.mixer.indexer.scorer.weights_proj": table.INDEXER,
        "layers.0.mixer.gate": SINGLE_OUTPUT,
    }


def test_include_makes_candidates_of_them_and_the_published_script_knows_none() -> None:
    model = blocks(attention)
    assert not any(reasons(discover(model, include=["weights_proj", "gate"])).values())
    assert not any(reasons(discover(model, everything=True)).values())
    assert set(reasons(discover(model, exclude="gate")).values()) == {"", table.INDEXER}


def test_a_model_without_a_candidate_is_refused_with_the_remedy() -> None:
    model = blocks(lambda: named("Layer", indexer=named("SomeIndexer", wk=linear())))
    message = r"`model` \(Model\) has no linear layer for LoRA; `layers.0.indexer.wk`: it only .*; name in `include`"
    with pytest.raises(InputError, match=message):
        discover(model)
    assert len(discover(model, include="wk").layers) == 2


def test_the_gate_of_a_shared_expert_is_scored_and_the_router_is_not() -> None:
    found = discover(ARCHITECTURES["qwen2_moe"].build())
    unscored = {item.name: item.reason for item in found.unscored}
    for layer in range(2):
        assert reasons(found)[f"model.layers.{layer}.mlp.shared_expert_gate"] == SINGLE_OUTPUT
        assert unscored[f"model.layers.{layer}.mlp.gate"] == ROUTER


@pytest.mark.parametrize("name", ["mamba", "mamba2", "falcon_h1", "qwen3_next"])
def test_known_architectures(name: str) -> None:
    wanted = {
        "mamba": {"out_proj": table.PAST_THE_ADAPTER, "x_proj": table.PAST_THE_ADAPTER},
        "mamba2": {"out_proj": table.PAST_THE_ADAPTER},
        "falcon_h1": {"out_proj": table.PAST_THE_ADAPTER},
        "qwen3_next": {"in_proj_ba": table.DECAY, "shared_expert_gate": SINGLE_OUTPUT},
    }[name]
    found = discover(ARCHITECTURES[name].build()).layers
    no_place = {layer.type: layer.no_place for layer in found if layer.no_place}
    # Depthwise, and read by a kernel.
    assert "PEFT" in no_place.pop("conv1d") and no_place == wanted


def test_what_peft_cannot_adapt_competes_only_if_there_is_nothing_else() -> None:
    grouped = nn.Conv1d(4, 4, 3, groups=2)
    beside = nn.ModuleList([nn.ModuleDict({"conv": grouped, "proj": nn.Linear(4, 4)}) for _ in range(2)])
    assert {name.rsplit(".", 1)[-1]: bool(reason) for name, reason in reasons(discover(beside)).items()} == {
        "conv": True,
        "proj": False,
    }
    alone = discover(nn.ModuleList([nn.ModuleDict({"conv": grouped}), nn.ModuleDict({"conv": grouped})])).layers
    assert [layer.no_place for layer in alone] == [""] and alone[0].target.refused


def test_patterns_are_whole_names() -> None:
    entry = NoPlace(("*Router", "Exact"), ("a_*",), "")
    assert entry.names("SomeRouter", "a_b") and entry.names("Exact", "a_")
    assert not entry.names("RouterMLP", "a_b") and not entry.names("exact", "a_b") and not entry.names("Exact", "ba_b")
    assert reason_against([("KimiLinearDeltaAttention", "q_proj")]) == ""
    assert reason_against([("Model", "layers"), ("KimiLinearDeltaAttention", "b_proj")]) == table.DECAY


# The sources of transformers.

_CLASS = re.compile(r"^ *class (\w+)", re.MULTILINE)
_HELD = re.compile(r"self\.(\w+) = ([^\n]*(?:\([^()]*(?:\([^()]*\)[^()]*)*\))?)", re.DOTALL)


@cache
def sources() -> dict[str, str]:
    """Name of each class of a model in transformers to its source."""
    import transformers

    found: dict[str, str] = {}
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        pieces = _CLASS.split(path.read_text(encoding="utf-8"))
        found.update(zip(pieces[1::2], pieces[2::2], strict=True))
    return found


@cache
def attributes() -> tuple[tuple[str, str, str], ...]:
    """Class, attribute, and the text that makes it."""
    return tuple((owner, name, made) for owner, source in sources().items() for name, made in _HELD.findall(source))


@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: f"{entry.owners[0]}-{'-'.join(entry.attributes)}")
def test_every_entry_matches_a_class_of_transformers(entry: NoPlace) -> None:
    for owner in entry.owners:
        single = NoPlace((owner,), entry.attributes, "")
        assert any(single.names(kind, name) for kind, name, _ in attributes()), owner
    for attribute in entry.attributes:
        single = NoPlace(entry.owners, (attribute,), "")
        assert any(single.names(kind, name) for kind, name, _ in attributes()), attribute


_KNOWN = {
    # In training, the forward calls the module.
    *(("BloomAttention", "dense"), ("BloomMLP", "dense_4h_to_h")),  # its weight only with `slow_but_exact`
    *(("LSHSelfAttention", "query_key"), ("LSHSelfAttention", "value")),  # for cached states
    # The module is never called, so that it is not scored.
    *((kind, "dt_proj") for kind in ("MambaMixer", "FalconMambaMixer", "JambaMambaMixer")),
    *(("WavLMAttention", name) for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
    # Outside the blocks.
    *((f"{kind}MHAttentionMap", "k_proj") for kind in ("ConditionalDetr", "Detr", "MaskFormerDetr")),
    *(("DabDetrMHAttentionMap", "k_linear"), ("TDNNLayer", "kernel")),
    *(("MobileBertLMPredictionHead", name) for name in ("decoder", "dense")),
    *((f"Gemma4{kind}AssistantForCausalLM", "lm_head") for kind in ("", "Unified")),
    ("NeoMMEForMaskedLM", "unembedding_projection"),
    *(("LayoutLMv2Encoder", f"rel_pos_{axis}bias") for axis in ("", "x_", "y_")),
}
_PRODUCT = re.compile(r"self\.(\w+)\.weight(?:\b|\.T|\.t\(\))")
_OTHER_USE = re.compile(
    r"self\.\w+\.weight\.(?:dtype|device|data|shape)|isinstance\(self\.\w+\.weight|init\.\w+\([^)]*\)"
)


def weights_read() -> Iterator[tuple[str, str]]:
    """Class and attribute of each linear layer whose weight a forward reads past the module."""
    linears = {(owner, name) for owner, name, made in attributes() if re.search(r"\bLinear\(", made)}
    for owner, source in sources().items():
        forwards = re.split(r"\n    def ", source)
        for method in forwards:
            if method.startswith(("__init__", "_init_weights", "tie_", "get_", "set_", "_tie", "resize")):
                continue
            for name in _PRODUCT.findall(_OTHER_USE.sub("", method)):
                if (owner, name) in linears:
                    yield owner, name


def test_every_weight_that_a_forward_reads_past_its_module_is_known() -> None:
    assert {step for step in weights_read() if not reason_against([step])} == _KNOWN


_ONE_PER_HEAD = re.compile(
    r"\bLinear\([^,]+,\s*(?:out_features=)?(?:self|config)\.(?:\w+_)*(?:v_)?(?:num_)?\w*heads\s*[,)]"
)
_BIASES = {
    ("EsmFold2MSAPairWeightedAveraging", "bias_proj"),  # of proteins, from pairs
    # Outside the blocks.
    *(
        (f"{kind}Encoder", f"rel_pos_{axis}bias")
        for kind in ("LayoutLMv2", "LayoutLMv3", "PPDocLayoutV2ReadingOrder")
        for axis in ("", "x_", "y_")
    ),
}


def test_every_layer_with_one_output_per_head_is_known() -> None:
    steps = {(owner, name) for owner, name, made in attributes() if _ONE_PER_HEAD.search(made)}
    assert {step for step in steps if not reason_against([step])} == _BIASES
    assert ("Qwen3_5GatedDeltaNet", "in_proj_a") in steps  # the expression finds what it should
