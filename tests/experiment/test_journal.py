"""The journal of trials: whole lines, a torn last one dropped, and a run of other inputs refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from plop_ext.errors import InputError
from plop_ext.experiment.journal import TrialJournal, recorded
from plop_ext.experiment.race import Outcome, Trial

INPUTS = {"model": {"weights": "ab"}, "settings": {"rates": (0.1, 0.2)}}
TRIALS = [Trial("a [b] : c", 0.1 * number, number, 10, number % 2 == 1) for number in range(4)]
OUTCOMES = [
    Outcome(1 / 3, False),
    Outcome(0.1, False, (0.1 + 0.2, 1e-300), 1.5, 0.01),
    Outcome(math.nan, True),
    Outcome(2.0, True, (math.nan, 1.0)),
]


def write(path: Path, count: int = 4) -> bytes:
    with TrialJournal(path, INPUTS, resume=False) as journal:
        journal.start({"schedule": {"steps": 10}})
        for trial, outcome in list(zip(TRIALS, OUTCOMES, strict=True))[:count]:
            journal.add(trial, outcome)
    return path.read_bytes()


def same(left: Outcome | None, right: Outcome) -> bool:
    return repr(left) == repr(right)  # NaN equals NaN, and every digit counts


def test_every_figure_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    write(tmp_path / "j")
    with TrialJournal(tmp_path / "j", INPUTS, resume=True) as journal:
        assert journal.plan == {"schedule": {"steps": 10}} and len(journal) == 4
        assert all(same(journal.find(trial), outcome) for trial, outcome in zip(TRIALS, OUTCOMES, strict=True))


def test_a_file_cut_at_any_byte_keeps_its_whole_lines(tmp_path: Path) -> None:
    data = write(tmp_path / "j")
    ends = [index + 1 for index, byte in enumerate(data) if byte == ord("\n")]
    for cut in range(0, len(data) + 1):
        path = tmp_path / "cut"
        path.write_bytes(data[:cut])
        with TrialJournal(path, INPUTS, resume=True) as journal:
            whole = sum(end <= cut for end in ends)
            assert len(journal) == max(0, whole - 2) and (journal.plan is not None) == (whole > 1)
            if journal.plan is None:
                journal.start({"schedule": {"steps": 10}})
            for trial, outcome in zip(TRIALS, OUTCOMES, strict=True):
                if journal.find(trial) is None:
                    journal.add(trial, outcome)
        assert path.read_bytes() == data
        path.unlink()


def test_known_trials_are_not_run_again(tmp_path: Path) -> None:
    write(tmp_path / "j", count=2)
    ran: list[Trial] = []

    def run(trial: Trial) -> Outcome:
        ran.append(trial)
        return OUTCOMES[2]

    with TrialJournal(tmp_path / "j", INPUTS, resume=True) as journal:
        ask = recorded(journal, run)
        assert [same(ask(trial), outcome) for trial, outcome in zip(TRIALS[:3], OUTCOMES, strict=False)] == [True] * 3
        ask(TRIALS[2])
    assert ran == [TRIALS[2]]


def test_without_a_file_it_is_kept_in_memory() -> None:
    with TrialJournal(None, INPUTS, resume=False) as journal:
        journal.start({})
        journal.add(TRIALS[0], OUTCOMES[0])
        assert journal.find(TRIALS[0]) == OUTCOMES[0] and journal.find(TRIALS[1]) is None


class TestRefusals:
    def test_an_earlier_run_is_not_overwritten(self, tmp_path: Path) -> None:
        data = write(tmp_path / "j")
        with pytest.raises(InputError, match="belongs to an earlier run; continue it with `resume`, or delete it"):
            TrialJournal(tmp_path / "j", INPUTS, resume=False)
        assert (tmp_path / "j").read_bytes() == data

    @pytest.mark.parametrize(
        ("inputs", "match"),
        [
            ({**INPUTS, "model": {"weights": "cd"}}, "of another run: its model: weights is ab, now it is cd"),
            ({"model": INPUTS["model"]}, "its settings is {'rates': "),
            ({**INPUTS, "device": "x"}, "its device is None, now it is x"),
        ],
    )
    def test_other_inputs(self, tmp_path: Path, inputs: dict, match: str) -> None:
        data = write(tmp_path / "j")
        with pytest.raises(InputError, match=match):
            TrialJournal(tmp_path / "j", inputs, resume=True)
        assert (tmp_path / "j").read_bytes() == data

    @pytest.mark.parametrize("text", ["{}\n", "text\n", '{"format": "plop_ext.trials", "version": 99}\n', "[1]\n"])
    def test_another_file(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "j").write_text(text)
        with pytest.raises(InputError, match="is no journal of trials, or damaged; delete it"):
            TrialJournal(tmp_path / "j", INPUTS, resume=True)
        assert (tmp_path / "j").read_text() == text

    def test_damage_in_the_middle(self, tmp_path: Path) -> None:
        lines = write(tmp_path / "j").split(b"\n")
        lines[3] = lines[3][:20]
        (tmp_path / "j").write_bytes(b"\n".join(lines))
        with pytest.raises(InputError, match="damaged"):
            TrialJournal(tmp_path / "j", INPUTS, resume=True)

    def test_two_processes(self, tmp_path: Path) -> None:
        pytest.importorskip("fcntl")
        with (
            TrialJournal(tmp_path / "j", INPUTS, resume=False),
            pytest.raises(InputError, match="is in use by another process"),
        ):
            TrialJournal(tmp_path / "j", INPUTS, resume=True)

    def test_a_folder_that_does_not_exist(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"cannot write `.*`: No such file or directory"):
            TrialJournal(tmp_path / "no" / "j", INPUTS, resume=True)
