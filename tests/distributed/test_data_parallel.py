"""Replicas on several ranks: bitwise the scores of one process, whatever their number."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from plop_ext.scores import Scores
from plop_ext.scoring.score import score
from plop_ext.statistics import StopRule
from tests.support import tiny_models
from tests.support.paths import ROOT
from tests.support.processes import ends_of, in_processes

Batch = dict[str, torch.Tensor]


def model() -> nn.Module:
    torch.manual_seed(0)
    return tiny_models.qwen2()


def batches(number: int = 7, ids: bool = True) -> list[Batch]:
    """Batches of two samples of uneven lengths, padded."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for first in range(0, 2 * number, 2):
        lengths = torch.randint(18, 30, (2,), generator=generator).tolist()
        mask = torch.tensor([[int(t < length) for t in range(max(lengths))] for length in lengths])
        batch = {
            "input_ids": torch.randint(3, tiny_models.VOCAB, mask.shape, generator=generator),
            "attention_mask": mask,
        }
        made.append(batch | {"sample_ids": torch.tensor([first, first + 1]) + 100} if ids else batch)
    return made


def digest(scores: Scores) -> tuple[Any, ...]:
    """Everything that must be bitwise identical, as plain data."""
    return (
        scores.totals.values.tobytes(),
        scores.sample_ids.tolist(),
        scores.sample_batches.tolist(),
        scores.nfn.tobytes(),
        scores.provenance["data"]["hash"],
        scores.provenance["stop"],
        repr(scores.statistics()),
    )


def scored(given: Any, ddp: bool = False, on: nn.Module | None = None, **options: Any) -> Scores:
    wrapped = on or (DistributedDataParallel(model()) if ddp else model())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return score(wrapped, given, **{"max_samples": None, "progress": False, **options})


def on_each_rank(options: dict[str, Any], ddp: bool = False, ids: bool = True) -> tuple[Any, ...]:
    return digest(scored(batches(ids=ids), ddp=ddp, **options))


@pytest.mark.parametrize("size", [2, 3])
def test_the_same_batches_on_all_ranks_are_bitwise_one_process(size: int) -> None:
    options = {"token_step": 3}
    one = on_each_rank(options)
    assert in_processes(size, on_each_rank, options) == [one] * size


@pytest.mark.parametrize("size", [1, 4])
def test_any_number_of_ranks_stops_at_the_same_batch(size: int) -> None:
    options = {"stop": StopRule(types=2, confidence=0.6, min_samples=4), "max_samples": 128}
    one = on_each_rank(options)
    assert one[5]["settled"] and one[5]["samples"] < 14, "the rule is not met within the data"
    assert in_processes(size, on_each_rank, options) == [one] * size


@pytest.mark.slow
def test_ddp_is_scored_under_the_names_of_the_plain_model() -> None:
    one = on_each_rank({}, ids=False)
    assert in_processes(2, on_each_rank, {}, True, False) == [one] * 2


def sharded(number: int, size: int, repeats: int, data: str) -> tuple[Any, ...]:
    """Every `size`-th batch, and the first ones once more where a sampler fills the last round."""
    rank = distributed.get_rank()
    mine = batches(number)[rank::size]
    if len(mine) < -(-number // size):
        mine += batches(number)[:repeats]
    return digest(scored(mine, data=data))


@pytest.mark.parametrize(
    ("number", "size", "repeats", "data"),
    [(7, 2, 0, "auto"), (7, 3, 1, "auto"), (2, 3, 0, "auto"), (6, 2, 0, "shard")],
)
def test_shards_are_bitwise_one_process(number: int, size: int, repeats: int, data: str) -> None:
    """Uneven shards, those that a sampler fills with repeats, and a rank without data."""
    one = digest(scored(batches(number)))
    assert in_processes(size, sharded, number, size, repeats, data) == [one] * size


def without_ids() -> None:
    rank = distributed.get_rank()
    scored([{key: value for key, value in batch.items() if key != "sample_ids"} for batch in batches()[rank::2]])


def other_later() -> None:
    rank = distributed.get_rank()
    scored([*batches(2), batches()[2 + rank]], data="auto")


def nothing() -> None:
    scored(iter([]))


def alone() -> None:
    rank = distributed.get_rank()
    if rank == 0:
        scored(batches(1), process_group=None)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (without_ids, "InputError: `dataloader` holds other batches on each rank, without `sample_ids`: a sample"),
        (
            other_later,
            "InputError: `dataloader`: rank 1 has other batches than rank 0 from batch 2 on; give all ranks",
        ),
        (nothing, "InputError: `dataloader` is empty; give it at least one batch"),
        (alone, ""),
    ],
)
def test_data_that_cannot_be_told_is_refused_on_all_ranks(function: Any, expected: str) -> None:
    for found in ends_of(2, function):
        assert found.error.startswith(expected) and bool(found.error) == bool(expected) and not found.killed


