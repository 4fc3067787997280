"""No class that was scored before every stream of rows had its own samples has become a refusal.

`scored_before.json` has the number of matrices that commit 752cba5 scored of the tiny model of each class, in all
scopes together, from the batch of the census. Its numbers of rows decided to which samples they belonged.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.census.table import rows, scored_in

BEFORE: dict[str, int] = json.loads(Path(__file__).with_name("scored_before.json").read_text(encoding="utf-8"))

POSITIONS = "rows of relative positions, which are of no sample, and rows of each frequency of a frame of sound"
# Classes of which fewer matrices are scored, because some had wrong numbers.
FEWER = {
    "BltForCausalLM": "patches of bytes, of which the model chooses the length",
    "CanaryForConditionalGeneration": POSITIONS,
    "CohereAsrForConditionalGeneration": POSITIONS,
    "ParakeetForCTC": POSITIONS,
    "Swinv2ForImageClassification": "rows of a table of positions, which are of no sample",
}


def test_every_class_of_the_census_was_compared() -> None:
    assert len(BEFORE) >= 335


@pytest.mark.parametrize("class_name", BEFORE)
def test_a_class_scored_before_is_scored_now(class_name: str) -> None:
    row = rows()[class_name]
    assert scored_in(row) > 0, row
    assert (scored_in(row) < BEFORE[class_name]) == (class_name in FEWER), row
