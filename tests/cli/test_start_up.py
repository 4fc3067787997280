"""Commands import only what they use, so that they start at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.gain_tables import scores, table

# What takes seconds to import.
HEAVY = (
    "torch",
    "transformers",
    "peft",
    "datasets",
    "pandas",
    "scipy",
    "sklearn",
    "matplotlib",
    "accelerate",
    "sympy",
)
PROGRAM = """
import sys
from plop_ext.cli.main import main
try:
    code = main(sys.argv[2:])
except SystemExit as ended:
    code = ended.code
print(code, *[name for name in sys.argv[1].split(",") if name in sys.modules], file=sys.stderr)
"""


def imported(*arguments: str) -> list[str]:
    """The heavy packages that a command has imported at its end."""
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, ",".join(HEAVY), *arguments], capture_output=True, text=True, check=True
    )
    code, *names = ended.stderr.strip().splitlines()[-1].split()
    assert code == "0", ended.stderr
    return names


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scores")
    scores(table([0.6, 0.8, 0.9, 1.4])).save(folder / "s.json")
    scores(table([0.6, 0.8, 0.9, 1.4], seed=1), data="other").save(folder / "t.json")
    return folder


@pytest.mark.parametrize(
    "line",
    [
        "--version",
        "score --help",
        "place {0}/s.json -o {0}/p.json",
        "export {0}/p.json --to openrlhf --lossy",
        "export {0}/p.json --to axolotl",
        "export {0}/p.json --to lycoris",
        "report {0}/s.json --against {0}/t.json",
        "merge {0}/s.json {0}/t.json -o {0}/m.json",
    ],
)
def test_nothing_heavy_is_imported(line: str, saved: Path) -> None:
    assert imported(*line.format(saved).split()) == []


def test_a_page_needs_matplotlib_only(saved: Path) -> None:
    assert imported("report", str(saved / "s.json"), "-o", str(saved / "r.html")) == ["matplotlib"]


def test_doctor_speaks_before_it_imports_torch() -> None:
    program = "import sys, plop_ext.cli.main; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False\n"
    ended = subprocess.run([sys.executable, "-m", "plop_ext", "doctor"], capture_output=True, text=True, check=True)
    assert ended.stderr.startswith("importing torch and trying the kernels ...\n")
