"""A placement goes to a training stack by a file of its own, and PEFT is the first of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import LoraConfig

from plop_ext.errors import InputError
from plop_ext.placement import exports
from plop_ext.scores import Scores
from tests.support.gain_tables import scores, table


@pytest.fixture(scope="module")
def found() -> Scores:
    return scores(table([0.5, 0.8, 1.2]))


def test_peft_is_a_stack_and_its_export_is_the_config(found: Scores) -> None:
    placement = found.place(types=1)
    config, exported = placement.lora_config(r=4, lora_alpha=6), placement.export("peft", r=4, lora_alpha=6)
    assert isinstance(exported, LoraConfig) and exported.to_dict() == config.to_dict()


def test_a_new_file_is_a_new_stack(found: Scores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "two_words.py").write_text("def export(placement, end): return placement.label + end\n")
    (tmp_path / "_shared.py").write_text("")
    monkeypatch.setattr(exports, "__path__", [*exports.__path__, str(tmp_path)])
    assert exports.stacks() == ("peft", "two-words")
    assert found.place(types=1).export("two-words", end="!") == "lowest-1!"


@pytest.mark.parametrize("stack", ["nope", "_shared", "peft.py", ""])
def test_an_unknown_stack_is_named_with_those_there_are(found: Scores, stack: str) -> None:
    with pytest.raises(InputError, match=rf"`stack` must be one of peft, got '{stack}'"):
        found.place(types=1).export(stack)
