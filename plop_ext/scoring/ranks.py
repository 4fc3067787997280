"""The processes of a scoring run. One alone is the rule, and the others follow the same code (`lockstep`)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import nn

from plop_ext.arguments import check_choice, check_number, shown
from plop_ext.errors import InputError
from plop_ext.layers import LinearLayer
from plop_ext.scoring.baseline import WeightNorms
from plop_ext.scoring.journal import Journal, Known, Record
from plop_ext.scoring.turn import Round, TurnReader

# Seconds after which a rank that does not answer counts as lost.
TIMEOUT = 600.0


class Ranks(Protocol):
    """The processes that score together. Each calls every method, in the same order.

    Attributes:
        leads: Whether this process writes, warns and shows progress for all.
        size: Number of processes.
    """

    leads: bool
    size: int

    def settle(self, model: nn.Module) -> None:
        """Learn what the ranks hold of the model, prepared for scoring."""

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Check that all ranks were called with the same settings."""

    def check_alike(self, layers: Sequence[LinearLayer], norms: WeightNorms, device: torch.device) -> None:
        """Raise `InputError` if the ranks hold different models."""

    def agree_on(self, values: list[float]) -> list[float]:
        """Return the values of the rank that leads."""

    def journal(
        self, path: str | os.PathLike[str], run: dict[str, Any], baselines: Sequence[float], resume: bool
    ) -> tuple[Journal | None, Known]:
        """Open the journal where this process writes it, and return the batches in it."""

    def rounds(self, dataloader: Iterable[Any], reader: TurnReader) -> Iterator[Round]:
        """Yield the batches, as many at a time as there are processes."""

    def forward(self) -> AbstractContextManager[None]:
        """Return the context of what may communicate by itself: a forward, or the reading of sharded weights."""

    def records(self, mine: Record | None) -> list[Record | None]:
        """Return what each place of a round has scored."""

    def without_repeats(self, record: Record) -> Record:
        """Return a batch without the samples that were scored before: samplers repeat some, to fill the last round."""

    def decided(self, count: int, settled: bool) -> tuple[int, bool]:
        """Return how many batches of a round count, and whether the run ends there, as the leading rank decides."""

    def available(self, samples: int | None) -> int | None:
        """Return the number of samples of all ranks, from that of this rank."""

    def describe(self, provenance: dict[str, Any]) -> dict[str, Any]:
        """Return the provenance of the rank that leads, with the parallelism."""


class Alone:
    """One process."""

    leads = True
    size = 1

    def settle(self, model: nn.Module) -> None: ...

    def check_settings(self, settings: Mapping[str, Any]) -> None: ...

    def check_alike(self, layers: Sequence[LinearLayer], norms: WeightNorms, device: torch.device) -> None: ...

    def agree_on(self, values: list[float]) -> list[float]:
        return values

    def journal(
        self, path: str | os.PathLike[str], run: dict[str, Any], baselines: Sequence[float], resume: bool
    ) -> tuple[Journal | None, Known]:
        journal = Journal(path, run, baselines, resume)
        return journal, journal.known

    def rounds(self, dataloader: Iterable[Any], reader: TurnReader) -> Iterator[Round]:
        announced = 0
        for batch in dataloader:
            turn = reader.read(batch, announced)
            announced += turn.streams.samples
            yield Round((turn.streams.samples,), 0, turn)

    def forward(self) -> AbstractContextManager[None]:
        return nullcontext()

    def records(self, mine: Record | None) -> list[Record | None]:
        return [mine]

    def without_repeats(self, record: Record) -> Record:
        return record

    def decided(self, count: int, settled: bool) -> tuple[int, bool]:
        return count, settled

    def available(self, samples: int | None) -> int | None:
        return samples

    def describe(self, provenance: dict[str, Any]) -> dict[str, Any]:
        return provenance


@contextmanager
def ranks_of(process_group: Any, data: str, timeout: float) -> Iterator[Ranks]:
    """Enter a run together with the other ranks of a process group, if there are any.

    Args:
        process_group: The group; `"auto"` is the default group of torch.distributed, if it is initialized; None is
            this process alone.
        data: `"same"`, `"shard"` or `"auto"`, as for `plop_ext.score`.
        timeout: Seconds after which a rank that does not answer counts as lost.

    Raises:
        InputError: If an argument is none of these, or some ranks do not call.
    """
    check_choice(("auto", "same", "shard"), data=data)
    check_number(above=0.0, required=True, timeout=timeout)
    group = _group(process_group)
    if group is None:
        yield Alone()
        return
    from plop_ext.scoring.lockstep import lockstep

    with lockstep(group, data, timeout) as ranks:
        yield ranks


def _group(process_group: Any) -> Any:
    """Return the process group of more than one rank to score in, or None."""
    distributed = torch.distributed
    if process_group is None:
        return None
    automatic = isinstance(process_group, str) and process_group == "auto"
    if not distributed.is_available() or not distributed.is_initialized():
        if automatic:
            return None
        raise InputError(f"`process_group` {shown(process_group)}: torch.distributed is not initialized; leave it out")
    group = distributed.group.WORLD if automatic else process_group
    if not isinstance(group, distributed.ProcessGroup):
        raise InputError(f"`process_group` must be a process group of torch, 'auto' or None, got {shown(group)}")
    if distributed.get_rank(group) < 0:
        raise InputError("`process_group` does not hold this rank; call on its ranks only")
    return group if distributed.get_world_size(group) > 1 else None
