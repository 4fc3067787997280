"""Every benchmark runs, its result renders, and the document check sees stale figures. No figure is tested here."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import results, to_markdown
from tests.support.paths import ROOT

SCRIPTS = (
    "accuracy",
    "adapter_cost",
    "cpu_overhead",
    "early_stop",
    "first_seconds",
    "fused_kernels",
    "gated_projection",
    "host_cost",
    "kernel_bandwidth",
    "large_files",
    "model_forward",
    "moe_overhead",
    "scaling",
    "scoring_overhead",
    "streaming",
    "time_to_placement",
    "training_overhead",
    "whole_api",
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
    # What takes minutes at its smallest, and what tools make.
    assert set(to_markdown.RENDERERS) == {*SCRIPTS, "demo_seeds", "profile_kernels", "resources"}


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
