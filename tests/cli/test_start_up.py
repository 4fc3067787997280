"""Commands import only what they use, so that they start at once."""

from __future__ import annotations

import json
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
    "shtab",
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


# What `plop score` needs first, and then the command itself: what each brings, and the CPU time of each.
SCORING = """
import json, sys, time
began = time.process_time()
import torch
from transformers.models.llama.modeling_llama import LlamaForCausalLM
first, then = set(sys.modules), time.process_time()
from plop_ext.cli.main import main
code = main(["score", "plop-tiny", "arithmetic", "-qq", "-o", sys.argv[1]])
ended = time.process_time()
packages = lambda names: sorted({name.partition(".")[0] for name in names})
brought = packages(first), packages(set(sys.modules) - first)
print(json.dumps([code, then - began, ended - then, *brought]), file=sys.stderr)
"""


def test_scoring_takes_a_second_beside_the_import_of_torch_and_the_model(tmp_path: Path) -> None:
    """The import takes 3.5 s of CPU time where this was written; a slower machine is slower in both."""
    ended = subprocess.run(
        [sys.executable, "-c", SCORING, str(tmp_path / "s.json")], capture_output=True, text=True, check=True
    )
    code, imports, scoring, needed, added = json.loads(ended.stderr.strip().splitlines()[-1])
    assert code == 0
    unneeded = {"sklearn", "scipy", "pandas", "matplotlib", "datasets", "peft", "accelerate", "sympy"} - set(needed)
    assert not unneeded & set(added)
    third_party = {"numpy", "orjson", "rich", "safetensors", "tokenizers", "torch", "transformers"}
    assert set(added) - set(sys.stdlib_module_names) <= {"plop_ext", *third_party}
    assert scoring < imports * 1 / 3.5


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scores")
    scores(table([0.6, 0.8, 0.9, 1.4])).save(folder / "s.json")
    scores(table([0.6, 0.8, 0.9, 1.4])).place().save(folder / "placed.json")
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
        "export {0}/placed.json --to axolotl",
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
