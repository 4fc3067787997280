"""Llamas called by, or calling, user-defined code that needs the attention mask even if it is all ones."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn


def needing_a_mask(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which fails where it is given no mask."""

    def needing(*args: Any, attention_mask: Tensor, **kwargs: Any) -> Any:
        assert attention_mask.sum() > 0
        return function(*args, attention_mask=attention_mask, **kwargs)

    return needing


class Around(nn.Module):
    """A user-defined module that looks like a model of PEFT."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config

    def get_base_model(self) -> Any:
        return self.inner

    def forward(self, **inputs: Any) -> Any:
        return needing_a_mask(self.inner)(**inputs)


def with_a_head(inner: nn.Module, model: Any) -> nn.Module:
    """A causal language model of the configuration of `model`, with `inner` in it."""
    import transformers

    outer = transformers.LlamaForCausalLM(model.config).eval().to(model.device)
    outer.model = inner
    return outer


def of_a_class_of_the_users(model: Any, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    model.__class__ = type(
        "Pooled", (type(model),), {"forward": needing_a_mask(type(model).forward), "__module__": "pooled"}
    )
    return model


def with_a_class_of_the_users_inside(model: Any, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    return with_a_head(of_a_class_of_the_users(model, monkeypatch), model)


def with_a_forward_of_the_users(model: Any, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    model.forward = needing_a_mask(model.forward)
    return model


def with_a_patched_class(model: Any, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.setattr(type(model), "forward", needing_a_mask(type(model).forward))
    return model


def with_a_hook_before(model: Any, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        assert kwargs["attention_mask"].sum() > 0

    model.register_forward_pre_hook(look, with_kwargs=True)
    return model


def with_a_hook_behind(model: Any, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    def look(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        assert kwargs["attention_mask"].sum() > 0

    model.register_forward_hook(look, with_kwargs=True)
    return model


def with_a_mask_function_of_the_users(model: Any, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    import transformers.masking_utils

    makers = transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    monkeypatch.setitem(makers._local_mapping, "sdpa", needing_a_mask(makers["sdpa"]))
    return model


def with_a_wrapped_mask_function(model: Any, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    import transformers.masking_utils

    makers = transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    wrapped = functools.wraps(makers["sdpa"])(needing_a_mask(makers["sdpa"]))  # with the name and module of that one
    monkeypatch.setitem(makers._local_mapping, "sdpa", wrapped)
    return model


def with_patched_mask_making(model: Any, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    modeling = sys.modules[type(model).__module__]
    monkeypatch.setattr(modeling, "create_causal_mask", needing_a_mask(modeling.create_causal_mask))
    return model


def with_a_module_of_the_users_on_the_way(model: Any, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    return with_a_head(Around(model), model)


class Trunk(nn.Module):
    """A user-defined decoder, made of transformers' blocks."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.embed_tokens, self.rotary_emb = inner.embed_tokens, inner.rotary_emb
        self.layers, self.norm = inner.layers, inner.norm

    def forward(self, input_ids: Tensor, **inputs: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        assert inputs["attention_mask"].sum() > 0
        x = self.embed_tokens(input_ids)
        places = torch.arange(x.shape[1], device=x.device)[None]
        turned = self.rotary_emb(x, places)
        for layer in self.layers:
            x = layer(x, attention_mask=None, position_ids=places, position_embeddings=turned)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x))


def with_a_trunk_of_the_users(model: Any, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    return with_a_head(Trunk(model), model)


def with_a_hook_on_the_tuner(model: Any, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    import peft

    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")  # without a task it is passed by
    adapted = peft.get_peft_model(with_a_head(model, model), config)
    with_a_hook_before(adapted.base_model, monkeypatch)
    return adapted


def within_a_model_of_the_users(model: Any, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    return Around(model)


# Each takes a Llama, and returns what it has become.
MASK_USERS: list[Callable[[Any, pytest.MonkeyPatch], nn.Module]] = [
    of_a_class_of_the_users,
    with_a_class_of_the_users_inside,
    with_a_forward_of_the_users,
    with_a_patched_class,
    with_a_hook_before,
    with_a_hook_behind,
    with_a_mask_function_of_the_users,
    with_a_wrapped_mask_function,
    with_patched_mask_making,
    with_a_module_of_the_users_on_the_way,
    with_a_trunk_of_the_users,
    with_a_hook_on_the_tuner,
    within_a_model_of_the_users,
]
