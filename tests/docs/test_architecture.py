"""docs/architecture.md lists every component of the package and the imports between them, from top to bottom."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.paths import ROOT

PACKAGE = ROOT / "plop_ext"
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
LOADER = ("ops", "_C")


class Import(NamedTuple):
    """One import statement: `line` of the module `importer` names the module `imported`."""

    importer: str
    line: int
    imported: str

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def modules_of(package: Path) -> dict[str, Path]:
    """The dotted name of each module; a package's `__init__` counts as a module of its own."""
    return {".".join(path.relative_to(package.parent).with_suffix("").parts): path for path in package.rglob("*.py")}


def imports_of(package: Path) -> list[Import]:
    """Every import of the package's own modules: at the top, within functions and under `TYPE_CHECKING`."""
    modules = modules_of(package)
    found = []
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{name}:{node.lineno}: imports are absolute"
                targets = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for target in targets:
                if target.split(".")[0] == package.name:
                    found.append(Import(name, node.lineno, _resolve(target, modules)))
    return found


def _resolve(target: str, modules: Mapping[str, Path]) -> str:
    """The module that `target` is, or is a name of."""
    parent = target.rpartition(".")[0]
    candidates = (target, f"{target}.__init__", f"{target}.__init__" if not parent else parent, f"{parent}.__init__")
    if target.endswith("._C"):  # compiled: no module here
        return target
    return next(candidate for candidate in candidates if candidate in modules)


def component_of(module: str) -> str:
    """The file or folder directly in the package that holds a module."""
    return module.split(".")[1]


def table(heading: str) -> list[list[str]]:
    """Cells of the table under `heading`, without its header."""
    section = TEXT.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def quoted(cell: str) -> list[str]:
    """The names in backticks."""
    return re.findall(r"`([^`]+)`", cell)


COMPONENTS = {quoted(row[0])[0].rstrip("/").removesuffix(".py"): set(quoted(row[2])) for row in table("Components")}
IMPORTS = imports_of(PACKAGE)


def in_csrc(name: str, pattern: str) -> bool:
    """Whether a pattern of the table means a file; `*` matches no folder."""
    return name.count("/") == pattern.count("/") and fnmatch(name, pattern)


def circle(edges: Iterable[tuple[str, str]]) -> list[str]:
    """The nodes of one circle, or an empty list."""
    graph = defaultdict(set)
    for importer, imported in edges:
        graph[importer].add(imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_every_component_is_in_the_table() -> None:
    there = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert set(COMPONENTS) == there - {"__pycache__"}


def test_every_import_is_in_the_table() -> None:
    edges = defaultdict(list)
    for item in IMPORTS:
        edge = component_of(item.importer), component_of(item.imported)
        if edge != LOADER and edge[0] != edge[1]:
            edges[edge].append(item)
    allowed = {(component, below) for component, names in COMPONENTS.items() for below in names}
    unknown = [str(item) for edge in edges.keys() - allowed for item in edges[edge]]
    assert not unknown, "imports that the page does not allow:\n" + "\n".join(sorted(unknown))
    assert not allowed - edges.keys(), "imports that the page allows and no file has"


def test_every_import_points_down() -> None:
    """The table lists the components from the top of the package to its bottom."""
    order = list(COMPONENTS)
    edges = [(component, below) for component, names in COMPONENTS.items() for below in names]
    upward = [(component, below) for component, below in edges if order.index(component) >= order.index(below)]
    assert not upward


def test_no_files_import_each_other_in_a_circle() -> None:
    assert not circle((item.importer, item.imported) for item in IMPORTS)


def packages() -> list[str]:
    return [name.removesuffix(".__init__") for name in modules_of(PACKAGE) if name.endswith(".__init__")]


@pytest.mark.parametrize("package", packages())
def test_no_members_of_a_package_import_each_other_in_a_circle(package: str) -> None:
    """A member is a file or a folder: two folders may form a circle that no two files of theirs do."""
    depth = package.count(".") + 1
    edges = defaultdict(list)
    for item in IMPORTS:
        if item.importer.startswith(f"{package}.") and item.imported.startswith(f"{package}."):
            members = (item.importer.split(".")[depth], item.imported.split(".")[depth])
            if members[0] != members[1]:
                edges[members].append(item)
    around = circle(edges)
    steps = list(zip(around[1:], around, strict=False))
    assert not around, "\n".join(str(item) for step in steps for item in edges[step])


def test_every_file_of_the_kernels_is_in_the_table() -> None:
    patterns = [pattern for row in table("Kernels") for pattern in quoted(row[0])]
    files = [str(path.relative_to(ROOT / "csrc")) for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert not [name for name in files if not any(in_csrc(name, pattern) for pattern in patterns)]
    assert not [pattern for pattern in patterns if not any(in_csrc(name, pattern) for name in files)]


def test_only_the_op_files_see_torch() -> None:
    allowed = {quoted(row[0])[0] for row in table("Kernels") if row[2] == "yes"}
    for path in (ROOT / "csrc").rglob("*.*"):
        name = str(path.relative_to(ROOT / "csrc"))
        if re.search(r"#include [<\"](torch|c10|ATen)/", path.read_text(encoding="utf-8")):
            assert any(in_csrc(name, pattern) for pattern in allowed), name


def test_a_circle_is_found() -> None:
    assert circle([("a", "b"), ("b", "c")]) == []
    assert set(circle([("a", "b"), ("b", "c"), ("c", "a"), ("a", "d")])) == {"a", "b", "c"}


def test_imports_are_found_wherever_they_stand(tmp_path: Path) -> None:
    package = tmp_path / "pkg"
    (package / "part").mkdir(parents=True)
    (package / "__init__.py").write_text("from pkg import _C\n")
    (package / "part" / "__init__.py").write_text("")
    (package / "part" / "a.py").write_text("from pkg.part import b\ndef f():\n    from pkg.part.b import x\n")
    (package / "part" / "b.py").write_text(
        "if TYPE_CHECKING:\n    import pkg.part.a\nfrom pkg import part\nimport os\n"
    )
    found = {(item.importer, item.imported) for item in imports_of(package)}
    assert found == {
        ("pkg.__init__", "pkg._C"),
        ("pkg.part.a", "pkg.part.b"),
        ("pkg.part.b", "pkg.part.a"),
        ("pkg.part.b", "pkg.part.__init__"),
    }
