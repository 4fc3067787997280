"""A killed run continues at its last finished block and ends with the same scores."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plop_ext import InputError
from plop_ext.cli.main import main
from plop_ext.scores import Scores
from plop_ext.streaming import run, state
from plop_ext.streaming import score as streaming_score
from tests.support.checkpoint import saved
from tests.support.paths import ROOT
from tests.support.quiet import quietly, stream_quietly
from tests.support.tiny_models import gemma3, llama, token_batch

BATCHES = [token_batch([30, 12]), token_batch([17], seed=1)]


class Killed(BaseException):
    """What a test stops a run with."""


def killed(*_: Any, **__: Any) -> None:
    raise Killed


def stopped_after(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next run end after `block`."""
    original = run.Stream._run_block

    def run_block(self: Any, loaded: Any) -> Any:
        if loaded.index > block:
            raise Killed
        return original(self, loaded)

    monkeypatch.setattr(run.Stream, "_run_block", run_block)


def streamed(folder: Path, **settings: Any) -> Scores:
    return stream_quietly(folder, BATCHES, device="cpu", **settings)


@pytest.fixture(autouse=True)
def every_block_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state.State, "is_due", lambda self: True)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return saved(llama(num_hidden_layers=4), tmp_path / "model")


def test_a_run_killed_by_the_system_continues(model: Path, tmp_path: Path) -> None:
    kept, output = tmp_path / "state", tmp_path / "scores.json"
    command = [sys.executable, "-m", "tests.support.streaming_child", str(model), str(kept), str(output)]
    killed = subprocess.run([*command, "2"], cwd=ROOT, timeout=120)
    assert killed.returncode == -9 and not output.exists()
    assert json.loads((kept / "state.json").read_text())["finished"] == 2
    assert subprocess.run([*command, "-1"], cwd=ROOT, timeout=120).returncode == 0
    scores = Scores.load(output)
    assert scores.provenance["streaming"]["resumed_at"] == 2
    whole = streamed(model)
    assert scores.modules == whole.modules and scores.unscored == whole.unscored
    np.testing.assert_array_equal(scores.totals, whole.totals)


@pytest.mark.parametrize("block", [0, 2, 3])
def test_it_continues_after_any_block(block: int, model: Path, tmp_path: Path) -> None:
    whole, kept = streamed(model), tmp_path / "state"
    with pytest.MonkeyPatch.context() as patch:
        stopped_after(block, patch)
        if block < 3:
            with pytest.raises(Killed):
                streamed(model, state=kept)
        else:  # all blocks are finished, and the process died before it could assemble the scores
            patch.setattr(streaming_score, "assemble", killed)
            with pytest.raises(Killed):
                streamed(model, state=kept)
    again = streamed(model, state=kept, resume=True)
    assert again.provenance["streaming"]["resumed_at"] == block + 1
    np.testing.assert_array_equal(again.totals, whole.totals)
    assert again.modules == whole.modules


