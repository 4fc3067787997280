"""The hash by which a finished result is recognized."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from plop_ext.cli import inputs


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.txt"])
def test_every_byte_of_data_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(inputs, "_BLOCKS", 2)
    monkeypatch.setattr(inputs, "_BLOCK", 4)
    path = tmp_path / name
    found = set()
    for place in range(40):
        path.write_bytes(bytes(1 if number == place else 0 for number in range(40)))
        found.add(inputs.inputs_hash(argparse.Namespace(data=path), "data"))
    assert len(found) == 40
