"""Contexts and snapshots that leave a model and the random generators as they were found."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from plop_ext.preserve import Snapshot, evaluating, random_state
from tests.support.tiny_models import Plain


def hooks(model: nn.Module) -> list[Any]:
    """Every table of hooks of every module, in order."""
    tables = [item for module in model.modules() for item in vars(module).items() if "hook" in item[0]]
    return [(key, list(table.items())) for key, table in tables if isinstance(table, dict)]


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_evaluating_gives_each_module_its_own_mode_back(error: type[BaseException] | None) -> None:
    model = Plain()
    for number, module in enumerate(model.modules()):
        module.training = number % 2 == 0
    before = [module.training for module in model.modules()]
    try:
        with evaluating(model):
            assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
            if error is not None:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        assert error is not None
    assert [module.training for module in model.modules()] == before and torch.is_grad_enabled()


@pytest.mark.parametrize("fails", [False, True])
def test_random_state_of_every_generator(fails: bool, device: torch.device) -> None:
    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(())), float(torch.rand((), device=device))]

    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    expected = draw()
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    try:
        with random_state():
            draw()
            torch.manual_seed(99)
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert draw() == expected


def replace_a_child(model: nn.Module) -> None:
    model.layers[0].up = nn.Linear(16, 24)
    model.layers.append(nn.Linear(16, 16))
    model.head.extra = nn.ReLU()


def hook_everything(model: nn.Module) -> None:
    up = model.layers[0].up
    up.register_forward_hook(lambda *a: None)
    up.register_forward_hook(lambda *a, **k: None, with_kwargs=True, always_call=True)
    up.register_forward_pre_hook(lambda *a, **k: None, with_kwargs=True)
    up.register_full_backward_hook(lambda *a: None)
    up.register_full_backward_pre_hook(lambda *a: None)


def change_flags(model: nn.Module) -> None:
    model.train(not model.training)
    for parameter in model.parameters():
        parameter.requires_grad_(not parameter.requires_grad)


def leave_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)


def change_buffers(model: nn.Module) -> None:
    model.get_buffer("running").add_(3)
    model.register_buffer("running", torch.zeros(1))


def set_attributes(model: nn.Module) -> None:
    model.peft_config = {}  # type: ignore[assignment]


CHANGES = [replace_a_child, hook_everything, change_flags, leave_gradients, change_buffers, set_attributes]


@pytest.mark.parametrize("change", CHANGES)
def test_a_snapshot_undoes(change: Callable[[nn.Module], None]) -> None:
    model = Plain()
    model.register_buffer("running", torch.arange(3.0))
    model.head.weight.requires_grad_(False)
    model.head.register_forward_hook(lambda *a, **k: None, with_kwargs=True)
    model.layers[0].up.weight.grad = torch.full_like(model.layers[0].up.weight, 2)
    before = {
        "hooks": hooks(model),
        "modules": list(model.named_modules()),
        "training": [module.training for module in model.modules()],
        "flags": [(p.requires_grad, None if p.grad is None else id(p.grad)) for p in model.parameters()],
        "attributes": set(vars(model)),
        "buffers": [id(buffer) for buffer in model.buffers()],
    }
    snapshot = Snapshot(model)
    change(model)
    snapshot.restore()
    assert {
        "hooks": hooks(model),
        "modules": list(model.named_modules()),
        "training": [module.training for module in model.modules()],
        "flags": [(p.requires_grad, None if p.grad is None else id(p.grad)) for p in model.parameters()],
        "attributes": set(vars(model)),
        "buffers": [id(buffer) for buffer in model.buffers()],
    } == before
    assert model.get_buffer("running").tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_widening_and_what_was_trained(dtype: torch.dtype) -> None:
    model = Plain().to(dtype)
    model.register_buffer("running", torch.arange(3.0, dtype=dtype))
    model.requires_grad_(False)
    model.head.bias.requires_grad_(True)
    values = {key: value.clone() for key, value in model.state_dict().items()}
    snapshot = Snapshot(model)
    snapshot.widen()
    snapshot.protect()
    assert all(value.dtype == torch.float32 for value in model.state_dict().values())
    with torch.no_grad():
        model.head.bias.add_(1)
    snapshot.restore_types()
    state = model.state_dict()
    assert all(state[key].dtype == dtype for key in values)
    assert torch.equal(state["head.bias"], (values["head.bias"].float() + 1).to(dtype))
    snapshot.restore()
    assert all(torch.equal(value, values[key]) and value.dtype == dtype for key, value in model.state_dict().items())
