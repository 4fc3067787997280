"""Forwards as CUDA graphs: one launch for a whole forward, its hooks and reductions included."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from plop_ext._warnings import warn
from plop_ext.collecting.collector import Collector
from plop_ext.collecting.token_map import BatchTokens
from plop_ext.collecting.transfer import overwrite
from plop_ext.errors import InputError
from plop_ext.forwards.batch import batch_to_device, input_device
from plop_ext.forwards.eager import EagerForwards
from plop_ext.forwards.graph import capture
from plop_ext.forwards.graph.inputs import Ungraphable, launch_key, on_device, tensors
from plop_ext.forwards.masks.decide import UnknownMasks, decided_masks, without_all_ones_masks
from plop_ext.forwards.masks.known_models import runs_library_code
from plop_ext.forwards.rule import GraphRule
from plop_ext.streams.batch import BatchStreams

# A graph keeps its launches on the device, in memory that torch does not count, and a capture takes as long as several
# forwards. Eight graphs suffice for the phases of `token_step=8`, or for eight lengths; data with more lengths rarely
# repeat one.
MAX_GRAPHS = 8
# Kinds of batches that are remembered after their eager trial. Each keeps its token maps, one byte per token.
_REMEMBERED = 64


@dataclass
class _EagerTrial:
    """A kind of batch that ran eagerly `times` times; `wait` is where it synchronized with the device, or None."""

    tokens: BatchTokens
    wait: str | None
    times: int = 1


@dataclass
class _Graph:
    """A captured forward: its inputs, its replay, and its result."""

    inputs: list[Tensor]
    tokens: BatchTokens
    replay: Callable[[], None]
    totals: Tensor


class GraphedForwards:
    """Context manager that runs scoring forwards, and replays those of a kind that it has run before.

    Two forwards are of one kind if they launch the same kernels: they have the same shapes and types, the same first
    token read, and either both or neither have a mask. The first forward of a kind runs eagerly, which fills every
    cache and shows whether the forward synchronizes; the second is captured and replayed, and all later ones are
    replayed. Totals are bitwise identical to eager ones. Batches that cannot be captured run eagerly, for a reason
    that `report` gives. A forward that synchronizes, or a failed capture, ends graphing with a warning.

    All graphs share one memory pool, which holds the activations of one forward, because they run one after the other.

    Args:
        model: Prepared for scoring, on a CUDA device.
        forward: Function that runs a batch. A replay does not call its Python code.
        collector: Entered.
        plain: Whether `forward` is `default_forward`. Only in this case, and only for a model that
            `runs_library_code`, plop_ext can predict the masks of a batch. Any other model that reads their values
            synchronizes, as transformers' own models do, and is not captured.
        decides_masks: As for `EagerForwards`, which runs the batches that no rule admits.
        rule: When to capture in a run that did not ask for graphs, and is not warned of what prevents them; None
            captures every kind at its second batch.

    Attributes:
        reason: The reason why forwards are no longer graphed; None while they are.
        replayed: Number of replayed batches.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[[nn.Module, Any], Any],
        collector: Collector,
        *,
        plain: bool = False,
        decides_masks: bool = False,
        rule: GraphRule | None = None,
    ) -> None:
        self._model = model
        self._forward = forward
        self._collector = collector
        self._plain = plain and runs_library_code(model)
        self._rule = rule
        # A run that asked for graphs shows by its eager batches what a capture would meet.
        self._eager = EagerForwards(model, forward, collector, decides_masks=decides_masks and rule is not None)
        self._device = input_device(model)
        self._recorder = capture.Recorder(self._device)
        self._trials: dict[Hashable, _EagerTrial] = {}
        self._graphs: dict[Hashable, _Graph] = {}
        self._left_out: str | None = None
        self.reason: str | None = None
        self.replayed = 0
        devices = sorted({str(parameter.device) for parameter in model.parameters()})
        if len(devices) > 1:
            self._stop(f"the weights are on several devices ({', '.join(devices)}), and a graph runs on a single one")
        elif collector.recording.communicating:
            self._stop(collector.recording.communicating)

    def __enter__(self) -> GraphedForwards:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def run(self, batch: Any, streams: BatchStreams, *, step: int = 1, phase: int = 0) -> None:
        """Score a batch; see `Forwards.run`."""
        if self._rule is not None and not self._rule.admits(batch):
            self._left_out = f"batches of more than {self._rule.tokens} tokens run eagerly"
            self._eager.run(batch, streams, step=step, phase=phase)
            return
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            inputs = without_all_ones_masks(batch) if self._plain and self.reason is None else batch
            key = self._key(inputs, streams.samples, step, phase)
            graph = self._graphs.get(key)
            if key is not None and graph is None:
                trial = self._trials.get(key)
                if trial is None or trial.wait is not None:
                    self._try_eagerly(key, inputs, BatchTokens(streams, step, phase))
                    return
                if self._rule is not None and trial.times + 1 < self._rule.occurrence(streams.samples):
                    trial.times += 1
                elif len(self._graphs) < MAX_GRAPHS:
                    graph = self._capture(key, inputs, streams)
                else:
                    self._left_out = f"there are more than {MAX_GRAPHS} kinds of batches; the others ran eagerly"
            if graph is not None and graph.tokens.fits(streams):
                self._replay(graph, inputs, streams)
            else:
                self._eager.run(batch, streams, step=step, phase=phase)

    def forget(self) -> None:
        """Drop all graphs and trials, because the model runs other code from now on.

        The next batch of each kind runs eagerly again. `replayed` and the number of captured graphs keep counting.
        """
        self._release()

    def report(self) -> dict[str, Any]:
        """Return the entry `graph`: the numbers of graphs and of replayed batches, and why others were not."""
        reason = self.reason or self._left_out
        if reason is None and not self.replayed:
            reason = "no batch had the shapes, the phase and the kind of mask of an earlier one"
        graph = {"captured": self._recorder.captured, "replayed": self.replayed, "reason": reason}
        return {"fast": None, "graph": graph}

    def _key(self, inputs: Any, samples: int, step: int, phase: int) -> Hashable | None:
        if self.reason is not None:
            return None
        try:
            return launch_key(inputs), samples, step, phase
        except Ungraphable as error:
            self._left_out = str(error)
            return None

    def _try_eagerly(self, key: Hashable, inputs: Any, tokens: BatchTokens) -> None:
        """Run a batch eagerly, on the code path of a capture."""
        before = self._trials.pop(key, None)
        inputs = batch_to_device(inputs, self._device)
        with ExitStack() as stack:
            try:
                stack.enter_context(decided_masks(inputs, self._plain))
            except UnknownMasks as error:
                self._stop(str(error))
            waits = stack.enter_context(capture.noting_waits(self._device))
            self._collector.recording.start(tokens)
            self._forward(self._model, inputs)
            self._collector.end()
        if self.reason is not None:
            return
        wait = waits[0] if waits else None
        if wait is not None and before is not None:  # the first time may be due to an empty cache
            self._stop(f"the forward synchronizes with the device ({wait}), which a capture cannot")
            return
        while len(self._trials) >= _REMEMBERED:
            self._trials.pop(next(iter(self._trials)))
        self._trials[key] = _EagerTrial(tokens, wait)

    def _capture(self, key: Hashable, inputs: Any, streams: BatchStreams) -> _Graph | None:
        """Return the graph of a batch after an eager trial; if the capture fails, end graphing and return None."""
        tokens = self._trials[key].tokens
        if not tokens.fits(streams):
            return None
        del self._trials[key]
        tokens.refill(streams)
        static = on_device(inputs, self._device)

        def forward() -> Tensor:
            with decided_masks(static, self._plain):
                self._collector.recording.start(tokens)
                # A copy, because the model may change the batch.
                self._forward(self._model, batch_to_device(static, self._device))
                return self._collector.recording.close()

        try:
            with self._collector.recording.set_aside():
                replay, totals = self._recorder.record(forward)
        except Exception as error:
            self._stop(f"the forward cannot be captured ({capture.cause(error)})")
            return None
        self._graphs[key] = graph = _Graph(tensors(static), tokens, replay, totals)
        return graph

    def _replay(self, graph: _Graph, inputs: Any, streams: BatchStreams) -> None:
        for target, source in zip(graph.inputs, tensors(inputs), strict=True):
            overwrite(target, source)
        graph.tokens.refill(streams)
        graph.replay()
        self._collector.recording.queue.send(graph.totals)
        self.replayed += 1

    def _stop(self, reason: str) -> None:
        self.reason = reason
        self._release()
        if self._rule is None:
            warn(f"`graph`: batches are scored eagerly, because {reason}")

    def _release(self) -> None:
        self._graphs.clear()
        self._trials.clear()
        self._recorder.release()


def check_graph(model: nn.Module) -> None:
    """Check that the model is on a CUDA device.

    Raises:
        InputError: If it is not.
    """
    devices = {parameter.device.type for parameter in model.parameters()} or {"cpu"}
    if "cuda" not in devices:
        raise InputError(
            f"`graph` needs the model on a CUDA device, and it is on {' and '.join(sorted(devices))}; move it there, "
            "or leave `graph` out"
        )
