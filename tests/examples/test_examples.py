"""The examples run, and show what they promise; `make examples-test` installs what they need."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from plop_ext.report.report import make_report
from plop_ext.scores import Scores
from tests.support.paths import ROOT

EXAMPLES = ROOT / "examples"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    sys.modules.pop("worked_sums", None)


def example(name: str, *needed: str) -> Any:
    for package in needed:
        pytest.importorskip(package)
    return importlib.import_module(name)


def test_every_example_is_tested_and_listed() -> None:
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")} - {"worked_sums.py"}
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    tested = Path(__file__).read_text(encoding="utf-8")
    for name in files:
        assert f"`{name}`" in listed and Path(name).stem in tested, name


@pytest.mark.slow
def test_sft_lowers_the_loss_and_serves_the_adapter(tmp_path: Path) -> None:
    losses = example("sft", "trl").main(tmp_path)
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 8
    assert (tmp_path / "merged" / "model.safetensors").exists()


@pytest.mark.slow
def test_dpo_parts_chosen_from_rejected() -> None:
    margins = example("dpo", "trl").main()
    assert max(abs(margin) for margin in margins[:1]) < 0.05 and sum(margins[-3:]) / 3 > 0.2


@pytest.mark.slow
def test_plain_trainer_records_the_drift(tmp_path: Path) -> None:
    drift = example("plain_trainer").main(tmp_path)
    assert [record["step"] for record in drift] == [5, 10, 15, 20]
    path = tmp_path / "training.json"
    make_report(Scores.load(path), str(path)).write(tmp_path / "page.html")
    assert "NFN while training" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_lightning_module_lowers_the_loss() -> None:
    losses = example("lightning_module", "lightning").main()
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


@pytest.mark.slow
def test_notebook_runs_with_pictures() -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # none is committed
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": "."}}).execute()
    shown = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in data for data in shown) >= 3
    assert sum("<table>" in data.get("text/html", "") for data in shown) >= 2
    assert Path("adapter", "adapter_config.json").exists()


@pytest.mark.slow
def test_configs_are_those_of_the_placement() -> None:
    written = example("configs").texts()
    for name, text in written.items():
        assert (EXAMPLES / name).read_text(encoding="utf-8") == text, f"run {EXAMPLES / 'configs.py'}"
        yaml.safe_load(text)
    axolotl, factory = (yaml.safe_load(written[name]) for name in ("axolotl.yaml", "llama_factory.yaml"))
    assert sorted(axolotl["lora_target_modules"]) == sorted(factory["lora_target"].split(","))
    assert axolotl["lora_r"] == factory["lora_rank"] == yaml.safe_load(written["vllm.yaml"])["max-lora-rank"]
