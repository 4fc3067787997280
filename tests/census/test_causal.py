"""Classes of transformers, examined: causal language models."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.census.table import check, named


@pytest.mark.slow
@pytest.mark.parametrize("class_name", named(causal=True))
def test_class(class_name: str, tmp_path: Path) -> None:
    check(class_name, tmp_path)
