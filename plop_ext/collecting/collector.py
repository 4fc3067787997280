"""The collector, which accumulates the sums behind every score while forwards run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType

from torch import Tensor, nn

from plop_ext.collecting import routed_experts
from plop_ext.collecting.divided import hook_of, observer_of, reduces_in_hook
from plop_ext.collecting.hooks import ExpertsObserver, Hook, ProductHook, compiled_calls, replace_attribute
from plop_ext.collecting.recording import Recording
from plop_ext.collecting.token_map import BatchTokens
from plop_ext.layers import LinearLayer, ProductAdapter, stages_group, why_communicating
from plop_ext.streams.batch import BatchStreams
from plop_ext.totals import Totals


class Collector:
    """Context manager that hooks `layers` and turns each forward into per-(layer, sample) totals.

    All state is in buffers of the collector, none on the model. Leaving the context removes every hook and restores
    the implementation of experts modules, also after an exception. The host does not synchronize with a device before
    you call `totals`. Layers may be on several devices; each device must use one stream during a batch. Under gradient
    checkpointing, the forward that is repeated in the backward does not count.

    Args:
        model: The model that contains the layers. Compiled submodules run eagerly inside the context, because hooks
            added after compilation would not run.
        layers: Layers to score (`plop_ext.layers.discover`); the parts of one module must be neighbours.
        last_call_only: Keep only the last call of a layer called several times in one forward, as the published script
            does. By default every call adds.

    Attributes:
        model: The model, as given.
        layers: The layers, as given.
        unassigned: Names of layers with rows whose sample or padding cannot be told, with the reason.
        experts_implementation: Implementation of the experts modules outside of the context; None if there are no
            experts modules.
        recording: The record to which the hooks write, for the forwards of plop_ext.

    Example:
        >>> with Collector(model, discover(model).layers) as collector:
        ...     for batch in dataloader:
        ...         collector.begin(batch_size=len(batch["input_ids"]), mask=batch["attention_mask"])
        ...         outputs = model(**batch)
        ...         collector.end()
        >>> gain = collector.totals().mean_gain  # [layers, samples]
        >>> scores = plop_ext.scores_from(collector)
    """

    def __init__(self, model: nn.Module, layers: Sequence[LinearLayer], *, last_call_only: bool = False) -> None:
        self.recording = Recording(layers, last_call_only, stages_group(model), why_communicating(model))
        self.layers = self.recording.layers
        self.unassigned = self.recording.notes.unassigned
        self.experts_implementation: str | None = None
        self.model = model
        self._stack = ExitStack()

    def __enter__(self) -> Collector:
        with ExitStack() as stack:
            for module in self.model.modules():
                for name, eager in compiled_calls(module).items():
                    replace_attribute(stack, module, name, eager)
            experts: dict[nn.Module, ExpertsObserver] = {}
            hooks: dict[nn.Module, Hook | ProductHook] = {}
            for module, layers in self.recording.layers_of.items():
                adapter = layers[0][1].adapter
                if layers[0][1].elsewhere:
                    continue
                if adapter.routed:
                    experts[module] = observer_of(self.recording, module, layers)
                elif isinstance(adapter, ProductAdapter):
                    hooks[module] = forward = ProductHook(self.recording, module, layers, adapter)
                    replace_attribute(stack, module, "forward", forward)
                else:
                    hooks[module] = hook = hook_of(self.recording, module, layers)
                    # Before all other hooks of the module, because a user-defined hook may replace the output.
                    first = not reduces_in_hook(module)
                    handle = module.register_forward_hook(hook, with_kwargs=True, prepend=first)
                    stack.callback(handle.remove)
            stack.enter_context(self.recording.feeding.watching(self.model, hooks))
            self.experts_implementation = stack.enter_context(routed_experts.observed(experts))
            stack.callback(self.recording.clear)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def begin(self, batch_size: int, mask: Tensor | None = None, *, step: int = 1, phase: int = 0) -> None:
        """Announce the next forward of a batch with one sequence per sample, which all modules read.

        Args:
            batch_size: Samples in the batch.
            mask: [B, T] bool or 0/1, which tokens count; None counts all. Reading a mask on the host does not
                synchronize.
            step: Read every `step`-th token only.
            phase: The first token read, in [0, step).
        """
        self.announce(BatchStreams.of_mask(batch_size, mask), step=step, phase=phase)

    def announce(self, streams: BatchStreams, *, step: int = 1, phase: int = 0) -> None:
        """Announce the next forward.

        Args:
            streams: The rows of the batch.
            step: Read every `step`-th row only.
            phase: The first row read, in [0, step).
        """
        self.recording.start(BatchTokens(streams, step, phase))

    def end(self) -> None:
        """Close the announced forward: reduce pending sums, and start the copy of the totals to the host."""
        self.recording.queue.send(self.recording.close())

    def totals(self) -> Totals:
        """Return the totals of all closed batches on the CPU, samples in the order of the batches. Synchronizes."""
        return Totals(self.recording.queue.all().numpy())
