"""The streamed run: all batches through one block after another."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from plop_ext.collecting.collector import Collector
from plop_ext.errors import InputError
from plop_ext.forwards.batch import batch_to_device, listed_ids, take_sample_ids
from plop_ext.progress import progress_bar
from plop_ext.score_data.settings import Settings
from plop_ext.scoring.baseline import WeightNorms, compute_baselines
from plop_ext.scoring.outcome import Outcome
from plop_ext.streaming.blocks import BlockLoader, LoadedBlock
from plop_ext.streaming.plan import Extent
from plop_ext.streaming.recorders import Calls, Result, learn_result, record
from plop_ext.streaming.skeleton import Skeleton
from plop_ext.streaming.state import State
from plop_ext.streaming.store import Store
from plop_ext.streaming.weights import Weights
from plop_ext.streams.batch import BatchStreams, StreamReader
from plop_ext.totals import Totals


@dataclass(frozen=True)
class Batch:
    """A batch on the CPU, and its rows.

    Attributes:
        inputs: Inputs of the model.
        streams: Its rows.
        phase: The first row read.
        extent: Samples and tokens.
    """

    inputs: Any
    streams: BatchStreams
    phase: int
    extent: Extent


@dataclass
class RunData:
    """All batches of a run, with the id and the batch of each sample."""

    batches: list[Batch] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)


def join(results: Sequence[dict[str, Any]], data: RunData) -> Outcome:
    """Join the results of all blocks, in their order."""
    implementations = [result["experts_implementation"] for result in results]
    return Outcome(
        totals=Totals.join_modules([Totals(result["totals"].numpy()) for result in results]),
        norms=WeightNorms(
            [norm for result in results for norm in result["norms"]],
            {name: why for result in results for name, why in result["failures"].items()},
        ),
        baselines=[value for result in results for value in result["values"]],
        ids=data.ids,
        batches=data.numbers,
        unassigned={name: why for result in results for name, why in result["unassigned"].items()},
        experts_implementation=next((name for name in implementations if name), None),
    )


def collect_batches(dataloader: Iterable[Any], settings: Settings, reader: StreamReader) -> RunData:
    """Read the batches and their rows, up to the one that completes `settings.max_samples`."""
    phases = random.Random(settings.seed)
    found = RunData()
    for number, batch in enumerate(dataloader):
        inputs, sample_ids = take_sample_ids(batch)
        streams = reader.read(inputs)
        size = streams.samples
        phase = phases.randrange(settings.token_step)
        found.batches.append(Batch(inputs, streams, phase, _extent(inputs, size)))
        found.ids += listed_ids(sample_ids, len(found.ids), size)
        found.numbers += [number] * size
        if settings.max_samples is not None and len(found.ids) >= settings.max_samples:
            break
    if not found.batches:
        raise InputError("`dataloader` is empty; give it at least one batch")
    return found


class Stream:
    """A streamed run.

    Args:
        skeleton: The model.
        weights: Its checkpoint.
        batches: The data.
        settings: The settings of the run.
        device: Device of the run.
        store: Store of the hidden states.
        state: State in which finished blocks are recorded, or None.

    Attributes:
        loader: Loads the blocks.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        weights: Weights,
        batches: Sequence[Batch],
        settings: Settings,
        device: torch.device,
        store: Store,
        state: State | None,
    ) -> None:
        self._skeleton = skeleton
        self._batches = batches
        self._settings = settings
        self._device = device
        self._store = store
        self._state = state
        self._calls: list[Calls] = []
        self._first: LoadedBlock | None = None
        self._first_baselines: list[float] | None = None
        self.loader = BlockLoader(skeleton, weights, device)

    def run(self, forward: Callable[[nn.Module, Any], Any], finished: int, progress: bool) -> list[dict[str, Any]]:
        """Run all blocks after the first `finished` ones, whose results are in the state; return all results."""
        results = []
        blocks = self._skeleton.last + 1
        with progress_bar("streaming blocks", blocks, progress) as advance:
            for index in range(finished):
                assert self._state is not None
                results.append(self._state.result(index))
            advance(finished)
            if finished == blocks:
                return results
            self._record(forward)
            if finished:
                self._first = self._first_baselines = None
                self._continue_from(finished - 1)
            self.loader.drop_outside()
            began = time.perf_counter()
            read = self.loader.reader.bytes_read
            for block in self._loaded(finished):
                results.append(self._run_block(block))
                done = block.index + 1 - finished
                seconds = time.perf_counter() - began
                tokens = sum(batch.extent.rows for batch in self._batches) * done / blocks
                rate = (self.loader.reader.bytes_read - read) / seconds / 1e9
                advance(1, note=f"{tokens / seconds:,.0f} tokens/s, {rate:.2f} GB/s read")
                del block
        return results

    def _record(self, forward: Callable[[nn.Module, Any], Any]) -> None:
        """Record the arguments of each block in each batch, and store the hidden states of the first block."""
        model = self._skeleton.model
        self.loader.load_outside()
        self.loader.start(0)
        self._first = self.loader.wait()
        # Before any forward, as in memory: the first one may store a weight in another form.
        self._first_baselines = compute_baselines(self._first.layers, self._first.norms, self._settings)
        result: Result | None = None
        for number, batch in enumerate(self._batches):
            inputs = batch_to_device(batch.inputs, self._device)

            def run(inputs: Any = inputs) -> None:
                forward(model, inputs)

            if result is None:
                result = learn_result(run, self._skeleton, self._first.module)
            hidden, calls = record(run, self._skeleton, result, to_the_end=number == 0)
            self._store.put(f"arguments-{number}", calls.tensors)
            self._store.put(f"hidden-{number}", [hidden])
            calls.tensors = []
            self._calls.append(calls)

    def _continue_from(self, block: int) -> None:
        """Load the hidden states and shared objects of all batches after `block`."""
        assert self._state is not None
        for number, calls in enumerate(self._calls):
            hidden, shared = self._state.load_hidden(block, number, self._device)
            self._store.put(f"hidden-{number}", hidden)
            for mine, saved in zip(calls.shared, shared, strict=False):
                mine.update(saved)

    def _loaded(self, start: int) -> Iterator[LoadedBlock]:
        """Yield the blocks from number `start` on; while one is in use, the next is being loaded."""
        if self._first is None:
            self.loader.start(start)
        for index in range(start, self._skeleton.last + 1):
            block = self._first or self.loader.wait()
            self._first = None
            if index < self._skeleton.last:
                self.loader.start(index + 1)
            yield block
            del block

    def _run_block(self, block: LoadedBlock) -> dict[str, Any]:
        """Run all batches through `block` and collect the totals of its layers."""
        values, self._first_baselines = self._first_baselines, None
        if values is None:
            values = compute_baselines(block.layers, block.norms, self._settings)
        last = block.index == self._skeleton.last
        writes = self._state is not None and not last and self._state.is_due()
        collector = Collector(block.module, block.layers)
        with collector:
            for number, (batch, calls) in enumerate(zip(self._batches, self._calls, strict=True)):
                (hidden,) = self._store.get(f"hidden-{number}")
                arguments = self._store.get(f"arguments-{number}")
                collector.announce(batch.streams, step=self._settings.token_step, phase=batch.phase)
                hidden = Result.hidden(calls.call(block.module, block.index, hidden, arguments))
                collector.end()
                if not last:
                    self._store.put(f"hidden-{number}", [hidden])
                    if self._state is not None and writes:
                        self._state.save_hidden(block.index, number, [hidden], calls.shared)
                del hidden
        result = {
            "totals": collector.recording.queue.all(),
            "norms": block.norms.values,
            "failures": block.norms.failures,
            "values": values,
            "unassigned": collector.unassigned,
            "experts_implementation": collector.experts_implementation,
        }
        if self._state is not None:
            self._state.finish(block.index, result, written=writes or last)
        return result


@contextmanager
def streaming(stream: Stream, store: Store) -> Iterator[None]:
    """Release threads, buffers and temporary files after the block."""
    try:
        yield
    finally:
        stream.loader.close()
        store.close()


def _extent(inputs: Any, samples: int) -> Extent:
    """Return samples and tokens of a batch: the extents of its token ids, or of its first tensor with two or more."""
    fields = (
        inputs if isinstance(inputs, Mapping) else dict(enumerate(inputs)) if isinstance(inputs, (tuple, list)) else {}
    )
    values = [fields.get("input_ids"), *fields.values(), inputs]
    shape = next((value.shape for value in values if isinstance(value, Tensor) and value.dim() >= 2), (samples, 1))
    return Extent(samples, int(shape[1]))
