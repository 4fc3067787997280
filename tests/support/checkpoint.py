"""Checkpoints in a temporary folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def saved(model: Any, folder: Path, shard: str = "20KB") -> Path:
    """Writes the model in shards of at most this size."""
    model.save_pretrained(folder, max_shard_size=shard)
    return folder
