"""Tiny checkpoints on disk, edited as other tools write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.tiny_lm import byte_tokenizer, tiny_llama


def write_llama(folder: Path, dtype: torch.dtype = torch.bfloat16, shard: str = "5GB", **config: Any) -> Path:
    """Write a Llama of two layers, and its tokenizer."""
    tiny_llama(dtype, **config).save_pretrained(folder, max_shard_size=shard)
    byte_tokenizer().save_pretrained(folder)
    return folder


def edit_config(folder: Path, **values: Any) -> None:
    """Set fields of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of model.safetensors in place, or by those that `change` returns."""
    weights = load_file(folder / "model.safetensors")
    changed = change(weights)
    weights = changed if isinstance(changed, dict) else weights
    save_file(
        {key: tensor.contiguous().clone() for key, tensor in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def rename(folder: Path, name: Callable[[str], str]) -> None:
    """Rename the tensors of every shard and of the index."""
    for path in folder.glob("*.safetensors"):
        weights = {name(key): tensor.clone() for key, tensor in load_file(path).items()}
        save_file(weights, path, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"] = {name(key): file for key, file in content["weight_map"].items()}
        index.write_text(json.dumps(content))
