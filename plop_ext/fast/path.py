"""The fast path of one model and collector: which blocks take it, and whether they may."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import nn

from plop_ext import ops
from plop_ext.errors import InputError
from plop_ext.fast.binding import Bindings
from plop_ext.fast.check import BlockCheck, disagreement
from plop_ext.fast.families import find_blocks
from plop_ext.fast.forwards import FusedBlock, Handover
from plop_ext.scoring.collector import Collector


class FastPath:
    """Context manager that runs the blocks it knows by fused kernels, which emit the sums that scoring needs.

    RMSNorm with the residual add, the gated activation and the rotary embedding are passes over activations that a
    forward makes anyway; the kernels behind this make each of them once, with the roundings of the modules they stand
    for, and leave the sums of squares on the way. Only v and the output of attention are read for their own sake.

    Forwards are bound to instances, as `kernels.kernelize` does, and taken back on leaving, also after an exception.
    All other blocks, and everything that records gradients, runs under autocast or in inference mode, run as they are
    and are scored by the hooks of the collector.

    Args:
        model: What is scored. Known are the blocks of Llama, Mistral, Qwen2, Qwen3, Gemma2, Gemma3 and Phi3 in
            float32, float16 or bfloat16.
        collector: Entered before this and left after it.

    Attributes:
        blocks: How many blocks take the fast path.
        reason: Why some or all blocks do not; None if all do.
    """

    def __init__(self, model: nn.Module, collector: Collector) -> None:
        if collector.last_call_only:
            raise InputError('`fast=True` does not go with compat="paper-script", which reads every output by itself')
        self._collector = collector
        self._bindings = Bindings()
        self._handover = Handover()
        self._checks: list[BlockCheck] = []
        self.reason: str | None = None
        self.blocks = 0
        found, reasons = find_blocks(model)
        device = next((block.before_attention.weight.device for block in found), None)
        if device is not None and ops.STATUS.backend(device) == "pytorch":
            found, reasons = [], [f"there are no native kernels for {device.type}: {ops.STATUS.reason}"]
        if reasons:
            self.reason = f"{len(reasons)} blocks are left out: " + "; ".join(sorted(set(reasons)))
        elif not found:
            self.reason = "the model has no blocks of a family that the fast path knows"
        self._blocks = [FusedBlock(block, collector, self._handover, self._bindings) for block in found]

    def __enter__(self) -> FastPath:
        self._bindings.activate()
        self._collector.defer([linear for fused in self._blocks for linear in fused.block.emitted])
        self.blocks = len(self._blocks)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def first_batch(self, run: Callable[[], None]) -> None:
        """Score a batch and check the kernels on it: the first and the last block of each kind also run as they were.

        Outputs and gains have to agree; if they do not, the batch is scored again without the kernels, which stay
        unused from then on, and `reason` says what disagreed. Waits for the device once.

        Args:
            run: `begin`, forward and `end` of the collector for that batch.
        """
        if not self.blocks:
            run()
            return
        checks = [BlockCheck(fused, self._collector, self._bindings) for fused in self._samples()]
        for check in checks:
            check.attach()
        try:
            run()
        finally:
            for check in checks:
                check.detach()
        found = disagreement(checks, self._collector)
        if found is not None:
            self._leave()
            self.reason = f"the fused kernels disagree with the model: {found}"
            self._collector.drop_batch()
            run()

    def report(self) -> dict[str, Any]:
        """For the provenance: how many blocks took the fast path, and why others did not."""
        return {"blocks": self.blocks, "reason": self.reason}

    def _samples(self) -> list[FusedBlock]:
        """The first and the last block of each kind, by class and type of attention."""
        kinds: dict[tuple[type, object], list[FusedBlock]] = {}
        for fused in self._blocks:
            attention = fused.block.module.self_attn
            kind = (type(fused.block.module), getattr(attention, "layer_type", None))
            kinds.setdefault(kind, []).append(fused)
        return list(dict.fromkeys(block for members in kinds.values() for block in (members[0], members[-1])))

    def _leave(self) -> None:
        self._bindings.deactivate()
        self._collector.defer(())
        self._handover.clear()
        self.blocks = 0
