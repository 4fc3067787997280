"""Several processes that score together, as one process would: `Ranks` over a group of torch.distributed.

The processes go through the one list of batches in rounds, each running another batch of a round. What a round has
scored is gathered in the order of the list and judged there, so that the number of processes leaves no trace.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import nn

from plop_ext._warnings import silenced
from plop_ext.distributed.alike import check_alike, check_settings
from plop_ext.distributed.group import Group
from plop_ext.distributed.handshake import RollCall
from plop_ext.distributed.layout import Layout, layout_of
from plop_ext.errors import InputError
from plop_ext.layers import LinearLayer, partners_of, stages_group
from plop_ext.scoring.baseline import WeightNorms
from plop_ext.scoring.digest import digest
from plop_ext.scoring.journal import Journal, Known, Record, decode, encode
from plop_ext.scoring.turn import Round, Turn, TurnReader


@contextmanager
def lockstep(process_group: Any, data: str, timeout: float) -> Iterator[Lockstep]:
    """Enter a run together with the other ranks; what fails on one of them fails on all."""
    with Group(RollCall(process_group), timeout) as group, group.failing_together():
        with nullcontext() if group.rank == 0 else silenced():
            yield Lockstep(group, data)


class Lockstep:
    """The ranks of a group; see `Ranks`.

    Args:
        group: The ranks, entered.
        data: Whether the ranks hold the same batches (`"same"`) or each its own (`"shard"`); `"auto"` looks.
    """

    def __init__(self, group: Group, data: str) -> None:
        self.leads = group.rank == 0
        self.size = group.size
        self._group = group
        self._data = data
        self._layout = Layout(tuple(range(group.size)))
        self._known = Known([], "")
        self._seen: set[int] = set()

    @property
    def _place(self) -> int:
        return self._layout.places[self._group.rank]

    def settle(self, model: nn.Module) -> None:
        places = {rank: place for place, rank in enumerate(self._group.ranks)}
        mine = partners_of(model, stages_group(model))
        outside = sorted(mine - places.keys())
        if outside:
            raise InputError(
                f"`process_group` lacks rank {outside[0]}, which holds a part of the model of rank "
                f"{self._group.ranks[self._group.rank]}; pass a group of all ranks that hold the model"
            )
        partners = self._group.gather(json.dumps([places[rank] for rank in mine]).encode())
        self._layout = layout_of(model, list(map(json.loads, partners)))

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        check_settings(self._group, settings)

    def check_alike(self, layers: Sequence[LinearLayer], norms: WeightNorms, device: torch.device) -> None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        check_alike(self._group, [layer.name for layer in layers], norms.values, name)

    def agree_on(self, values: list[float]) -> list[float]:
        content = self._group.share(np.array(values, dtype=np.float64).tobytes())
        return np.frombuffer(content).tolist()

    def journal(
        self, path: str | os.PathLike[str], run: dict[str, Any], baselines: Sequence[float], resume: bool
    ) -> tuple[Journal | None, Known]:
        journal = Journal(path, run, baselines, resume) if self.leads else None
        records = [] if journal is None else journal.records
        lines = self._group.share(b"\n".join(map(encode, records)))
        self._known = journal.known if journal is not None else Known(list(map(decode, lines.splitlines())), path)
        return journal, self._known

    def rounds(self, dataloader: Iterable[Any], reader: TurnReader) -> Iterator[Round]:
        given = iter(dataloader)
        first = list(islice(given, 1))
        same = self._data == "same" or (self._data == "auto" and self._hold_the_same(first))
        self._data = "same" if same else "shard"
        spare = reader.read(first[0], 0) if first else None
        if self._layout.collective:
            spare = self._spare(spare, first, reader)
        batches = chain(first, given)
        announced = number = 0
        while True:
            taken = list(islice(batches, self._layout.size if same else 1))
            turns = []
            for batch in taken:
                turns.append(reader.read(batch, announced if same else None))
                announced += turns[-1].streams.samples
            own = self._place if same else 0
            mine = turns[own] if own < len(turns) else None
            state = (0, 0) if mine is None else (mine.streams.samples, int(mine.known is None))
            table = self._group.exchange(*state, _check(turns))
            self._check_same([row[2] for row in table], same, number)
            spoken = [table[rank] for rank in self._layout.speakers]
            sizes = [samples for samples, _, _ in spoken]
            if not any(sizes):
                return
            number += sum(size > 0 for size in sizes)
            waits = self._layout.collective and any(needed for _, needed, _ in spoken)
            yield Round(sizes, self._place, mine, (mine or spare) if waits else None)

    def forward(self) -> AbstractContextManager[None]:
        return self._group.in_collectives() if self._layout.collective else nullcontext()

    def records(self, mine: Record | None) -> list[Record | None]:
        content = b""
        if mine is not None and self._group.rank == self._layout.speakers[self._place]:
            content = json.dumps(mine.ids).encode() if self._known.holds(mine) else encode(mine)
        elif mine is not None and mine.unassigned:
            content = json.dumps(dict(mine.unassigned)).encode()
        return [self._joined(*contents) for contents in self._layout.split(self._group.gather(content))]

    def without_repeats(self, record: Record) -> Record:
        if self._data == "same":
            return record
        fresh = [number for number, sample in enumerate(record.ids) if sample not in self._seen]
        self._seen.update(record.ids)
        if len(fresh) == len(record.ids):
            return record
        return replace(record, ids=tuple(record.ids[i] for i in fresh), totals=record.totals.of_samples(fresh))

    def decided(self, count: int, settled: bool) -> tuple[int, bool]:
        found, ended = self._group.exchange(count, int(settled))[0]
        return found, bool(ended)

    def available(self, samples: int | None) -> int | None:
        if self._data == "same":
            return samples
        table = self._group.exchange(int(samples is not None), samples or 0)
        spoken = [table[rank] for rank in self._layout.speakers]
        return sum(number for _, number in spoken) if all(known for known, _ in spoken) else None

    def describe(self, provenance: dict[str, Any]) -> dict[str, Any]:
        # Each rank checks the kernels on a batch of its own; the first that declines speaks for all.
        ways = [json.loads(content) for content in self._group.gather(json.dumps(provenance.get("fast")).encode())]
        declined = next((way for way in ways if way is not None and way["reason"] is not None), None)
        if declined is not None:
            provenance = provenance | {"fast": declined}
        parallel = {"ranks": self._group.size, "batches_at_once": self._layout.size, "data": self._data}
        return json.loads(self._group.share(json.dumps(provenance | {"parallel": parallel}).encode()))

    def _hold_the_same(self, first: list[Any]) -> bool:
        """Return whether all ranks that hold data begin with the same batch."""
        checks = [check for (check,) in self._group.exchange(_number(digest(first[0])) if first else 0)]
        return len(set(checks)) == 1

    def _check_same(self, checks: list[int], same: bool, number: int) -> None:
        """Check that the ranks read the same where they have to."""
        if same and len(set(checks)) > 1:
            other = next(rank for rank, check in enumerate(checks) if check != checks[0])
            raise InputError(
                f"`dataloader`: rank {other} has other batches than rank 0 from batch {number} on; give all ranks the "
                "same batches in the same order, or other samples to each, with data='shard'"
            )
        for place, found in enumerate(self._layout.split(checks)):
            if len(set(found)) > 1:
                raise InputError(
                    f"`dataloader`: the ranks that hold the parts of model {place} have different batches; give them "
                    "the same batches"
                )

    def _spare(self, spare: Turn | None, first: list[Any], reader: TurnReader) -> Turn | None:
        """Return a batch to run when this rank has none: its own first one, or that of another rank."""
        holds = [bool(flag) for (flag,) in self._group.exchange(int(bool(first)))]
        if all(holds) or not any(holds):
            return spare
        content = io.BytesIO()
        if self._group.rank == holds.index(True):
            torch.save(first[0], content)
        sent = self._group.gather(content.getvalue())[holds.index(True)]
        if spare is None:
            return reader.read(torch.load(io.BytesIO(sent), weights_only=True), 0)
        return spare

    def _joined(self, content: bytes, *noted: bytes) -> Record | None:
        """Return the record that the speaker of a place sent, with what the others could not assign: stages differ."""
        if not content:
            return None
        record = self._known.of_ids(json.loads(content)) if content.startswith(b"[") else decode(content)
        others = [json.loads(reasons) for reasons in noted if reasons]
        return replace(record, unassigned=dict(ChainMap(*others, dict(record.unassigned)))) if others else record


def _check(turns: Sequence[Turn]) -> int:
    """Return a number by which ranks compare batches: their contents and ids."""
    return _number("".join(f"{turn.digest}{turn.ids}" for turn in turns)) if turns else 0


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1 | 1
