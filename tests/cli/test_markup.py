"""No text of a user is read as markup: rich gets it from a console without markup, or as a `Text`.

`[/b]` in a name or a path would otherwise end a run with rich's MarkupError after all its work is done.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

# Calls that read markup, or shorthand for emoji, also on a console without markup.
ALWAYS = {"from_markup", "render_markup", "Panel", "Spinner", "TextColumn", "status", "Prompt", "Confirm"}
# Of this package: it makes a `Text` of what it is given.
OWN = {"options.status", "status"}


def faults(source: str) -> Iterator[str]:
    """The calls of a file through which text that is no constant may be read as markup."""
    tree = ast.parse(source)
    asked = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    consoles = {"Console"} | {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "Console" for base in node.bases)
    }
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names]
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if "rich" in names or (module == "rich" and "print" in names) or module == "rich.markup":
                yield f"line {node.lineno}: {ast.unparse(node)}"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        settings = {word.arg: ast.unparse(word.value) for word in node.keywords}
        parts = set(called.split("."))
        plain = settings.get("markup") == "False"
        if settings.get("markup") == "True" or settings.get("emoji") == "True":
            yield f"line {node.lineno}: {called} with markup"
        elif called in consoles and id(node) not in asked and not (plain and settings.get("emoji") == "False"):
            yield f"line {node.lineno}: {called} without markup=False and emoji=False"
        elif parts & ALWAYS and called not in OWN and not plain and not all(map(_is_safe, _texts(node))):
            yield f"line {node.lineno}: {called} of a text that is no constant"


def _texts(call: ast.Call) -> list[ast.expr]:
    named = [word.value for word in call.keywords if word.arg in ("text", "title", "subtitle", "status", "prompt")]
    return [*call.args[:1], *named]


def _is_safe(text: ast.expr) -> bool:
    return isinstance(text, ast.Constant) or (isinstance(text, ast.Call) and ast.unparse(text.func) == "Text")


@pytest.mark.parametrize("path", sorted((ROOT / "plop_ext").rglob("*.py")), ids=lambda path: path.stem)
def test_no_text_of_a_user_is_read_as_markup(path: Path) -> None:
    assert not list(faults(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "source",
    [
        "console = Console()",
        "console = Console(markup=False)",
        "class Own(Console): ...\nconsole = Own(width=3)",
        "console.print(name, markup=True)",
        "with console.status(name): ...",
        "Panel(table, title=name)",
        "Panel(f'{name}')",
        "Text.from_markup(name)",
        "TextColumn(name)",
        "import rich",
        "from rich import print",
        "from rich.markup import escape",
    ],
)
def test_the_census_finds(source: str) -> None:
    assert list(faults(source))


@pytest.mark.parametrize(
    "source",
    [
        "width = 3 if Console().is_terminal else 4",
        "console = Console(markup=False, emoji=False)",
        "with console.status('reading'): ...",
        "with console.status(Text(name)): ...",
        "TextColumn('{task.fields[note]}', markup=False)",
    ],
)
def test_the_census_leaves(source: str) -> None:
    assert not list(faults(source))
