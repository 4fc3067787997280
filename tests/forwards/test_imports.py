"""The components that run a model import only components below them, also within functions."""

from __future__ import annotations

import ast

import pytest

from tests.support.paths import ROOT

BELOW = {
    "collecting": {"layers", "ops", "streams", "totals"},
    "forwards": {"_warnings", "collecting", "errors", "layers", "ops", "streams", "totals"},
}


@pytest.mark.parametrize("component", BELOW)
def test_a_component_imports_what_lies_below_it(component: str) -> None:
    found = set()
    for path in (ROOT / "plop_ext" / component).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif modules == ["plop_ext"]:
                modules = [f"plop_ext.{alias.name}" for alias in node.names]
            assert not (isinstance(node, ast.ImportFrom) and node.level), path
            found |= {module.split(".")[1] for module in modules if module.startswith("plop_ext.")}
    assert found - {component} <= BELOW[component]
