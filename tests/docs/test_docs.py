"""The examples of the README and of the docstrings run as they stand."""

from __future__ import annotations

import doctest
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import plop_ext
from plop_ext.layers import adapter, discover
from tests.support import tiny_models
from tests.support.markdown import python_blocks
from tests.support.paths import ROOT
from tests.support.tiny_lm import tiny_llama
from tests.support.trainings import trainer_of

README = ROOT / "README.md"
WITH_EXAMPLES = sorted(path for path in (ROOT / "plop_ext").rglob("*.py") if ">>> " in path.read_text())


def test_blocks_are_found() -> None:
    text = "a\n```python\nx = 1\n\ny = 2\n```\n```sh\nls\n```\n\n```python\nprint(x)\n```\n"
    assert python_blocks(text) == ["x = 1\n\ny = 2\n", "print(x)\n"]


def test_the_readme_runs(tmp_path: Path) -> None:
    """All examples one after the other, as a reader would type them, in an empty folder."""
    blocks = python_blocks(README.read_text(encoding="utf-8"))
    assert blocks
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstring_examples_run(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import peft

    monkeypatch.setattr(adapter, "_ADAPTERS", list(adapter._ADAPTERS))  # an example registers one
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    # What an example leaves out: a model, and data for it.
    names = {"model": tiny_models.llama(), "dataloader": [tiny_models.token_batch([20, 31])], "peft": peft}
    names |= {"plop_ext": plop_ext, "discover": discover}
    if path.parent.name == "integrations":
        names["trainer"] = trainer_of(tiny_llama(), tmp_path)
    monkeypatch.chdir(tmp_path)
    results = doctest.testmod(module, extraglobs=names, optionflags=doctest.ELLIPSIS)
    assert results.attempted > 0 and results.failed == 0


def test_every_public_name_is_documented() -> None:
    for name in plop_ext.__all__:
        value = getattr(plop_ext, name)
        assert isinstance(value, str) or (value.__doc__ or "").strip(), name
