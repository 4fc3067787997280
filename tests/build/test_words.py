"""`scripts/check_words.py`: which words it finds, where it looks for them, and that every tracked file is clean."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def check_words() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_words", ROOT / "scripts" / "check_words.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def findings(check_words: ModuleType, path: Path, text: str, name: str = "") -> list[tuple[int, str]]:
    path.write_text(text, encoding="utf-8")
    return check_words.check(path, name or path.name)


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("The same in 99 % of the draws of samples.\n", "bootstrap resample"),
        ("It makes the host wait for the device.\n", "synchronization"),
        ("A run gives the same bits.\n", "bitwise identical"),
        ("A hook of the user's may replace it.\n", "user-defined"),
        ("It is normalised first.\n", "-ize"),
    ],
)
def test_a_private_idiom_has_a_remedy(check_words: ModuleType, tmp_path: Path, text: str, remedy: str) -> None:
    ((line, found),) = findings(check_words, tmp_path / "page.md", text)
    assert line == 1 and remedy in found


def test_an_idiom_is_found_across_a_line_break(check_words: ModuleType, tmp_path: Path) -> None:
    assert findings(check_words, tmp_path / "page.md", "the same in most draws\nof samples\n")[0][0] == 2


def test_code_and_generated_tables_of_a_page_are_left_alone(check_words: ModuleType, tmp_path: Path) -> None:
    text = "```python\nnobody = 1\n```\n\n    nobody = 1\n\n<!-- benchmark: x -->\nnobody\n<!-- /benchmark: x -->\n"
    assert findings(check_words, tmp_path / "page.md", text) == []


def test_comments_strings_and_names_of_tests_are_read_and_other_names_are_not(
    check_words: ModuleType, tmp_path: Path
) -> None:
    source = 'nobody = 1  # nobody\ntext = f"nobody {nobody}"\ndef test_nobody_waits():\n    pass\n'
    assert [line for line, _ in findings(check_words, tmp_path / "test_x.py", source, "tests/test_x.py")] == [1, 2, 3]
    assert [line for line, _ in findings(check_words, tmp_path / "x.cu", "int nobody;  // nobody\n")] == [1]


def test_a_line_is_exempt_by_a_mark(check_words: ModuleType, tmp_path: Path) -> None:
    assert findings(check_words, tmp_path / "x.py", "# nobody  words: ignore\n") == []


def test_docstrings_of_functions_open_with_a_verb(check_words: ModuleType, tmp_path: Path) -> None:
    source = (
        'class A:\n    """The class."""\n\n    @property\n    def b(self):\n        """The value."""\n\n'
        'def c():\n    """Whether it holds."""\n\ndef d():\n    """Return whether it holds."""\n'
    )
    ((line, found),) = findings(check_words, tmp_path / "x.py", source, "plop_ext/x.py")
    assert line == 8 and "imperative verb" in found


def test_lines_of_prose_have_a_width_and_tables_have_none(check_words: ModuleType, tmp_path: Path) -> None:
    wide = "word " * 30
    ((line, found),) = findings(check_words, tmp_path / "page.md", f"| {wide} |\n{wide}\n")
    assert line == 2 and "at most 120" in found


def test_the_repository_is_clean(check_words: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("the check lists the files that git tracks")
    assert check_words.main([]) == 0, capsys.readouterr().out
