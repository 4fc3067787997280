"""Training stacks apply exports with their own code: exactly the placement, with its ranks and alphas."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from plop_ext.lora_target import LoraTarget
from plop_ext.placement import Placement, exports
from tests.support.markdown import table_of
from tests.support.paths import ROOT
from tests.support.placed_models import CASES, EXPERT_CASES, llama, tiny_mixture
from tests.support.stacks import own_code

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
STACKS = Path(os.environ.get("PLOP_STACKS", ROOT / "build" / "stacks"))
FLUX = [f"transformer_blocks.{layer}.attn.to_{name}" for layer in (1, 10) for name in ("q", "v")]


def placements(stack: str) -> dict[str, Placement]:
    """The placements that a stack can say exactly, by case."""
    if stack == "diffusers":
        return {"a few": of_names(FLUX), "one module": of_names(FLUX[:1])}
    model, mixture = llama(), tiny_mixture()
    made = {case: make(model) for case, make in CASES.items()}
    if exports.stack_named(stack).parameters:
        made |= {case: make(mixture) for case, make in EXPERT_CASES.items()}
    return {
        case: placement for case, placement in made.items() if not exports.plan(placement, stack, lossy=True).losses
    }


def of_names(names: list[str]) -> Placement:
    targets = tuple(LoraTarget.of_module(name, 8, 8) for name in names)
    return Placement(tuple(names), ("t",), "types", "by name", "FluxTransformer2DModel", targets)


@pytest.mark.stacks
@pytest.mark.parametrize("stack", [name for name in exports.stacks() if own_code(name)])
def test_its_own_code_adapts_exactly_the_placement(stack: str, tmp_path: Path) -> None:
    cases = placements(stack)
    assert len(cases) >= 2
    suffix = ".py" if exports.stack_named(stack).form.startswith("Python") else ".yaml"
    texts = {tmp_path / f"{case.replace(' ', '-')}{suffix}": found.export(stack) for case, found in cases.items()}
    for path, text in texts.items():
        path.write_text(text)
    files = list(texts)
    if stack == "axolotl":
        for case, placement in cases.items():
            files.append(tmp_path / f"{case.replace(' ', '-')}.json")
            placement.save(files[-1])
    check(cases, applied(stack, files, tmp_path))


def applied(stack: str, files: list[Path], folder: Path) -> list[dict[str, list[float]]]:
    """What a stack makes of each file, in a process of its own."""
    names = (stack.removesuffix("-megatron"), "megatron-bridge", "shared")
    ended = subprocess.run(
        [sys.executable, "-m", "tests.support.stacks.run", stack, *map(str, files)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *(str(STACKS / name) for name in names)])},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return [json.loads(line) for line in ended.stdout.splitlines()[-len(files) :]]


def check(cases: dict[str, Placement], found: list[dict[str, list[float]]]) -> None:
    """Compare what was adapted with the placements, which may come several times over."""
    assert len(found) in (len(cases), 2 * len(cases))
    for (case, placement), adapted in zip([*cases.items(), *cases.items()], found, strict=False):
        expected = {name: [rank, 2 * rank] for name, rank in placement.ranks_at().items()}
        assert adapted == expected, case


@pytest.mark.stacks
@pytest.mark.parametrize("stack", [name for name in exports.stacks() if own_code(name) and name != "peft"])
def test_the_page_says_what_each_stack_asks_for_and_plop_ext_installs_beside_it(stack: str) -> None:
    (found,) = metadata.distributions(path=[str(STACKS / stack.removesuffix("-megatron"))])
    asked = [requirement for requirement in map(Requirement, found.requires or ()) if requirement.marker is None]
    mine = {item.name: item.specifier for item in map(Requirement, PROJECT["project"]["dependencies"])}
    words = []
    for name in ("transformers", "peft"):
        ranges = [item.specifier for item in asked if item.name == name and item.specifier]
        if ranges:
            theirs = SpecifierSet(",".join(map(str, ranges)))
            known = {Version(item.version) for item in (*theirs, *mine[name])} | {Version(metadata.version(name))}
            known |= {Version(f"{item.major}.{item.minor - 1}") for item in known if item.minor}  # below a `<` bound
            assert any(version in theirs and version in mine[name] for version in known), (name, theirs)
            words.append(f"{name}{theirs}")
    rows = {row[0].strip("`"): row[1] for row in table_of(ROOT / "docs" / "stacks.md", "| name | installs beside")}
    assert rows[stack] == ("yes: " + " and ".join(words) if words else "yes")
