"""Every benchmark runs, its result renders, and the document check sees stale figures. No figure is tested here."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import results, timing, to_markdown
from tests.support.paths import ROOT

SCRIPTS = (
    "accuracy",
    "cpu_overhead",
    "early_stop",
    "fused_kernels",
    "gated_projection",
    "kernel_bandwidth",
    "model_forward",
    "moe_overhead",
    "scoring_overhead",
    "streaming",
    "time_to_placement",
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """The result file of each script's quick run on the CPU."""
    folder, threads = tmp_path_factory.mktemp("results"), torch.get_num_threads()
    paths = {name: folder / f"{name}.json" for name in SCRIPTS}
    try:
        for name, path in paths.items():
            importlib.import_module(f"benchmarks.{name}").main(["--quick", "--device", "cpu", "--output", str(path)])
        yield paths
    finally:
        torch.set_num_threads(threads)


def test_no_script_is_forgotten() -> None:
    scripts = [path for path in (ROOT / "benchmarks").glob("*.py") if '__name__ == "__main__"' in path.read_text()]
    measuring = {path.stem for path in scripts if "results.parser(" in path.read_text()}
    assert measuring == set(SCRIPTS)
    assert set(to_markdown.RENDERERS) == {*SCRIPTS, "profile_kernels", "resources"}  # made by tools


def numbers(value: Any) -> Iterator[float]:
    """Every number in a nest of JSON values."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, (int, float)):
        yield value


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_quick_run_writes_a_result_that_says_what_it_is(name: str, written: dict[str, Path]) -> None:
    result = json.loads(written[name].read_text())
    assert result["benchmark"] == name and result["quick"] is True and result["rows"]
    assert all(math.isfinite(number) for number in numbers(result["rows"]))
    environment = result["environment"]
    assert environment["torch"] == torch.__version__ and environment["gpu"] is None
    assert environment["command"] == f"python -m benchmarks.{name} --quick --device cpu --output {name}.json"


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_result_renders_as_a_table_that_says_it_is_quick(name: str, written: dict[str, Path]) -> None:
    text = to_markdown.render(json.loads(written[name].read_text()))
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert tables
    for lines in tables:
        assert len(lines) > 2 and len({line.count("|") for line in lines}) == 1
    assert "**quick run, figures mean nothing**" in text


@pytest.mark.slow
def test_update_then_check(written: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document, files = tmp_path / "README.md", [str(path) for path in written.values()]
    sections = [f"<!-- benchmark: {name} -->\nold\n<!-- /benchmark: {name} -->\n" for name in SCRIPTS[:2]]
    document.write_text("Before.\n" + "Between.\n".join(sections) + "After.\n")
    with pytest.raises(SystemExit, match=r"README.md does not show these results; run with --update .*README.md"):
        to_markdown.main([*files, "--check", str(document)])
    assert "old" in document.read_text()
    to_markdown.main([*files, "--update", str(document)])
    text = document.read_text()
    assert "old" not in text and all(part in text for part in ("Before.\n", "Between.\n", "After.\n"))
    for name in SCRIPTS[:2]:
        assert to_markdown.render(json.loads(written[name].read_text())) in text
    to_markdown.main([*files, "--check", str(document)])
    to_markdown.main([*files, "--update", str(document)])
    assert document.read_text() == text
    figure = next(character for character in text if character.isdigit())
    document.write_text(text.replace(figure, str(9 - int(figure)), 1))
    with pytest.raises(SystemExit):
        to_markdown.main([*files, "--check", str(document)])
    to_markdown.main(files)
    assert "## accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--output", "result.txt"], "--output: must end in .json, got result.txt"),
        (["--device", "abacus"], "--device: "),
    ],
)
def test_arguments_out_of_range(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        results.parse(results.parser(None), arguments)
    assert message in capsys.readouterr().err


def test_rounds_are_interleaved_and_warm_up_is_not_counted() -> None:
    order: list[str] = []
    candidates = [timing.Candidate(name, lambda _, name=name: order.append(name)) for name in "abc"]
    seconds = timing.measure(candidates, torch.device("cpu"), rounds=30, warmup=2)
    rounds = ["".join(order[start : start + 3]) for start in range(0, len(order), 3)]
    assert len(rounds) == 32 and set(rounds) == {"abc", "acb", "bac", "bca", "cab", "cba"}
    assert {name: len(values) for name, values in seconds.items()} == {"a": 30, "b": 30, "c": 30}


@pytest.mark.parametrize("count", [1, 2, 3, 6, 11])
def test_orders_are_balanced(count: int) -> None:
    size = count * (1 + count % 2)
    stream = timing.orders(count)
    for block in (list(itertools.islice(stream, size)) for _ in range(3)):
        assert all(sorted(order) == list(range(count)) for order in block)
        places = Counter((place, number) for order in block for place, number in enumerate(order))
        behind = Counter(pair for order in block for pair in itertools.pairwise(order))
        assert len(places) == count**2 and set(places.values()) == {size // count}
        assert len(behind) == count * (count - 1) and len(set(behind.values())) <= 1


def test_a_lead_runs_in_front_unmeasured_and_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            pass

        def record(self) -> None:
            order.append("record")

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, other: Event) -> float:
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("wait"))
    candidate = timing.Candidate("a", lambda _: order.append("run"))
    for lead, expected in ((False, "wait record run record"), (True, "wait run record run record")):
        order.clear()
        assert timing.measure([candidate], torch.device("cuda"), rounds=1, warmup=0, lead=lead) == {"a": [0.002]}
        assert order == expected.split()


def test_more_rounds_run_until_the_time_is_up() -> None:
    candidate = timing.Candidate("a", lambda _: time.sleep(0.01))
    assert len(timing.measure([candidate], torch.device("cpu"), rounds=1, at_least_s=0.1)["a"]) > 2


def test_ratios_are_taken_round_by_round() -> None:
    summary = timing.ratios([2.0, 4.0, 30.0], [1.0, 2.0, 10.0])
    assert summary.median == 2.0 and summary.p20 == 2.0 and 2.0 < summary.p80 < 3.0
    assert summary.row("x", digits=1) == {"x": 2.0, "x_p20": 2.0, "x_p80": 2.6}
