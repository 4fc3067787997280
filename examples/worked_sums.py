"""What the examples share: the model that ships with plop_ext, and worked sums to train it on."""

from __future__ import annotations

import re
from typing import Any

from plop_ext.data import load_rows
from plop_ext.models import load_model


def model_and_tokenizer() -> tuple[Any, Any]:
    """Load `plop-tiny`, two million weights, in float32."""
    model, tokenizer = load_model("plop-tiny", device="cpu")
    return model.float(), tokenizer


def rows(number: int = 400, pattern: str = "Q:") -> list[dict[str, str]]:
    """Return rows of `prompt` and `completion` whose prompt begins with a pattern."""
    found = [row for row in load_rows("arithmetic") if re.match(pattern, row["prompt"])]
    return [{"prompt": row["prompt"], "completion": row["completion"]} for row in found[:number]]
