"""Writes a checkpoint of a named shape with random weights, shard by shard; the model is never in memory.

python -m benchmarks.make_checkpoint llama-2-13b FOLDER
python -m benchmarks.make_checkpoint llama-3.1-405b FOLDER --config-only      enough for `plop score --dry-run`

Matrices repeat one block of normal values from different starts; vectors are ones. That is quick and scores like any
random model: what is measured on it is speed and memory.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.shapes import SHAPES

_CODES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
# Elements of the block that is repeated; a prime, so that tensors of equal shape start at different places.
_BLOCK = 16_777_213
_WRITERS = 8


def make(
    shape: str,
    folder: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int = 4 << 30,
    config_only: bool = False,
    seed: int = 0,
) -> int:
    """Write config.json, the shards and their index.

    Args:
        shape: Key of `SHAPES`.
        folder: Made if it is not there.
        dtype: Of the weights.
        shard_bytes: Largest size of a shard.
        config_only: Write config.json alone.
        seed: Of the values.

    Returns:
        Bytes of the weights.
    """
    shapes = _shapes(shape, folder, dtype)
    if config_only:
        return 0
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, extents in shapes.items():
        size = math.prod(extents) * dtype.itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = extents
        filled += size
    values = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(seed)).mul_(0.02).to(dtype)
    names = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    with ThreadPoolExecutor(_WRITERS) as pool:
        jobs = [
            pool.submit(_write, folder / name, shard, values, number)
            for number, (name, shard) in enumerate(zip(names, shards, strict=True))
        ]
        total = sum(job.result() for job in jobs)
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _shapes(shape: str, folder: Path, dtype: torch.dtype) -> dict[str, tuple[int, ...]]:
    """Write config.json; the names and shapes of the weights, without those that are tied to another."""
    import transformers

    fields: dict[str, Any] = dict(SHAPES[shape])
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    return {name: tuple(weight.shape) for name, weight in model.named_parameters()}


def _write(path: Path, shapes: dict[str, tuple[int, ...]], values: torch.Tensor, shard: int) -> int:
    """Write one shard; its bytes of weights."""
    size, code, place = values.element_size(), _CODES[values.dtype], 0
    header: dict[str, Any] = {}
    for name, extents in shapes.items():
        n_bytes = math.prod(extents) * size
        header[name] = {"dtype": code, "shape": list(extents), "data_offsets": [place, place + n_bytes]}
        place += n_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = values.view(torch.uint8).numpy().data
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for number, extents in enumerate(shapes.values()):
            if len(extents) == 1:
                file.write(torch.ones(extents, dtype=values.dtype).view(torch.uint8).numpy().tobytes())
                continue
            left = math.prod(extents) * size
            start = (shard * 7919 + number * 104_729) * 64 % values.numel() * size
            while left:
                piece = block[start : start + left]
                file.write(piece)
                left, start = left - len(piece), 0
    return place


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--config-only", action="store_true", help="write config.json alone")
    parser.add_argument("--dtype", default="bfloat16", choices=[str(dtype).removeprefix("torch.") for dtype in _CODES])
    args = parser.parse_args(argv)
    total = make(args.shape, args.folder, dtype=getattr(torch, args.dtype), config_only=args.config_only)
    print(f"{args.folder}: {total / 1e9:.1f} GB of weights")


if __name__ == "__main__":
    main()
