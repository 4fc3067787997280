"""docs/stacks.md says of each training stack what the registry and the tests say."""

from __future__ import annotations

import re

from plop_ext.placement import exports
from plop_ext.placement.serving import ENGINES
from tests.support.markdown import table_of
from tests.support.paths import ROOT
from tests.support.stack_readers import OWN, PEFT
from tests.support.stacks import TRAINED, own_code

PAGE = ROOT / "docs" / "stacks.md"


def test_what_each_stack_can_say_is_its_description() -> None:
    assert table_of(PAGE, "| name | stack |") == [
        [
            f"`{name}`",
            f"{stack.title} {stack.release}",
            stack.form,
            stack.names,
            "yes" if stack.parameters else "no",
            "per module" if stack.ranks else "one",
            stack.alphas.value,
        ]
        for name, stack in ((name, exports.stack_named(name)) for name in exports.stacks())
    ]


def test_what_is_validated_and_trained_is_what_tests_run() -> None:
    rows = table_of(PAGE, "| name | installs beside")
    assert [row[0] for row in rows] == [f"`{name}`" for name in exports.stacks()]
    for row, name in zip(rows, exports.stacks(), strict=True):
        own = own_code(name)
        assert row[2:] == [
            "yes" if name in PEFT or name in OWN else "no",
            "its own code" if own else "read only",
            "one step" if name in TRAINED else "no",
        ]
        assert own or row[1].startswith("read only")
    assert sum(map(own_code, exports.stacks())) >= 10 and all(map(own_code, TRAINED))


def test_releases_are_those_that_are_unpacked() -> None:
    unpacked = dict(
        re.findall(r"^([\w-]+) [\w-]+==(\S+)$", (ROOT / "scripts" / "install_stacks.sh").read_text(), re.M)
    )
    assert {*unpacked, "peft", "verl-megatron"} == set(filter(own_code, exports.stacks()))
    for name, release in unpacked.items():
        assert exports.stack_named(name).release == release


def test_engines_are_those_of_the_page() -> None:
    rows = {row[0]: row[1:] for row in table_of(PAGE, "| | vLLM")}
    engines = ENGINES.values()
    assert rows["ranks and alphas of single modules"] == ["yes" if item.ranks else "one for all" for item in engines]
    assert rows["stacked experts"] == ["both halves of a layer or none" if item.experts else "no" for item in engines]
    assert rows["largest rank"] == [str(item.max_rank or "any") for item in engines]
    text = PAGE.read_text()
    assert all(f"{item.title} {item.release}" in text for item in engines if item.release[0].isdigit())
