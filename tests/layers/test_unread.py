"""Blocks of an encoder that the model does not read: those whose LoRA gets no gradient."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from plop_ext import score
from plop_ext.layers.unread import UNREAD, unread_blocks
from tests.support.architecture_parts import HIDDEN, TEXT, VISION, VOCAB, finished, llava_batch


def llava(feature_layer: int | list[int]) -> nn.Module:
    import transformers

    vision = transformers.CLIPVisionConfig(**{**VISION, "num_hidden_layers": 3}, projection_dim=HIDDEN)
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=vision,
        image_token_id=VOCAB - 1,
        vision_feature_layer=feature_layer,
    )
    return finished(transformers.LlavaForConditionalGeneration(config))


@pytest.mark.parametrize(("feature_layer", "unread"), [(-1, ()), (-2, (2,)), ([-3, 1], (1, 2))], ids=str)
def test_exactly_the_matrices_of_unread_blocks_get_no_gradient(feature_layer: Any, unread: tuple[int, ...]) -> None:
    from peft import get_peft_model

    model = llava(feature_layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = score(model, [llava_batch()], scope="all", stop=None, progress=False)
        everything = score(model, [llava_batch()], include=scores.module_names, stop=None, progress=False)
    marked = {module.name for module in scores.modules if module.no_place}
    assert {module.no_place for module in scores.modules if module.no_place} == ({UNREAD} if unread else set())
    assert len(marked) == 6 * len(unread)
    adapted = get_peft_model(model, everything.place(strategy="all").lora_config(r=2))
    adapted(**llava_batch()).logits.square().mean().backward()
    dead = {
        name.removeprefix("base_model.model.").split(".lora_B")[0]
        for name, weight in adapted.named_parameters()
        if "lora_B" in name and (weight.grad is None or not weight.grad.any())
    }
    assert dead == marked
    # The other blocks of the same types compete.
    assert not unread or {item.type for item in scores.no_place_by_type()} <= set(scores.types)


def test_an_encoder_may_name_the_states_itself() -> None:
    encoder = nn.Module()
    encoder.config = SimpleNamespace(feature_layer=-2, num_hidden_layers=4)
    encoder.layers = nn.ModuleList([nn.Linear(2, 2) for _ in range(4)])
    encoder.heads = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])  # of another length
    model = nn.ModuleDict({"encoder": encoder, "layers": nn.ModuleList([nn.Linear(2, 2) for _ in range(4)])})
    assert unread_blocks(list(model.named_modules())) == ("encoder.layers.3.",)
    for other in ("last", None, True, [1.5]):
        encoder.config.feature_layer = other
        assert unread_blocks(list(model.named_modules())) == ()
    encoder.config.feature_layer, encoder.config.num_hidden_layers = 1, None
    assert unread_blocks(list(model.named_modules())) == ()
