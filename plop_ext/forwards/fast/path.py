"""The fast path of one model and collector: its blocks, and the check of its kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from torch import nn

from plop_ext import ops
from plop_ext.collecting.collector import Collector
from plop_ext.collecting.fused_sums import FusedSums
from plop_ext.forwards.fast import kernels
from plop_ext.forwards.fast.binding import Bindings
from plop_ext.forwards.fast.block_audit import BlockCheck
from plop_ext.forwards.fast.blocks import FusedBlock, Handover, Projections
from plop_ext.forwards.fast.families import find_blocks

# Upper limit on repeated checks. A kernel may first become eligible on a later, larger batch.
_MOST_CHECKS = 4


class FastPath:
    """Context manager that runs the supported blocks on fused kernels, which emit the sums that scoring needs.

    Every forward passes over activations for RMSNorm with the residual add, the gated activation and the rotary
    embedding. The kernels make each of these passes once, with the roundings of the replaced modules, and also emit
    the sums of squares. Only v and the output of attention need a separate pass.

    Forwards are bound to instances, as by `kernels.kernelize`, and unbound when the context is left, also after an
    exception. All other blocks run without the kernels and are scored by the hooks of the collector, as are forwards
    that record gradients or run under autocast or in inference mode.

    Args:
        model: The scored model. Supported are the blocks of `families.FAMILIES` in float32, float16 or bfloat16,
            without user-defined hooks and forwards.
        collector: Entered before this context and left after it.

    Attributes:
        blocks: Number of blocks that use the kernels.
        reason: Reason why some or all blocks do not use the kernels; None if all do.
        checked: Whether the kernels were found to agree with the model, or are not used.
    """

    def __init__(self, model: nn.Module, collector: Collector) -> None:
        self._model = model
        self._collector = collector
        self._sums = FusedSums(collector.recording)
        self._bindings = Bindings()
        self._handover = Handover()
        self._projections = Projections()
        self._checks = 0
        self._blocks: list[FusedBlock] = []
        self._with_cache = 0
        self.reason: str | None = None
        self.blocks = 0
        self.checked = False

    def __enter__(self) -> FastPath:
        # A kernel reads the norm of the next block, which FSDP has not gathered yet, and sums whole rows, which tensor
        # parallelism divides; and a disagreement here would repeat a batch for which no other process waits.
        alone = not self._collector.recording.communicating
        found, reasons = find_blocks(self._model, self._sums.owns) if alone else ([], [])
        device = next((block.before_attention.weight.device for block in found), None)
        if device is not None and ops.STATUS.backend(device) == "pytorch":
            found, reasons = [], [f"there are no native kernels for {device.type}; see `plop doctor`"]
        if reasons:
            count = f"{len(reasons)} block{'s are' if len(reasons) > 1 else ' is'} left out"
            self.reason = f"{count}: {'; '.join(sorted(set(reasons)))}"
        elif not alone:
            self.reason = self._collector.recording.communicating
        elif not found:
            self.reason = "the model has no blocks of a family that the fast path supports"
        self._blocks = [
            FusedBlock(
                block,
                FusedSums(self._collector.recording, block.module),
                self._handover,
                self._projections,
                self._bindings,
            )
            for block in found
        ]
        self._bindings.activate()
        self.blocks = len(self._blocks)
        self.checked = not self._blocks
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    @property
    def due(self) -> bool:
        """Whether to run the next batch by `check`, because an eligible kernel has not been checked."""
        return not self.checked or (self._projections.wanted and self._checks < _MOST_CHECKS)

    def check(self, run: Callable[[], None]) -> bool:
        """Score a batch and check the kernels on it, unless no block uses the kernels in it.

        In the first and the last block of each kind, every kernel is compared with the PyTorch kernel of the same op,
        and the block also runs without the kernels. Synchronizes with the device once.

        Args:
            run: Function that calls `begin` of the collector, the forward, and `end`; it must not replay a graph.

        Returns:
            False if a comparison failed, or if no call could be compared. The batch then has to be scored again. The
            kernels are not used from then on, and `reason` gives the reason.
        """
        checks = [BlockCheck(fused, self._collector, self._bindings) for fused in self._samples()]
        before = sum(fused.fused for fused in self._blocks)
        for check in checks:
            check.attach()
        try:
            run()
        finally:
            for check in checks:
                check.detach()
        if sum(fused.fused for fused in self._blocks) == before:
            return True
        found = self._disagreement(checks)
        self.checked = True
        self._checks += 1
        self._projections.wanted = False
        self._projections.agreed |= any(check.projected for check in checks)
        if found is None:
            return True
        self._leave()
        self.reason = found
        self._collector.recording.queue.drop_last()
        return False

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Run the model without the kernels within the block, for one batch with a key-value cache."""
        self._with_cache += 1
        with self._bindings.suspended():
            yield

    def report(self) -> dict[str, Any]:
        """Return how many blocks used the kernels, and why others, or some of their calls, did not."""
        used = sum(fused.fused > 0 for fused in self._blocks) if self.blocks else 0
        reasons = [] if self.reason is None else [self.reason]
        plain = sum(fused.plain for fused in self._blocks)
        if plain and self.blocks:
            reasons.append(
                f"{plain} forwards of blocks ran without the kernels, under autocast, in inference mode, with "
                "gradients, with hooks, or on states of another type or layout than the kernels support"
            )
        elif self.blocks and not used and not self._with_cache:
            reasons.append("no batch needed a forward")
        if self._with_cache and self.blocks:
            count = f"{self._with_cache} batch{'es' if self._with_cache > 1 else ''} with a key-value cache"
            rest = " came before the first batch" if self.checked else ", and no batch"
            reasons.append(f"{count}{rest} without a cache, on which the kernels can be checked")
        return {"blocks": used, "reason": "; ".join(reasons) or None}

    def _disagreement(self, checks: list[BlockCheck]) -> str | None:
        """Return why the kernels may not be used, or None."""
        totals = self._collector.recording.queue.last()
        for check in checks:
            if check.compared and (found := check.disagreement(totals)) is not None:
                return f"the fused kernels disagree with the model: {found}"
        if self.checked:  # a repeated check, for a kernel that the first check did not see
            return None
        kinds = {_kind(check.block.module): False for check in checks}
        for check in checks:
            kinds[_kind(check.block.module)] |= check.compared > 0
        for kind, compared in kinds.items():
            if not compared:
                obstacles = [check.obstacle for check in checks if _kind(check.block.module) == kind]
                why = next(
                    (text for text in obstacles if text is not None),
                    "the batch it was to be checked on does not call it",
                )
                return f"a {kind[0].__name__} could not be checked: {why}"
        return None

    def _samples(self) -> list[FusedBlock]:
        """Return the first and the last block of each kind, and one that is eligible for `gated_projection`."""
        kinds: dict[object, list[FusedBlock]] = {}
        for fused in self._blocks:
            kinds.setdefault(_kind(fused.block.module), []).append(fused)
        chosen = [block for members in kinds.values() for block in (members[0], members[-1])]
        plain = [block for block in self._blocks if all(map(kernels.is_plain, block.block.gate_up))]
        if not any(block in plain for block in chosen):
            chosen += plain[:1]
        return list({block.block.module: block for block in chosen}.values())

    def _leave(self) -> None:
        self._bindings.deactivate()
        self._handover.clear()
        self.blocks = 0


def _kind(block: Any) -> tuple[type, object]:
    """Return the kind of a block: its class and type of attention."""
    return type(block), getattr(block.self_attn, "layer_type", None)