def journaled(path: str, number: int | None, options: dict[str, Any]) -> tuple[Any, ...]:
    """A run whose data ends early, as a killed one, if `number` is given."""
    return digest(scored(batches()[:number], journal=path, resume=True, **options))


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(3, 2), (1, 3), (2, 1)])
def test_a_journal_continues_on_another_number_of_ranks(first: int, then: int, tmp_path: Path) -> None:
    path, options = str(tmp_path / "run.partial"), {"token_step": 2}
    whole = digest(scored(batches(), **options))
    in_processes(first, journaled, path, 4, options)
    assert [record["ids"][0] for record in map(json.loads, Path(path).read_bytes().splitlines()[1:])] == [
        100,
        102,
        104,
        106,
    ]
    assert in_processes(then, journaled, path, None, options) == [whole] * then
    assert len(Path(path).read_bytes().splitlines()) == 8


def in_step(options: dict[str, Any], size: int, number: int, dealt: bool) -> tuple[Any, ...]:
    """Under FSDP2 every forward needs all ranks."""
    wrapped: Any = model()
    for block in wrapped.model.layers:
        fully_shard(block)
    given = batches(number) if dealt else batches(number)[distributed.get_rank() :: size]
    return digest(scored(given, on=fully_shard(wrapped), **options))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "number", "dealt", "options"),
    [
        (2, 7, False, {}),
        (3, 7, False, {"token_step": 3}),
        (3, 2, False, {}),
        (4, 7, True, {"stop": StopRule(types=2, confidence=0.6, min_samples=4), "max_samples": 128}),
        (2, 5, True, {"max_samples": 5}),
    ],
)
def test_ranks_stay_in_step_where_forwards_communicate(
    size: int, number: int, dealt: bool, options: dict[str, Any]
) -> None:
    """Uneven shards, a rank without data, an early stop and a limit: the others do not wait for ever."""
    one = digest(scored(batches(number), **options))
    assert in_processes(size, in_step, options, size, number, dealt) == [one] * size


def resumed_in_step(path: str, number: int | None) -> tuple[Any, ...]:
    wrapped: Any = model()
    for block in wrapped.model.layers:
        fully_shard(block)
    return digest(scored(batches()[:number], on=fully_shard(wrapped), journal=path, resume=True))


@pytest.mark.slow
def test_a_journal_continues_where_forwards_communicate(tmp_path: Path) -> None:
    path = str(tmp_path / "run.partial")
    whole = digest(scored(batches()))
    in_processes(3, resumed_in_step, path, 4)
    assert in_processes(2, resumed_in_step, path, None) == [whole] * 2


@pytest.mark.slow
def test_a_run_alone_imports_nothing_of_several_processes() -> None:
    program = (
        "import sys, torch; from torch import nn; import plop_ext; "
        "plop_ext.score(nn.Sequential(nn.Linear(8, 8)), [torch.randn(4, 30, 8)], progress=False); "
        "print([name for name in sys.modules if name.startswith(('plop_ext.distributed', 'plop_ext.scoring.lock'))])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
