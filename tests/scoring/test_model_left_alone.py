"""`score` restores a model, also after an exception: hooks, modes, states, compiled calls."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import plop_ext
from tests.support import tiny_models
from tests.support.model_state import assert_unchanged, state
from tests.support.tiny_models import Plain, token_batch


def rng() -> list[Any]:
    """Draws from every generator: equal states give equal draws."""
    found = [random.random(), float(np.random.rand()), float(torch.rand(()))]
    return [*found, float(torch.rand((), device="cuda"))] if torch.cuda.is_available() else found


def seed(value: int) -> None:
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


class Fails(nn.Module):
    """A block that raises in its second forward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 2:
            raise RuntimeError("the model broke down")
        return x


def prepared(model: nn.Module) -> nn.Module:
    """The model with modes that differ between modules, a frozen weight, hooks of its own, and a gradient."""
    modules = list(model.modules())
    for number, module in enumerate(modules):
        module.training = number % 3 == 0
    linear = next(module for module in modules if isinstance(module, nn.Linear))
    linear.weight.requires_grad_(False)
    linear.register_forward_hook(lambda module, args, output: None)
    linear.register_forward_hook(lambda module, args, kwargs, output: None, with_kwargs=True, always_call=True)
    linear.register_forward_pre_hook(lambda module, args: None)
    linear.register_full_backward_hook(lambda module, grad_in, grad_out: None)
    return model


@pytest.mark.parametrize("settings", [{}, {"baseline": "probe"}, {"compat": "paper-script"}], ids=str)
def test_after_scoring(settings: dict[str, Any], device: torch.device) -> None:
    model = prepared(tiny_models.llama(attention_dropout=0.3).to(device))
    batch = {key: value.to(device) for key, value in token_batch([20, 31]).items()}
    before = state(model)
    seed(7)
    expected = rng()
    seed(7)
    plop_ext.score(model, [batch], progress=False, **settings)
    assert rng() == expected
    assert_unchanged(before, model)
    assert torch.is_grad_enabled()


def broken_forward(model: nn.Module) -> tuple[nn.Module, Any]:
    model.layers.append(Fails())
    return model, [torch.randn(2, 20, 16)] * 3


def broken_data(model: nn.Module) -> tuple[nn.Module, Any]:
    def stream() -> Any:
        yield torch.randn(2, 20, 16)
        raise RuntimeError("the data broke down")

    return model, stream()


def broken_hook(model: nn.Module) -> tuple[nn.Module, Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        raise RuntimeError("the hook broke down")

    model.layers[1].up.register_forward_hook(hook)
    return model, [torch.randn(2, 20, 16)]


def interrupted(model: nn.Module) -> tuple[nn.Module, Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        raise KeyboardInterrupt

    model.layers[1].up.register_forward_hook(hook)
    return model, [torch.randn(2, 20, 16)]


@pytest.mark.parametrize("broken", [broken_forward, broken_data, broken_hook, interrupted])
def test_after_an_exception(broken: Callable[[nn.Module], tuple[nn.Module, Any]]) -> None:
    model, data = broken(prepared(Plain()))
    model.layers[0].compile(backend="eager")
    before = state(model)
    calls = [module for module in model.modules() if isinstance(module, Fails)]
    seed(1)
    expected = rng()
    seed(1)
    with pytest.raises((RuntimeError, KeyboardInterrupt)):
        plop_ext.score(model, data, progress=False)
    assert rng() == expected
    for module in calls:
        module.calls = 0
    assert_unchanged(before, model)
    assert torch.is_grad_enabled()
    with torch.no_grad():
        assert plop_ext.score(Plain(), [torch.randn(2, 20, 16)], progress=False).modules


def test_a_shuffling_dataloader_goes_on_as_if_nothing_had_been_scored() -> None:
    data = torch.arange(20, dtype=torch.float32)[:, None, None].expand(20, 20, 16)
    model, loader = Plain(), torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
    torch.manual_seed(3)
    expected = [batch[:, 0, 0].tolist() for batch in loader]
    torch.manual_seed(3)
    plop_ext.score(model, loader, progress=False)
    assert [batch[:, 0, 0].tolist() for batch in loader] == expected


def test_compiled_models_are_scored_right_and_stay_compiled() -> None:
    compilations = 0

    def backend(graph: Any, example_inputs: Any) -> Any:
        nonlocal compilations
        compilations += 1
        return graph

    batch = token_batch([20, 31])
    del batch["labels"]
    expected = plop_ext.score(tiny_models.llama(), [batch], progress=False)
    for regional in (False, True):
        model = tiny_models.llama()
        if regional:
            for layer in model.model.layers:
                layer.compile(backend=backend)
        called: Any = model if regional else torch.compile(model, backend=backend)
        with torch.no_grad():
            called(**batch, use_cache=False)
        before, done = state(model), compilations
        assert done > 0
        scores = plop_ext.score(called, [batch], progress=False)
        assert scores.module_names == expected.module_names
        np.testing.assert_allclose(scores.nfn, expected.nfn, rtol=1e-6)
        assert_unchanged(before, model)
        with torch.no_grad():
            called(**batch, use_cache=False)
        assert compilations == done  # neither scored compiled nor compiled again
        compilations = 0
