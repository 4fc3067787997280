"""docs/layers.md and the README list every kind of layer, the former every packed weight; its example runs."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

import plop_ext.layers.adapter as adapter_module
from plop_ext.layers.no_place import SINGLE_OUTPUT, TABLE
from plop_ext.layers.packed_weights import _LAYOUTS
from plop_ext.layers.targets import _REFUSED_LEAVES, _REFUSING_MODELS, _REWRITTEN_FAMILIES, _REWRITTEN_LEAVES
from plop_ext.layers.unread import UNREAD
from plop_ext.score_data.modules import MIN_EXPERT_TOKENS
from tests.support.paths import ROOT

TEXT = (ROOT / "docs" / "layers.md").read_text(encoding="utf-8")


def rows(heading: str, text: str = TEXT) -> list[list[str]]:
    """Cells of the table under `heading`, without its header."""
    section = text.split(f"# {heading}\n", 1)[1].split("\n#", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


@pytest.fixture
def registry() -> Iterator[None]:
    before = list(adapter_module._ADAPTERS)
    yield
    adapter_module._ADAPTERS[:] = before


def test_every_entry_of_what_is_no_place_for_lora_is_in_the_table() -> None:
    def names(cell: str) -> tuple[str, ...]:
        return tuple(re.findall(r"`([^`]+)`", cell))

    *listed, unread, single = rows("No place for LoRA")
    assert [(names(row[0]), names(row[1]), row[2]) for row in listed] == [
        (entry.owners, entry.attributes, entry.reason) for entry in TABLE
    ]
    assert (unread[2], single[2]) == (UNREAD, SINGLE_OUTPUT)


def test_every_kind_is_in_the_table() -> None:
    listed = {re.findall(r"`([^`]+)`", row[0])[0] for row in rows("Layers")}
    assert listed == {adapter.kind for adapter in adapter_module._ADAPTERS}
    for row in rows("Layers"):
        kind = re.findall(r"`([^`]+)`", row[0])[0]
        (source,) = {adapter.weights for adapter in adapter_module._ADAPTERS if adapter.kind == kind}
        assert row[3].startswith("dequantized") == (source == "dequantized"), row
        assert ("identity" in row[3]) == (source == "identity"), row


def test_the_readme_has_the_same_kinds() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert rows("Layers", readme) == [[kind, scored_as, target] for kind, _, scored_as, _, target in rows("Layers")]


def test_every_packed_weight_is_in_the_table() -> None:
    listed = {
        (model_type, leaf)
        for row in rows("Packed weights")
        for model_type in re.findall(r"`([^`]+)`", row[0])
        for leaf in re.findall(r"`([^`]+)`", row[1])
    }
    assert listed == set(_LAYOUTS)


def test_the_lists_of_names_are_those_of_the_code() -> None:
    sentence = re.search(r"entries of `target_modules` that end in (.*?) into all experts", TEXT, re.DOTALL)
    assert sentence and set(re.findall(r"`([^`]+)`", sentence.group(1))) == _REWRITTEN_LEAVES
    (row,) = [row for row in rows("What PEFT cannot adapt") if "`mamba`" in row[0]]
    assert set(re.findall(r"`([^`]+)`", row[0])) == _REFUSING_MODELS | _REFUSED_LEAVES
    assert f"fewer than {MIN_EXPERT_TOKENS} tokens" in TEXT


def test_the_lists_agree_with_peft() -> None:
    """What PEFT rewrites and refuses is private to it: a new version that changes it must be noticed here."""
    conversion = pytest.importorskip("peft.utils.transformers_weight_conversion")
    rewritten = {old for mapping in conversion._MOE_TARGET_MODULE_MAPPING.values() for old in mapping}
    assert rewritten == _REWRITTEN_LEAVES
    assert set(conversion._MOE_TARGET_MODULE_MAPPING) == _REWRITTEN_FAMILIES


def test_the_example_runs(registry: None) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(compile(code, "docs/layers.md", "exec"), {})
