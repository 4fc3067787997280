"""The file of a journal: what is in it, what is read back, and what is refused. Killed runs: test_journal."""

from __future__ import annotations

import base64
import json
import math
import zlib
from pathlib import Path
from typing import Any

import pytest

from plop_ext.errors import InputError, OutputError
from plop_ext.scoring.journal import Journal, Record
from tests.support.totals import make_totals

RUN = {"model": {"class": "Toy"}, "data": "toy", "modules": ["a", "b"], "types": (1, 2)}
BASELINE = [1.0, math.nan]
FIRST = Record((3, 1), "digest 1", make_totals(2, 2, tokens=[[1, 2], [3, 4]], sum_gain=0.1), {"b": "7 rows"})
SECOND = Record((2,), "digest 2", make_totals(2, 1, sum_gain=[[math.nan], [1 / 3]]))


def opened(path: Path, run: dict[str, Any] = RUN, baseline: list[float] = BASELINE, resume: bool = True) -> Journal:
    return Journal(path, run, baseline, resume)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Of two batches."""
    made = tmp_path / "run.partial"
    with opened(made, resume=False) as journal:
        journal.append(FIRST)
        journal.append(SECOND)
    return made


def refusal(path: Path, **changes: Any) -> str:
    with pytest.raises(InputError) as caught:
        opened(path, **changes)
    return str(caught.value).replace(str(path), "FILE")


def same(first: Record, second: Record) -> bool:
    return (first.ids, first.digest, first.unassigned, first.totals.values.shape, first.totals.values.tobytes()) == (
        second.ids,
        second.digest,
        second.unassigned,
        second.totals.values.shape,
        second.totals.values.tobytes(),
    )


def test_the_lines(path: Path) -> None:
    header, first, second, rest = path.read_bytes().split(b"\n")
    assert json.loads(header) == {
        "format": "plop_ext.journal",
        "version": 3,
        "run": {**RUN, "types": [1, 2]},
        "baseline": [1.0, pytest.approx(math.nan, nan_ok=True)],
    }
    values = FIRST.totals.values
    assert json.loads(first) == {
        "ids": [3, 1],
        "digest": "digest 1",
        "shape": [2, 2, 5],
        "crc": zlib.crc32(values.tobytes()),
        "totals": base64.b64encode(values.tobytes()).decode(),
        "unassigned": {"b": "7 rows"},
    }
    assert json.loads(second)["unassigned"] == {} and rest == b""


def test_every_record_is_there_before_the_next_is_scored(tmp_path: Path) -> None:
    path = tmp_path / "run.partial"
    with opened(path) as journal:
        assert not path.exists()
        journal.append(FIRST)
        assert path.read_bytes().count(b"\n") == 2
        journal.append(SECOND)
        assert path.read_bytes().count(b"\n") == 3
        file = journal._file
    assert file is not None and file.closed
    with opened(tmp_path / "unused.partial"):  # nothing to close
        pass
    journal.delete()
    journal.delete()
    assert not path.exists()


def test_a_file_that_appeared_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "run.partial"
    with opened(path) as journal:
        path.write_text("of another process")
        with pytest.raises(OutputError, match="another process writes it"):
            journal.append(FIRST)
    assert path.read_text() == "of another process"


def test_records_are_read_back_bit_by_bit_and_continued(path: Path) -> None:
    third = Record((7,), "digest 3", make_totals(2, 1))
    with opened(path) as journal:
        assert [same(*pair) for pair in zip(journal.records, (FIRST, SECOND), strict=True)] == [True, True]
        before = path.read_bytes()
        journal.append(third)
    assert path.read_bytes().startswith(before)
    assert same(opened(path).records[2], third) and len(opened(path).records) == 3


@pytest.mark.parametrize("lost", [1, 20])
def test_a_torn_last_line_is_dropped(path: Path, lost: int) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:-lost])
    with opened(path) as journal:
        assert len(journal.records) == 1 and path.read_bytes() == b"".join(whole.splitlines(True)[:2])
        journal.append(SECOND)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("text", ["", '{"format": "plop_ext.jour'])
def test_a_torn_header_is_dropped(path: Path, text: str) -> None:
    whole = path.read_bytes()
    path.write_text(text)
    with opened(path) as journal:
        assert journal.records == [] and not path.exists()
        journal.append(FIRST)
        journal.append(SECOND)
    assert path.read_bytes() == whole


def test_batches_are_found_by_their_samples(path: Path) -> None:
    journal = opened(path)
    assert journal.known.find((9, 8), "digest 1") is None
    assert journal.known.find([3, 1], "digest 1") is journal.records[0]
    assert journal.known.find((2,), "digest 2") is journal.records[1]


@pytest.mark.parametrize(
    ("ids", "digest", "message"),
    [
        (
            (9, 1),
            "digest 1",
            "sample 1 in `FILE` was scored in another batch; resume with the same data, order and batch size",
        ),
        (
            (1, 3),
            "digest 1",
            "sample 1 in `FILE` was scored in another batch; resume with the same data, order and batch size",
        ),
        (
            (3, 1),
            "digest 2",
            "sample 3 in `FILE` had other inputs; resume with the same data, in the same order",
        ),
    ],
)
def test_batches_that_are_not_the_recorded_ones(path: Path, ids: tuple[int, ...], digest: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        opened(path).known.find(ids, digest)
    assert str(caught.value).replace(str(path), "FILE") == message


def test_a_file_is_continued_only_on_request(path: Path) -> None:
    assert refusal(path, resume=False) == (
        "`FILE` belongs to an interrupted run; continue it with `resume` (plop score --resume), or delete it"
    )


OTHER_RUN = "`FILE` is of another run: its {} is {}, now it is {}; resume with the same, or delete it"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": {**RUN, "data": "other", "modules": []}}, OTHER_RUN.format("data", "toy", "other")),
        ({"run": {**RUN, "seed": 3}}, OTHER_RUN.format("seed", "None", "3")),
        ({"run": {"data": "toy", "types": [1, 2]}}, OTHER_RUN.format("model", "{'class': 'Toy'}", "None")),
        ({"run": {**RUN, "data": "x" * 60}}, OTHER_RUN.format("data", "toy", "x" * 60)),
        ({"run": {**RUN, "data": "x" * 61}}, OTHER_RUN.format("data", "toy", "x" * 57 + "...")),
        (
            {"baseline": [1.0, 2.0]},
            "`FILE` is of another checkpoint: its weights differ; delete it and start anew",
        ),
        (
            {"baseline": [1.0002, math.nan]},
            "`FILE` is of another checkpoint: its weights differ; delete it and start anew",
        ),
    ],
    ids=["data", "seed", "model", "60 letters", "61 letters", "baseline", "0.02 %"],
)
def test_another_run_is_refused(path: Path, changes: dict[str, Any], message: str) -> None:
    assert refusal(path, **changes) == message


def test_a_long_value_of_the_file_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "run.partial"
    with opened(path, run={"data": "y" * 61}) as journal:
        journal.append(FIRST)
    assert refusal(path, run={"data": "toy"}) == OTHER_RUN.format("data", "y" * 57 + "...", "toy")


def test_rounding_errors_of_other_devices_are_no_other_checkpoint(path: Path) -> None:
    assert len(opened(path, baseline=[1.00005, math.nan]).records) == 2


def test_baselines_near_zero_are_compared_relatively(tmp_path: Path) -> None:
    path = tmp_path / "run.partial"
    with opened(path, baseline=[1e-12, 0.0]) as journal:
        journal.append(FIRST)
    assert len(opened(path, baseline=[1e-12, 0.0]).records) == 1
    assert "another checkpoint" in refusal(path, baseline=[2e-12, 0.0])


DAMAGED = "`FILE` is no journal of a scoring run, or damaged; delete it"


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"format": None},
    ],
    ids=str,
)
def test_a_header_of_another_kind(path: Path, change: dict[str, Any]) -> None:
    header, *lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([json.dumps({**json.loads(header), **change}).encode(), *lines]))
    assert refusal(path) == DAMAGED


@pytest.mark.parametrize("version", [2, 4, None])
def test_a_journal_of_another_version(path: Path, version: int | None) -> None:
    header, *lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([json.dumps({**json.loads(header), "version": version}).encode(), *lines]))
    assert refusal(path) == "`FILE` was written by another version of plop_ext; delete it and score anew"


@pytest.mark.parametrize("field", ["ids", "digest", "shape", "crc", "totals", "unassigned"])
def test_a_record_without_a_field(path: Path, field: str) -> None:
    *lines, last, _ = path.read_bytes().split(b"\n")
    record = json.loads(last)
    del record[field]
    path.write_bytes(b"\n".join([*lines, json.dumps(record).encode(), b""]))
    assert refusal(path) == DAMAGED


@pytest.mark.parametrize("spoil", [lambda text: text[0].swapcase() + text[1:], lambda text: text[:8] + "!" + text[8:]])
def test_totals_that_changed_on_the_disk(path: Path, spoil: Any) -> None:
    *lines, last, _ = path.read_bytes().split(b"\n")
    record = json.loads(last)
    record["totals"] = spoil(record["totals"])
    path.write_bytes(b"\n".join([*lines, json.dumps(record).encode(), b""]))
    assert refusal(path) == DAMAGED
