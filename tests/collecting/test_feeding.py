"""Which modules read the states of another stream: told once, without hooks that stay, or at each call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from plop_ext import Collector
from plop_ext.layers import discover
from plop_ext.streams.batch import BatchStreams
from plop_ext.streams.stream import Sequences
from tests.support.stream_cases import CASES


class Mixed(nn.Module):
    """A block whose `k` reads its own rows and those of another stream."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None) -> Any:
        outputs = [self.q(hidden_states), self.k(hidden_states)]
        return outputs + ([] if encoder_hidden_states is None else [self.k(encoder_hidden_states)])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Mixed()])

    def forward(self, own: Tensor, other: Tensor | None) -> Any:
        return self.layers[0](own, encoder_hidden_states=other)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def streams(other: Tensor) -> BatchStreams:
    """Two samples of four tokens each, of which 3 and 2 count; in the other stream `other` counts."""
    own = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    return BatchStreams(2, {"text": Sequences((2, 4), own), "encoder": Sequences((2, 4), other)})


def test_a_module_that_reads_both_streams_is_asked_at_each_call_and_the_others_once() -> None:
    model = Model()
    layers = discover(model).layers
    own, other = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    with torch.no_grad(), Collector(model, layers) as collector:
        for counted in ([[1, 0, 0, 0], [1, 1, 1, 1]], [[0, 0, 0, 0], [1, 0, 0, 0]]):
            collector.announce(streams(torch.tensor(counted).bool()))
            model(own, other)
            collector.end()
            assert hooks(model) == 1
    tokens = dict(zip([layer.type for layer in layers], collector.totals().tokens.tolist(), strict=True))
    assert tokens == {"q": [3, 2, 3, 2], "k": [3 + 1, 2 + 4, 3 + 0, 2 + 1]}
    assert hooks(model) == 0


def test_a_model_that_is_fed_nothing_keeps_no_hooks_after_its_first_batch() -> None:
    model = Model()
    with torch.no_grad(), Collector(model, discover(model).layers) as collector:
        assert hooks(model) == 1
        collector.begin(2)
        model(torch.randn(2, 4, 8), None)
        collector.end()
        assert hooks(model) == 0


def test_cross_attention_keeps_no_hooks_either() -> None:
    case = CASES["t5"]
    model = case.build()
    with torch.no_grad(), Collector(model, discover(model).layers) as collector:
        assert hooks(model) > 0
        collector.begin(3)
        model(**case.batch())
        collector.end()
        assert hooks(model) == 0
