"""A test imports no other test: what two of them share lies in tests/support."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.support.paths import ROOT


def imported_from_tests(path: Path) -> set[str]:
    """The modules of `tests` that a file imports, anywhere in it."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join((*above, *filter(None, [node.module])))
            # `from tests.support import tiny_models` imports a module, `from tests.support.paths import ROOT` a name.
            found.update({module, *(f"{module}.{name.name}" for name in node.names)})
    return {name for name in found if name.startswith("tests.")}


def test_only_support_is_imported() -> None:
    found = {path.relative_to(ROOT).as_posix(): imported_from_tests(path) for path in (ROOT / "tests").rglob("*.py")}
    wrong = {
        path: others
        for path, names in found.items()
        if (others := {name for name in names if not f"{name}.".startswith("tests.support.")})
    }
    assert not wrong, f"move what is shared to tests/support: {wrong}"


@pytest.mark.parametrize(
    "line, expected",
    [
        ("from tests.ops.test_fused import check", "tests.ops.test_fused"),
        ("from tests.ops import test_fused", "tests.ops.test_fused"),
        ("import tests.conftest", "tests.conftest"),
        ("from . import test_signal", "tests.build.test_signal"),
        ("from ..conftest import device", "tests.conftest"),
        ("def f():\n    from tests.docs.test_docs import README", "tests.docs.test_docs"),
    ],
)
def test_every_form_of_import_is_seen(line: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: line)
    assert expected in imported_from_tests(ROOT / "tests/build/test_x.py")