@pytest.mark.parametrize("killed_in", [1, 2, 3])
def test_a_block_that_is_not_worth_the_write_is_run_again(
    killed_in: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only block 1 is due; so a kill in block 1 costs blocks 0 and 1, and one in block 3 costs block 2."""
    asked: list[int] = []
    monkeypatch.setattr(state.State, "is_due", lambda self: asked.append(0) is None and len(asked) == 2)
    whole, kept = streamed(model), tmp_path / "state"
    with monkeypatch.context() as patch:
        stopped_after(killed_in - 1, patch)
        with pytest.raises(Killed):
            streamed(model, state=kept)
    finished = 0 if killed_in == 1 else 2
    assert json.loads((kept / "state.json").read_text())["finished"] == finished
    assert [path.name for path in kept.glob("hidden-*")] == (["hidden-1"] if finished else [])
    again = streamed(model, state=kept, resume=True)
    assert again.provenance["streaming"]["resumed_at"] == finished
    np.testing.assert_array_equal(again.totals, whole.totals)
    assert not list(kept.glob("hidden-*")) and len(list(kept.glob("result-*.pt"))) == 4


def test_a_state_is_due_when_a_kill_would_cost_more_than_the_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    now = [100.0]
    monkeypatch.setattr(state.time, "monotonic", lambda: now[0])
    kept = state.State(tmp_path / "state", {})
    kept.start()
    for seconds, due in ((19.0, False), (2.0, True)):
        now[0] += seconds
        assert kept.is_due() is due

    def slow(*_: Any) -> None:
        now[0] += 3.0

    monkeypatch.setattr(state, "save_tensors", slow)
    kept.save_hidden(0, 0, [], [])
    kept.save_hidden(0, 1, [], [])
    kept.finish(0, {}, written=True)
    for seconds, due in ((59.0, False), (2.0, True)):
        now[0] += seconds
        assert kept.is_due() is due


def test_what_blocks_hand_on_beside_the_hidden_state_survives(tmp_path: Path) -> None:
    """Gemma 3n lets its last blocks read the keys and values of earlier ones."""
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    config = Gemma3nTextConfig(
        vocab_size=64,
        vocab_size_per_layer_input=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=2,
        altup_num_inputs=2,
        laurel_rank=4,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    folder = saved(Gemma3nForCausalLM(config), tmp_path / "model")
    model = Gemma3nForCausalLM.from_pretrained(folder).eval()
    # Lists of their own, before and after the blocks.
    others: dict[str, Any] = {"exclude": ["altup_projections.0", "altup_unembed_projections.0"]}
    whole = quietly(model, BATCHES, **others)
    np.testing.assert_array_equal(streamed(folder, **others).totals, whole.totals)
    with pytest.MonkeyPatch.context() as patch:
        stopped_after(2, patch)
        with pytest.raises(Killed):
            streamed(folder, state=tmp_path / "state", **others)
    again = streamed(folder, state=tmp_path / "state", resume=True, **others)
    np.testing.assert_array_equal(again.totals, whole.totals)


def test_the_state_of_another_run_is_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "state"
    with pytest.raises(InputError, match=r"`.*state` holds no state of a streamed run; start without `resume`"):
        streamed(model, state=kept, resume=True)
    with monkeypatch.context() as patch:
        stopped_after(1, patch)
        with pytest.raises(Killed):
            streamed(model, state=kept)
    with pytest.raises(InputError, match="the state of another run: its settings differs"):
        streamed(model, state=kept, resume=True, token_step=2)
    with pytest.raises(InputError, match="the state of another run: its data differs"):
        stream_quietly(model, BATCHES[:1], device="cpu", state=kept, resume=True)
    other = saved(gemma3(), tmp_path / "other")
    with pytest.raises(InputError, match="the state of another run: its checkpoint differs"):
        stream_quietly(str(other), BATCHES, device="cpu", state=kept, resume=True)
    with pytest.raises(InputError, match="`resume` needs `state`"):
        streamed(model, resume=True)


def test_a_new_run_clears_an_old_state_but_no_other_folder(model: Path, tmp_path: Path) -> None:
    kept = tmp_path / "state"
    with pytest.MonkeyPatch.context() as patch:
        stopped_after(1, patch)
        with pytest.raises(Killed):
            streamed(model, state=kept)
    assert streamed(model, state=kept).provenance["streaming"]["resumed_at"] == 0
    state.remove(kept)
    assert not kept.exists()
    kept.mkdir()
    (kept / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match=r"`.*state` is not empty and no state of a streamed run; name another"):
        streamed(model, state=kept)
    state.remove(kept)
    assert (kept / "mine.txt").read_text() == "precious"


def test_a_finished_run_whose_scores_were_not_written_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "scores.json"
    arguments = ["score", "plop-tiny", "arithmetic", "--stream", "--quiet", "--device", "cpu", "-o", str(output)]
    with monkeypatch.context() as patch:
        patch.setattr(Scores, "save", killed)
        with pytest.raises(Killed):
            main(arguments)
    with monkeypatch.context() as patch:
        patch.setattr(run.Stream, "_run_block", killed)  # nothing is left to run
        assert main([*arguments, "--resume"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]


def test_a_streamed_run_leaves_the_journal_of_one_in_memory(tmp_path: Path) -> None:
    output, journal = tmp_path / "scores.json", tmp_path / "scores.json.partial"
    journal.write_text("hours of work")
    arguments = ["score", "plop-tiny", "arithmetic", "--samples", "2", "--quiet", "--device", "cpu", "-o", str(output)]
    assert main([*arguments, "--stream"]) == 0
    assert output.is_file() and journal.read_text() == "hours of work"


def test_the_scores_are_written_before_anything_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "scores.json"
    monkeypatch.setattr("plop_ext.report.tables.scores_table", killed)
    monkeypatch.setattr("plop_ext.cli.stream.peaks_line", killed)
    for more in ([], ["--stream"]):
        with pytest.raises(Killed):
            main(["score", "plop-tiny", "arithmetic", "--samples=2", "--quiet", "--device=cpu", f"-o{output}", *more])
        Scores.load(output)
        output.unlink()


def test_the_command_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "scores.json"
    arguments = ["score", "plop-tiny", "arithmetic", "--stream", "--quiet", "--device", "cpu", "-o", str(output)]
    assert main([*arguments, "--resume"]) == 2
    with monkeypatch.context() as patch:
        stopped_after(3, patch)
        with pytest.raises(Killed):
            main(arguments)
    assert (tmp_path / "scores.json.stream" / "state.json").is_file() and not output.exists()
    assert main([*arguments, "--resume"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]
    again = Scores.load(output)
    assert again.provenance["streaming"]["resumed_at"] == 4
    whole = tmp_path / "whole.json"
    assert (
        main(["score", "plop-tiny", "arithmetic", "--samples", "16", "--quiet", "--device", "cpu", "-o", str(whole)])
        == 0
    )
    np.testing.assert_array_equal(again.totals, Scores.load(whole).totals)
