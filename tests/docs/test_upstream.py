"""The pull request to PEFT in docs/upstream works against the installed PEFT, and gives this package's scores."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import peft.helpers
import pytest
import torch

import plop_ext
from plop_ext.demo_assets import model_path
from tests.support.paths import ROOT
from tests.support.tiny_lm import tiny_llama

UPSTREAM = ROOT / "docs" / "upstream"


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"upstream_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


helpers = loaded(UPSTREAM / "helpers.py")


@pytest.fixture(autouse=True)
def appended_to_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """The helper as part of `peft.helpers`."""
    for name in ("PlopSelector", "find_plop_target_modules"):
        monkeypatch.setattr(peft.helpers, name, getattr(helpers, name), raising=False)
    # The tests of the pull request replace this by its name in PEFT.
    monkeypatch.setattr(helpers, "_has_plop_ext", lambda: peft.helpers._has_plop_ext())
    monkeypatch.setattr(peft.helpers, "_has_plop_ext", lambda: False, raising=False)


TestPlopSelector = loaded(UPSTREAM / "test_helpers.py").TestPlopSelector


def test_hooks_and_kernels_give_the_same_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(hidden_size=160, intermediate_size=192, num_attention_heads=4, num_key_value_heads=4)
    mask = torch.tensor([[1] * 9 + [0] * 3, [1] * 12])
    batches = [{"input_ids": torch.randint(3, 200, (2, 12)), "attention_mask": mask} for _ in range(3)]
    by_hooks = peft.helpers.PlopSelector(model, batches, show_progress=False)
    by_kernels = peft.helpers.PlopSelector(model, batches, show_progress=False)
    expected = by_hooks.scores()
    monkeypatch.setattr(peft.helpers, "_has_plop_ext", lambda: True)
    assert by_kernels.scores() == pytest.approx(expected, rel=1e-5)
    own = plop_ext.score(model, batches, stop=None, max_samples=None, progress=False)
    assert expected == pytest.approx(dict(zip(own.module_names, own.nfn.tolist(), strict=True)), rel=1e-5)
    assert by_hooks.get_best_targets() == by_kernels.get_best_targets()


@pytest.mark.slow
def test_the_example_compares_the_placements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"{n} + {n} = {2 * n}"}) + "\n" for n in range(40)))
    words = ["--model", str(model_path()), "--data", str(data), "--steps", "2", "--rates", "1e-3"]
    monkeypatch.setattr(sys, "argv", ["plop_finetuning.py", *words])
    loaded(UPSTREAM / "examples" / "PLoP" / "plop_finetuning.py").main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("PLoP ") and lines[1].startswith("all linear ")
    counts = [int(line.split(" parameters")[0].rsplit(None, 1)[1].replace(",", "")) for line in lines]
    assert counts[0] == pytest.approx(counts[1], rel=0.05)


def test_every_file_has_its_place() -> None:
    text = (UPSTREAM / "README.md").read_text()
    assert all(f"`{path.name}`" in text for path in UPSTREAM.iterdir() if path.is_file() and path.name != "README.md")
