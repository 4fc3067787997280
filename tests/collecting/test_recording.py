"""What hooks record to: batches inside batches, and outputs that wait for a kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plop_ext import Collector
from plop_ext.collecting.deferred_outputs import DeferredOutputs
from plop_ext.collecting.summed_inputs import SummedInputs
from plop_ext.collecting.token_map import BatchTokens
from plop_ext.layers import LinearLayer, discover
from plop_ext.streams.batch import BatchStreams
from tests.support import tiny_models
from tests.support.tiny_models import Plain

EXPORTED = {
    "model",
    "layers",
    "announce",
    "unassigned",
    "experts_implementation",
    "recording",
    "begin",
    "end",
    "totals",
}


def totals_of(model: nn.Module, *batches: Tensor) -> Tensor:
    with torch.no_grad(), Collector(model, discover(model).layers) as collector:
        for batch in batches:
            collector.begin(len(batch))
            model(batch)
            collector.end()
    return collector.recording.queue.all()


def test_the_collector_has_what_a_training_loop_needs() -> None:
    model = Plain()
    collector = Collector(model, discover(model).layers)
    assert {name for name in dir(collector) if not name.startswith("_")} == EXPORTED


def test_a_batch_goes_on_after_one_that_ran_inside_it() -> None:
    model, first, second = Plain(), torch.randn(2, 20, 16), torch.randn(3, 11, 16)
    expected, inner = totals_of(model, first), totals_of(model, second)
    found: list[Tensor] = []

    def run_another(module: nn.Module, args: Any) -> None:
        handle.remove()
        with recording.set_aside():
            assert recording.batch is None
            model(second)  # of no batch
            recording.start(BatchTokens(BatchStreams.of_mask(3, None)))
            model(second)
            found.append(recording.close())

    with torch.no_grad(), Collector(model, discover(model).layers) as collector:
        recording = collector.recording
        handle = model.layers[1].register_forward_pre_hook(run_another)
        collector.begin(2)
        model(first)
        collector.end()
    assert torch.equal(found[0], inner) and torch.equal(collector.recording.queue.all(), expected)


def test_a_forward_that_failed_inside_leaves_the_outer_batch() -> None:
    model, x = Plain(), torch.randn(2, 20, 16)
    with torch.no_grad(), Collector(model, discover(model).layers) as collector:
        collector.begin(2)
        model(x)
        with pytest.raises(RuntimeError, match="shape"), collector.recording.set_aside():
            collector.begin(2)
            model(torch.randn(2, 20, 7))
        collector.end()
    assert torch.equal(collector.recording.queue.all(), totals_of(model, x))


@pytest.fixture
def packed() -> list[LinearLayer]:
    """q, k and v of a module that is all three."""
    found = [layer for layer in discover(tiny_models.gpt2()).layers if layer.split is not None]
    return found[:3]


def test_a_part_is_told_from_the_whole_that_starts_at_its_address(packed: list[LinearLayer]) -> None:
    q, k, _ = packed
    assert q.split is not None
    rows, outs = torch.randn(6, 3 * q.out_features), [torch.empty(6) for _ in range(2)]
    outputs = DeferredOutputs()
    for out, layer in zip(outs, (q, k), strict=True):
        outputs.add(out, rows, None, layer)
    assert outputs.take(rows) is None and outputs.take(torch.randn(6, q.out_features)) is None
    found = outputs.take(q.split.select(rows, k.part))
    assert found is not None and found[0] is outs[1]
    assert outputs.take(q.split.select(rows, k.part)) is None  # once
    outputs.flush(1, 0)
    assert len(outputs) == 0
    torch.testing.assert_close(outs[0], rows[:, : q.out_features].square().sum(dim=1))


@pytest.mark.parametrize("read", ["take", "flush"])
def test_an_output_modified_while_it_waits_is_an_error(read: str, packed: list[LinearLayer]) -> None:
    rows, outputs = torch.randn(6, 3 * packed[0].out_features), DeferredOutputs()
    outputs.add(torch.empty(6), rows, None, packed[0])
    rows[0, 0] = 1.0
    arguments: tuple[Any, ...] = (rows[:, : packed[0].out_features],) if read == "take" else (1, 0)
    with pytest.raises(RuntimeError, match=rf"the output of `{packed[0].name}` was modified in place"):
        getattr(outputs, read)(*arguments)


def test_an_input_is_known_until_it_is_modified() -> None:
    inputs, x = SummedInputs(), torch.randn(3, 4)
    inputs.add(x, 7)
    assert inputs.find(x) == 7 and inputs.find(x.clone()) is None and inputs.find(x.view(3, 4)) is None
    x.mul_(2)
    assert inputs.find(x) is None
    with torch.inference_mode():
        counts_nothing = torch.randn(3, 4)
        inputs.add(counts_nothing, 7)
        assert inputs.find(counts_nothing) is None
