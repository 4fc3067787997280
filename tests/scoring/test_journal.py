"""A scoring run that is killed, at any point, continues: nothing lost, nothing doubled."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from plop_ext.cli.main import main
from plop_ext.errors import InputError
from plop_ext.scores import Scores
from plop_ext.scoring import run as run_module
from plop_ext.scoring.score import score
from tests.support.interrupted import BATCHES, data, model
from tests.support.paths import ROOT
from tests.support.tiny_models import Plain


def scored(journal: Path | None = None, **changes: Any) -> Scores:
    arguments = {"max_samples": None, "token_step": 3, "data_name": "toy", "progress": False, **changes}
    return score(arguments.pop("model", model()), arguments.pop("data", data()), journal=journal, **arguments)


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """Of a whole run."""
    path = tmp_path / "run.partial"
    scored(path)
    return path


def same(first: Scores, second: Scores) -> bool:
    return (
        first.totals.values.tobytes() == second.totals.values.tobytes()
        and first.sample_ids.tolist() == second.sample_ids.tolist()
        and first.sample_batches.tolist() == second.sample_batches.tolist()
    )


def test_killed_processes(tmp_path: Path) -> None:
    """SIGKILL at random moments until the run gets through; the result is bitwise identical to that of one run."""
    journal, output = tmp_path / "run.partial", tmp_path / "scores.json"
    rng = random.Random(0)
    command = [sys.executable, "-m", "tests.support.interrupted", str(journal), str(output), "0.05"]
    kills = 0
    while not output.exists():
        assert kills < 20
        before = journal.stat().st_size if journal.exists() else 0
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
        try:
            deadline = time.monotonic() + 60
            while process.poll() is None and time.monotonic() < deadline:
                grown = journal.exists() and journal.stat().st_size > before
                if grown and kills < 3:
                    time.sleep(rng.uniform(0.0, 0.3))
                    process.send_signal(signal.SIGKILL)
                    kills += 1
                    break
                time.sleep(0.005)
        finally:
            assert process.wait(timeout=60) in (0, -signal.SIGKILL)
    assert kills == 3 and not journal.exists()
    assert same(Scores.load(output), scored())


def test_a_file_torn_at_any_byte(journal: Path) -> None:
    """Whatever part of the file made it, the run continues from the last whole batch."""
    whole = journal.read_bytes()
    expected = scored()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    assert len(ends) == 1 + BATCHES
    rng = random.Random(0)
    for cut in [
        0,
        1,
        ends[0] - 1,
        ends[0],
        ends[0] + 1,
        len(whole) - 1,
        len(whole),
        *rng.sample(range(len(whole)), 12),
    ]:
        journal.write_bytes(whole[:cut])
        forwards = []

        def forward(model: torch.nn.Module, batch: dict[str, torch.Tensor], seen: list[int] = forwards) -> None:
            seen.append(1)
            model(**batch)

        assert same(scored(journal, resume=True, forward=forward), expected)
        complete = max(sum(end <= cut for end in ends) - 1, 0)
        assert len(forwards) == BATCHES - complete
        assert journal.read_bytes() == whole


def test_an_exception_keeps_what_was_scored(tmp_path: Path) -> None:
    path = tmp_path / "run.partial"
    broken = [*data()[:5], {"x": torch.randn(3, 11, 9), "sample_ids": torch.arange(15, 18)}]
    with pytest.raises(RuntimeError):
        scored(path, data=broken)
    assert path.read_bytes().count(b"\n") == 1 + 5
    assert same(scored(path, resume=True), scored())


def test_the_stop_rule_sees_the_batches_of_the_journal(tmp_path: Path) -> None:
    path = tmp_path / "run.partial"
    whole = scored(stop="settled", max_samples=60)
    with pytest.raises(ZeroDivisionError):
        scored(path, stop="settled", max_samples=60, forward=lambda model, batch: 1 / 0)
    assert not path.exists()
    assert same(scored(path, stop="settled", max_samples=60, resume=True), whole)
    again = scored(path, stop="settled", max_samples=60, resume=True)
    assert same(again, whole) and again.provenance["stop"] == whole.provenance["stop"]


def test_a_weight_that_is_not_finite_does_not_end_the_run_for_good(tmp_path: Path) -> None:
    path, broken = tmp_path / "run.partial", model()
    broken.layers[-1].down.weight.data.fill_(math.nan)
    whole = scored(path, model=broken)
    assert "layers.1.down" not in whole.module_names
    assert same(scored(path, model=broken, resume=True), whole)


class Pooling(Plain):
    """Feeds `down` of the last block rows that belong to no sample, in the first call only."""

    calls = 0

    def forward(self, x: torch.Tensor, **ignored: Any) -> torch.Tensor:
        self.calls += 1
        if self.calls == 1:
            self.layers[-1].down(torch.ones(7, 24))
        return super().forward(x)


def test_why_a_module_has_no_score_outlives_the_process(tmp_path: Path) -> None:
    path = tmp_path / "pooling.partial"

    def pooling(calls: int) -> Pooling:
        torch.manual_seed(0)
        made = Pooling()
        made.calls = calls
        return made

    whole = scored(path, model=pooling(0))
    reasons = {item.name: item.reason for item in whole.unscored}
    assert "7 input rows cannot be assigned to 3 samples" in reasons["layers.1.down"]
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:6], b""]))
    again = scored(path, model=pooling(5), resume=True)
    assert again.unscored == whole.unscored and same(again, whole)


def test_on_a_device_a_resumed_run_stops_where_it_would_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch that was under way when the set settled does not count, and is not in the file."""
    monkeypatch.setattr(run_module, "input_device", lambda model: SimpleNamespace(type="cuda"))

    def stopped(path: Path, resume: bool) -> Scores:
        looks = iter([0.5, 0.5, 1.0])
        monkeypatch.setattr("plop_ext.scoring.stopping.set_stability", lambda table, rule: next(looks))
        return scored(path, stop="settled", max_samples=60, resume=resume)

    path = tmp_path / "run.partial"
    whole = stopped(path, resume=False)
    lines = path.read_bytes().split(b"\n")
    assert whole.provenance["stop"]["settled_at"] == 12 and len(whole.sample_ids) == 12 and len(lines) == 1 + 4 + 1
    for records in range(5):
        path.write_bytes(b"\n".join([*lines[: 1 + records], b""]))
        again = stopped(path, resume=True)
        assert same(again, whole) and again.provenance["stop"] == whole.provenance["stop"]
        assert path.read_bytes().split(b"\n") == lines


