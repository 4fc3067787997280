"""One rank fails, ends, hangs or stays away: all ranks end within a limit, with the cause."""

from __future__ import annotations

import json
import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

from plop_ext.distributed import handshake
from plop_ext.errors import OutputError
from plop_ext.scoring.journal import Journal
from plop_ext.scoring.score import score
from tests.support import tiny_models
from tests.support.processes import ends_of

pytestmark = pytest.mark.slow

# A batch and two seconds, and what the processes need on a busy machine.
SOON = 15.0


def batches(number: int = 8) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"x": torch.randn(2, 5, 16, generator=generator), "sample_ids": torch.tensor([2 * i, 2 * i + 1])}
        for i in range(number)
    ]


def scored(data: Any, model: nn.Module | None = None, **options: Any) -> int:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = score(model or tiny_models.Plain(), data, **{"max_samples": None, "progress": False, **options})
    return len(found.sample_ids)


def raises(what: str) -> None:
    """Rank 1 raises before, in or after its second forward, or while it reads data."""
    rank = distributed.get_rank()
    calls = 0

    def forward(model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
        nonlocal calls
        calls += 1
        if what == "forward" and rank == 1 and calls == 2:
            raise ValueError("index out of range\nin detail")
        model(**batch)

    def data() -> Any:
        for number, batch in enumerate(batches()):
            if what == "data" and rank == 1 and number == 3:
                raise OSError("the disk is gone")
            if what == "mask" and rank == 1 and number == 3:
                batch = batch | {"sample_ids": torch.tensor([1, 2, 3])}
            yield batch

    scored(data(), forward=forward)


@pytest.mark.parametrize(
    ("what", "own", "others"),
    [
        (
            "forward",
            "ValueError: index out of range\nin detail",
            "RuntimeError: rank 1 failed: ValueError: index out of range",
        ),
        ("data", "OSError: the disk is gone", "RuntimeError: rank 1 failed: OSError: the disk is gone"),
        (
            "mask",
            "InputError: `sample_ids` in a batch must be [2]",
            "InputError: rank 1: `sample_ids` in a batch must be [2]",
        ),
    ],
)
def test_what_one_rank_raises_is_raised_on_all(what: str, own: str, others: str) -> None:
    ended = ends_of(3, raises, what)
    for rank, found in enumerate(ended):
        kind, _, text = (own if rank == 1 else others).partition(": ")
        assert kind.removesuffix("Error") in found.error.split(":")[0] and found.error.partition(": ")[2].startswith(
            text
        )
        assert found.seconds < SOON


def killed(doomed: int) -> None:
    rank = distributed.get_rank()
    calls = 0

    def forward(model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
        nonlocal calls
        calls += 1
        if rank == doomed and calls == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        model(**batch)

    scored(batches(16), forward=forward)


@pytest.mark.parametrize(("size", "doomed"), [(2, 1), (4, 2)])
def test_a_killed_rank_is_named(size: int, doomed: int) -> None:
    for rank, found in enumerate(ends_of(size, killed, doomed)):
        if rank == doomed:
            assert found.killed == "SIGKILL"
        else:
            assert f"LostRank: rank {doomed} has ended, or did not answer" in found.error and found.seconds < SOON


def hangs() -> None:
    rank = distributed.get_rank()

    def forward(model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
        if rank == 1:
            time.sleep(4)
            os._exit(1)
        model(**batch)

    scored(batches(), forward=forward, timeout=2.0)


def test_a_rank_that_hangs_is_named_after_the_timeout() -> None:
    ended = ends_of(3, hangs)
    for found in (ended[0], ended[2]):
        assert "rank 1 has ended, or did not answer within 2 s" in found.error and found.seconds < SOON


def stays_away() -> None:
    rank = distributed.get_rank()
    handshake.LIMIT = 1.0
    if rank != 1:
        scored(batches())


def comes_later() -> int:
    """After a call that only some ranks made, the next one of all ranks works."""
    rank = distributed.get_rank()
    handshake.LIMIT = 1.0
    if rank == 0:
        with pytest.raises(ValueError, match="only 0 called"):
            scored(batches())
    else:
        time.sleep(1.5)
    handshake.LIMIT = 20.0
    return scored(batches())


def test_ranks_that_do_not_call_are_named_and_how_to_do_without() -> None:
    ended = ends_of(3, stays_away)
    for rank in (0, 2):
        assert ended[rank].error == (
            "InputError: `process_group`: of 3 ranks only 0, 2 called within 1 s, and not 1; call on every rank, or "
            "pass process_group=None to use this process alone"
        )
    assert [found.value for found in ends_of(2, comes_later)] == [16, 16]


def full_disk(path: str) -> None:
    scored(batches(), journal=path)


def test_a_disk_that_is_full_on_rank_0_ends_all(tmp_path: Path) -> None:
    ended = ends_of(2, full_disk, str(tmp_path / "no folder" / "run.partial"))
    assert all("cannot write" in found.error for found in ended) and ended[1].error.startswith(
        "_PeerOutputError: rank 0:"
    )


def raises_in_a_collective(model: Any) -> None:
    """Rank 1 raises in a forward in which the others wait for it."""
    rank = distributed.get_rank()
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    calls = 0

    def fail(*unused: Any) -> None:
        nonlocal calls
        calls += 1
        if rank == 1 and calls == 4:
            raise ValueError("out of memory, say")

    model.model.layers[1].self_attn.register_forward_pre_hook(fail)
    ids = torch.arange(3, 51).view(2, 24)
    scored([{"input_ids": ids, "sample_ids": torch.tensor([2 * i, 2 * i + 1])} for i in range(15)], model)


def test_a_failure_in_a_collective_ends_its_process_and_then_the_others() -> None:
    ended = ends_of(3, raises_in_a_collective, tiny_models.llama())
    assert ended[1].error == "ValueError: out of memory, say"
    for rank in (0, 2):
        assert ended[rank].error and ended[rank].seconds < SOON


def fills_the_disk(path: str) -> None:
    append, written = Journal.append, []

    def limited(self: Journal, record: Any) -> None:
        written.append(record)
        if len(written) == 3:
            raise OutputError(f"cannot write `{path}`: no space left on device; free some space")
        append(self, record)

    Journal.append = limited  # type: ignore[method-assign]
    scored(batches(), journal=path)


def test_a_disk_that_fills_up_ends_all_and_leaves_whole_records(tmp_path: Path) -> None:
    path = tmp_path / "run.partial"
    ended = ends_of(2, fills_the_disk, str(path))
    assert ended[0].error.startswith("OutputError: cannot write") and "rank 0: cannot write" in ended[1].error
    assert all(end.seconds < SOON for end in ended)
    lines = path.read_bytes().splitlines()
    assert [json.loads(line)["ids"][0] for line in lines[1:]] == [0, 2]


def takes_long() -> int:
    """A rank that is slow, but within the timeout, is waited for."""

    def forward(model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
        time.sleep(1.0 if distributed.get_rank() == 1 else 0.0)
        model(**batch)

    return scored(batches(4), forward=forward, timeout=5.0)


def test_a_slow_rank_is_waited_for() -> None:
    assert [end.value for end in ends_of(2, takes_long)] == [8, 8]
