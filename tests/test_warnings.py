"""A warning of this package points at the caller's line, by one helper."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import plop_ext
from plop_ext import _warnings
from plop_ext.scores import Scores
from tests.support import gain_tables, tiny_models
from tests.support.architecture_parts import text_batch
from tests.support.architectures import ARCHITECTURES
from tests.support.paths import ROOT

SHORT = [tiny_models.token_batch([20, 3])]


def scored() -> Scores:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return plop_ext.score(tiny_models.llama(), SHORT, progress=False)


def entry_points(tmp_path: Path) -> dict[str, Callable[[], Any]]:
    """Calls of the public interface that warn, each on a line of this file."""
    scores = scored()
    experts = ARCHITECTURES["qwen3_moe"].build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        moe = plop_ext.score(experts, [text_batch()], progress=False)
        widened = moe.place(types=["up_proj"])
    tiny_models.llama().save_pretrained(tmp_path)
    return {
        "score": lambda: plop_ext.score(tiny_models.llama(), SHORT, progress=False),
        "score, fast": lambda: plop_ext.score(tiny_models.gpt2(), SHORT, fast=True, progress=False),
        "score_streaming": lambda: plop_ext.score_streaming(str(tmp_path), SHORT, device="cpu", progress=False),
        "find_plop_target_modules": lambda: plop_ext.find_plop_target_modules(
            tiny_models.llama(), SHORT, types=2, progress=False
        ),
        "place, types": lambda: scores.place(types=2),
        "place, modules": lambda: gain_tables.scores(gain_tables.table([0.5, 2.0])).place(modules=3),
        "lora_config": lambda: widened.lora_config(),
    }


def test_a_warning_points_at_the_line_that_called_the_package(tmp_path: Path) -> None:
    for name, call in entry_points(tmp_path).items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        ours = [warning for warning in caught if issubclass(warning.category, UserWarning)]
        assert ours, name
        line = call.__code__.co_firstlineno
        assert {(warning.filename, warning.lineno) for warning in ours} == {(__file__, line)}, name


def test_a_warning_is_shown_once_per_line_and_has_its_category() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            _warnings.warn("once", RuntimeWarning)
        _warnings.warn("once", RuntimeWarning)
    assert [warning.category for warning in caught] == [RuntimeWarning, RuntimeWarning]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module=re.escape(__name__))
        with pytest.raises(UserWarning, match="of this module"):
            _warnings.warn("of this module")


@pytest.mark.parametrize("statement", ["import plop_ext.ops", "from plop_ext import Collector"])
def test_a_missing_library_points_at_the_import(statement: str, tmp_path: Path) -> None:
    """The import system lies between a statement and the module that warns."""
    package = tmp_path / "plop_ext"
    package.symlink_to(ROOT / "plop_ext")
    script = tmp_path / "script.py"
    script.write_text(f"from pathlib import Path\nPath.exists = lambda self: False\n{statement}\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"{script}:3: UserWarning: plop_ext runs on its slower PyTorch kernels" in done.stderr, done.stderr


def test_the_package_warns_through_the_helper_only() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {text}"
        for path in sorted((ROOT / "plop_ext").rglob("*.py"))
        if path.name != "_warnings.py"
        for text in re.findall(r"stacklevel=|warnings\.warn\b|warn_explicit|from warnings import", path.read_text())
    ]
    assert found == []