def test_a_left_over_file_is_not_overwritten(journal: Path) -> None:
    before = journal.read_bytes()
    with pytest.raises(InputError, match="belongs to an interrupted run; continue it with `resume`"):
        scored(journal)
    assert journal.read_bytes() == before


def shuffled() -> list[dict[str, torch.Tensor]]:
    found = data()
    found[0]["x"], found[1]["x"] = found[1]["x"], found[0]["x"]
    return found


def rebatched() -> list[dict[str, torch.Tensor]]:
    return [
        {key: torch.cat([first[key], second[key]]) for key in first}
        for first, second in zip(data()[::2], data()[1::2], strict=True)
    ]


def other_weights() -> torch.nn.Module:
    other = model()
    other.layers[0].up.weight.data *= 1.01
    return other


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_step": 1}, "is of another run: its token_step is 3, now it is 1"),
        ({"seed": 5}, "its seed is 0, now it is 5"),
        ({"exclude": ["up"]}, "its exclude is"),
        ({"data_name": "other"}, "its data is toy, now it is other"),
        ({"data": shuffled()}, "sample 0 in .* had other inputs; resume with the same data"),
        ({"data": rebatched()}, "sample 0 in .* was scored in another batch"),
        ({"model": other_weights()}, "is of another checkpoint"),
    ],
)
def test_what_does_not_match_is_refused(journal: Path, changes: dict[str, Any], message: str) -> None:
    before = journal.read_bytes()
    with pytest.raises(InputError, match=message):
        scored(journal, resume=True, **changes)
    assert journal.read_bytes() == before


@pytest.mark.parametrize("damage", ["not json\n", '{"format": "other", "version": 1}\n', "[]\n", "flip"])
def test_a_damaged_file_is_named(journal: Path, damage: str) -> None:
    if damage == "flip":
        lines = journal.read_text().split("\n")
        record = json.loads(lines[3])
        record["crc"] ^= 1
        lines[3] = json.dumps(record)
        journal.write_text("\n".join(lines))
    else:
        journal.write_text(damage)
    with pytest.raises(InputError, match="is no journal of a scoring run, or damaged; delete it"):
        scored(journal, resume=True)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, partial = tmp_path / "s.json", tmp_path / "s.json.partial"
    command = ["score", "plop-tiny", "arithmetic", "--quiet", "--device", "cpu", "--samples", "24", "-o", str(output)]
    kept: list[bytes] = []

    def keep(self: Scores, path: Path, overwrite: bool) -> None:
        kept.append(partial.read_bytes())
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scores, "save", keep)
        assert main(command) == 130
    assert partial.read_bytes() == kept[0] and kept[0].count(b"\n") == 1 + 3
    assert "--resume" in capsys.readouterr().err
    assert main(command) == 2 and "plop score --resume" in capsys.readouterr().err
    partial.write_bytes(kept[0][:-10])
    assert main([*command, "--resume"]) == 0
    assert not partial.exists() and len(Scores.load(output).sample_ids) == 24
    assert main([*command[:-2], "--resume"]) == 2
    assert "`--resume` needs `--output`, the file of the run to continue" in capsys.readouterr().err
