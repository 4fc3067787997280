"""Forwards of the fast path make no host wait for the values of masks; all others run as the model has it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import plop_ext
from plop_ext import ops
from plop_ext.layers import discover
from plop_ext.scoring import capture
from plop_ext.scoring.batch import default_forward
from plop_ext.scoring.collector import Collector
from plop_ext.scoring.forwards import EagerForwards
from tests.fast_models import FAMILIES, batches, make

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 16 counted tokens")
needs_native = pytest.mark.skipif(not ops.STATUS.loaded, reason="the fast path needs the native kernels")


def looked(*unused: Any) -> Any:
    raise AssertionError("the value of a tensor was looked at")


def seen_masks(model: nn.Module) -> list[Any]:
    """Gets what the first attention of the model is given as its mask, call by call."""
    seen: list[Any] = []
    attention = next(module for name, module in model.named_modules() if name.endswith("self_attn"))
    attention.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    return seen


def scored(model: nn.Module, batch: dict[str, Any], decides: bool) -> Tensor:
    layers = discover(model).layers
    with Collector(model, layers) as collector, torch.no_grad():
        forward = default_forward(model, [layer.module for layer in layers])
        forwards = EagerForwards(model, forward, collector, decides_masks=decides)
        forwards.run(batch, len(batch["input_ids"]), torch.ones_like(batch["input_ids"], dtype=torch.bool))
        return collector.totals()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_decided_masks_are_those_of_the_model(family: str, padded: bool, device: torch.device) -> None:
    model, batch = make(family, device=device), batches(1, padded=padded)[0]
    seen = seen_masks(model)
    expected = scored(model, batch, decides=False)
    assert torch.equal(scored(model, batch, decides=True), expected)
    ours, theirs = seen[1], seen[0]
    assert (ours is None) == (theirs is None)
    assert ours is None or torch.equal(ours, theirs)


@pytest.mark.parametrize("padded", [False, True])
def test_no_value_on_the_device_is_looked_at(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make("llama"), batches(1, padded=padded)[0]
    layers = discover(model).layers

    def forward(model: nn.Module, inputs: Any) -> None:
        with monkeypatch.context() as patched:
            for method in ("__bool__", "item", "tolist"):
                patched.setattr(Tensor, method, looked)
            default_forward(model, [])(model, inputs)

    with Collector(model, layers) as collector, torch.no_grad():
        for decides in (True, False):
            forwards = EagerForwards(model, forward, collector, decides_masks=decides)
            if decides:
                forwards.run(batch, 3, None)
            else:
                with pytest.raises(AssertionError, match="looked at"):
                    forwards.run(batch, 3, None)


def test_positions_mean_what_they_mean_to_the_model() -> None:
    model = make("llama")
    seen = seen_masks(model)
    batch = batches(1, padded=False)[0] | {"position_ids": torch.arange(12).remainder(6).expand(3, 12)}
    expected = scored(model, batch, decides=False)
    assert torch.equal(scored(model, batch, decides=True), expected)
    assert seen == [None, None]  # a mask of ones says that they are one sample
    expected = scored(model, batch | {"attention_mask": None}, decides=False)
    assert torch.equal(scored(model, batch | {"attention_mask": None}, decides=True), expected)
    assert seen[3] is not None and torch.equal(seen[2], seen[3])


def test_a_transformers_that_decides_elsewhere_looks_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import masking_utils

    model, batch = make("llama"), batches(1)[0]
    expected = scored(model, batch, decides=False)
    monkeypatch.delattr(masking_utils, "find_packed_sequence_indices")
    monkeypatch.setattr(
        masking_utils, "__getattr__", lambda name: (_ for _ in ()).throw(AttributeError(name)), raising=False
    )
    layers = discover(model).layers
    seen: list[Any] = []
    with Collector(model, layers) as collector:
        forwards = EagerForwards(model, lambda model, inputs: seen.append(inputs), collector, decides_masks=True)
        for _ in range(2):
            forwards.run(batch, 3, None)
    assert [inputs["attention_mask"] is not None for inputs in seen] == [True, True]
    monkeypatch.undo()
    assert torch.equal(scored(model, batch, decides=True), expected)


@needs_native
@pytest.mark.parametrize(
    "fast, own, decides", [(True, False, True), (False, False, False), (True, True, False)], ids=str
)
def test_only_the_fast_path_decides(
    fast: bool, own: bool, decides: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another family may make something else of no mask, and a forward of the user's may need it."""
    made: list[bool] = []
    start = EagerForwards.__init__

    def noted(self: EagerForwards, *args: Any, decides_masks: bool = False) -> None:
        made.append(decides_masks)
        start(self, *args, decides_masks=decides_masks)

    monkeypatch.setattr(EagerForwards, "__init__", noted)
    model, data = make("llama", device=device), batches()
    given = {"forward": lambda model, batch: model(**batch)} if own else {}
    scores = plop_ext.score(model, data, fast=fast, progress=False, max_samples=None, **given)
    assert made == [decides]
    plain = plop_ext.score(model, data, progress=False, max_samples=None)
    np.testing.assert_array_equal(scores.totals[:, :, 2:], plain.totals[:, :, 2:])


@needs_native
def test_an_unknown_family_is_given_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    config = transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    seen: list[Any] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True)
    with pytest.warns(UserWarning, match="fast"):
        plop_ext.score(model, batches(padded=False), fast=True, progress=False, max_samples=None)
    assert seen and all(mask is not None for mask in seen)


@pytest.mark.gpu
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_host_never_waits_in_a_fast_forward(family: str, padded: bool, device: torch.device) -> None:
    from plop_ext.fast import FastPath

    model, data = make(family, torch.bfloat16, device), batches(3, padded=padded)
    layers = discover(model).layers
    with Collector(model, layers) as collector, FastPath(model, collector) as path, torch.no_grad():
        forward = default_forward(model, [layer.module for layer in layers])
        forwards = EagerForwards(model, forward, collector, decides_masks=True)
        path.first_batch(lambda: forwards.run(data[0], 3, data[0]["attention_mask"].bool()))
        assert path.blocks == 4
        forwards.run(data[1], 3, data[1]["attention_mask"].bool())  # the first may fill caches
        with capture.noting_waits(device) as waits:
            forwards.run(data[2], 3, data[2]["attention_mask"].bool())
    assert waits == []
