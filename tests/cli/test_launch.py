"""The command under torchrun and accelerate launch: one file, one table, one set of messages, one error."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from plop_ext.cli.data_sets import each_data, file_name
from plop_ext.cli.launch import Launch
from plop_ext.cli.main import main
from plop_ext.cli.parallel import sizes
from plop_ext.errors import InputError
from plop_ext.scores import Scores
from tests.support.paths import ROOT

SCORE = ["score", "plop-tiny", "arithmetic", "--device", "cpu", "--samples", "16"]


@pytest.mark.parametrize(
    ("text", "processes", "expected"),
    [
        ("dp", 8, {"dp": 8}),
        ("tp", 4, {"tp": 4}),
        ("tp=4,dp=2", 8, {"tp": 4, "dp": 2}),
        ("tp=4,dp", 8, {"tp": 4, "dp": 2}),
        ("fsdp", 1, {"fsdp": 1}),
    ],
)
def test_sizes_fill_the_processes(text: str, processes: int, expected: dict[str, int]) -> None:
    assert sizes(text, processes) == expected


@pytest.mark.parametrize("text", ["", "pp", "tp=x", "tp=0", "tp,dp", "tp=3", "tp=2,dp=2", "tp,tp", "ep,tp", "dp=-1"])
def test_sizes_that_fit_no_processes_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="`--parallel`"):
        sizes(text, 8)


@pytest.mark.parametrize(
    ("data", "name"),
    [("arithmetic", "arithmetic.json"), ("org/data", "org--data.json"), ("../a b/c", "c.json"), ("...", "data.json")],
)
def test_names_of_data_are_names_of_files(data: str, name: str) -> None:
    found = file_name(data)
    assert "/" not in found and (found == name or data.startswith(".."))


def test_files_are_named_without_what_says_how_they_are_packed(tmp_path: Path) -> None:
    path = tmp_path / "code.v2.jsonl.gz"
    path.touch()
    assert file_name(str(path)) == "code.v2.json"


def test_two_data_of_one_name_are_refused(tmp_path: Path) -> None:
    paths = [tmp_path / name / "data.jsonl" for name in "ab"]
    for path in paths:
        path.parent.mkdir()
        path.touch()
    args = argparse.Namespace(
        data=list(map(str, paths)),
        output="x",
        heatmap=None,
        stream=False,
        dry_run=False,
        resume=False,
        launch=Launch(),
    )
    with pytest.raises(InputError, match=r"would both be scored to data\.json"):
        each_data(args)


@pytest.mark.slow
def test_one_command_scores_several_data_and_leaves_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from plop_ext import models

    loads: list[str] = []
    load = models.load_model
    monkeypatch.setattr(models, "load_model", lambda name, **options: (loads.append(name), load(name, **options))[1])
    command = [*SCORE[:3], "prose", *SCORE[3:], "-q", "-o", str(tmp_path / "out")]
    assert main(command) == 0 and loads == ["plop-tiny"]
    one = tmp_path / "one.json"
    assert main([*SCORE, "-q", "-o", str(one)]) == 0
    found = Scores.load(tmp_path / "out" / "arithmetic.json")
    assert found.totals.values.tobytes() == Scores.load(one).totals.values.tobytes()
    (tmp_path / "out" / "prose.json").unlink()
    capsys.readouterr()
    assert main(command) == 0
    assert "is finished and of the same inputs; nothing to do" in " ".join(capsys.readouterr().err.split())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["arithmetic.json", "prose.json"]
    assert main([*command, "--seed", "1"]) == 2
    assert "was made from other inputs" in capsys.readouterr().err


def launched(*words: str, launcher: str = "torchrun", processes: int = 2) -> subprocess.CompletedProcess[str]:
    starts = {
        "torchrun": ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"],
        "accelerate": [
            *("-m", "accelerate.commands.launch", "--cpu", f"--num_processes={processes}", "--num_machines=1"),
            *("--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"),
        ],
    }
    command = [sys.executable, *starts[launcher], "-m", "plop_ext", *words]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150, env=env)


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "way"), [("torchrun", "dp"), ("torchrun", "fsdp"), ("accelerate", "dp")])
def test_a_launch_writes_one_file_and_one_table(launcher: str, way: str, tmp_path: Path) -> None:
    output, one = tmp_path / "two.json", tmp_path / "one.json"
    done = launched(*SCORE, "--parallel", way, "-o", str(output), launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("NFN by module type") == 1 and done.stdout.count("scores: ") == 1
    assert [done.stderr.count(text) for text in ("loading plop-tiny", "reading arithmetic", "scoring 2/2")] == [
        1,
        1,
        1,
    ]
    assert main([*SCORE, "-q", "-o", str(one)]) == 0
    found, expected = Scores.load(output), Scores.load(one)
    assert found.totals.values.tobytes() == expected.totals.values.tobytes()
    assert found.sample_ids.tolist() == expected.sample_ids.tolist() and (found.nfn == expected.nfn).all()
    assert found.provenance["inputs"] == expected.provenance["inputs"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.json", "two.json"]
    again = launched(*SCORE, "--parallel", way, "-o", str(output), "--resume", launcher=launcher)
    assert again.returncode == 0 and again.stderr.count("is finished and of the same inputs; nothing to do") == 1


@pytest.mark.slow
def test_an_error_of_a_launch_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "there.json").write_text("{}")
    for words in ([*SCORE, "-o", str(tmp_path / "there.json")], ["score", str(tmp_path / "no model"), "arithmetic"]):
        done = launched(*words)
        assert done.returncode and done.stderr.count("plop: ") == 1, done.stderr
        assert "Traceback" not in done.stderr.partition("torch/distributed/elastic")[0]


@pytest.mark.slow
def test_a_command_of_one_process_runs_once(tmp_path: Path) -> None:
    assert main([*SCORE, "-q", "-o", str(tmp_path / "s.json")]) == 0
    done = launched("place", str(tmp_path / "s.json"))
    assert done.returncode == 0 and done.stdout.count("target_modules") == 1


@pytest.mark.slow
def test_training_in_two_processes_is_training_in_one(tmp_path: Path) -> None:
    """Batches are the same samples, whose gradients are averaged; float32 sums differ in their order."""
    scores, placement = str(tmp_path / "s.json"), str(tmp_path / "p.json")
    assert main([*SCORE, "-q", "-o", scores]) == 0 and main(["place", scores, "-o", placement]) == 0
    words = ["finetune", "plop-tiny", "arithmetic", "--placement", placement, "--device", "cpu", "--json", "-q"]
    words += ["--steps", "4", "--batch-size", "4", "--max-length", "64"]
    losses = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        done = launched(*words, "-o", str(folder), processes=processes)
        assert done.returncode == 0, done.stderr[-2000:]
        result = json.loads(done.stdout)
        assert result["steps"] == 4 and result["output_dir"] == str(folder)
        assert (folder / "adapter_model.safetensors").is_file()
        losses.append([result["loss_before"], result["loss_after"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0][1] != losses[0][0]


@pytest.mark.slow
def test_commands_that_try_placements_run_in_one_process() -> None:
    done = launched("compare", "plop-tiny", "arithmetic", "--scores", "s.json")
    assert done.returncode and done.stderr.count("plop: `plop compare` runs in one process; start it without") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("way", "processes"), [("tp", 2), ("tp=2,dp=2", 4)])
def test_a_launch_divides_a_model(way: str, processes: int, tmp_path: Path) -> None:
    """A rank adds its columns in float32, so the scores are those of one process to rounding."""
    output, one = tmp_path / "divided.json", tmp_path / "one.json"
    words = [*SCORE, "--dtype", "float32", "-q"]
    done = launched(*words, "--parallel", way, "-o", str(output), processes=processes)
    assert done.returncode == 0, done.stderr
    assert main([*words, "-o", str(one)]) == 0
    found, expected = Scores.load(output), Scores.load(one)
    assert found.module_names == expected.module_names
    assert found.sample_ids.tolist() == expected.sample_ids.tolist()
    assert found.nfn == pytest.approx(expected.nfn, rel=1e-6)
