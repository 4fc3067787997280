"""Over the classes of transformers: what is placed is what PEFT wraps, and what it saves is what it loads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from plop_ext.errors import InputError
from plop_ext.layers import discover
from plop_ext.placement.peft import adapters
from tests.support.meta_models import class_names, config_class, models

_EXPERTS = {"experts.gate_up_proj", "experts.down_proj"}
_SHARED_EXPERTS = {f"shared_experts.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj")}
# The modules whose values PEFT 0.21 loses by the rules of transformers 5.24, by the type of the model.
LOST = {
    "inkling2": {"sconv.weight_proj"},
    "inkling2_text": {"sconv.weight_proj"},
    "inkling2_loop": {"sconv.weight_proj"},
    "inkling2_loop_text": {"sconv.weight_proj"},
    "laguna": _SHARED_EXPERTS,
    "mistral_large4": _EXPERTS | _SHARED_EXPERTS,
    "mistral_large4_text": _EXPERTS | _SHARED_EXPERTS,
    "unlimited_ocr": {
        *_EXPERTS,
        *_SHARED_EXPERTS,
        *(f"self_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj", "o_proj")),
        *(f"mlp.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj")),
    },
}


def renamed_classes() -> Iterator[tuple[str, nn.Module]]:
    """One class of each type with names of old: one that generates, or else the first with a head."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    by_config: dict[type, list[str]] = {}
    for name in class_names():
        config = config_class(name)
        if config is not None and get_checkpoint_conversion_mapping(config.model_type) is not None:
            by_config.setdefault(config, []).append(name)
    chosen = [
        min(names, key=lambda name: (not re.search("Generation|CausalLM", name), name.endswith("Model"), name))
        for names in by_config.values()
    ]
    yield from models(sorted(chosen))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_is_placed_is_wrapped_and_keeps_its_names() -> None:
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    lost: dict[str, set[str]] = {}
    checked = 0
    for name, model in renamed_classes():
        try:
            targets = {layer.target.name: layer.target for layer in discover(model, scope="all").layers}
        except InputError:
            continue
        for target in targets.values():
            if "renames" in target.refused:
                module = re.sub(r"\.weight$", "", target.name)
                lost.setdefault(model.config.model_type, set()).add(".".join(module.split(".")[-2:]))
        placed = {name: target.parameter for name, target in targets.items() if not target.refused}
        if not placed:
            continue
        config: Any = LoraConfig(
            r=2,
            target_modules=[name for name, parameter in placed.items() if not parameter],
            target_parameters=[name for name, parameter in placed.items() if parameter] or None,
        )
        with torch.device("meta"):
            adapted = get_peft_model(model, config)
        assert adapters(adapted)["default"] == set(placed), name
        saved = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        assert len(saved) == 2 * len(placed), name
        loaded = convert_peft_adapter_state_dict_for_transformers(adapted, config, dict(saved))
        assert all(loaded.get(key) is value for key, value in saved.items()), name
        checked += 1
    assert checked > 100
    assert lost == LOST
