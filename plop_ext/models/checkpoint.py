"""The tensors of a checkpoint and their places in its files, which are checked before anything is read."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from plop_ext.errors import InputError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}
_CODES = {torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32}
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a file.

    Attributes:
        key: Its name in the checkpoint.
        path: The file.
        start: Offset of its first byte in the file.
        n_bytes: Its size in bytes.
        dtype: Its type; None for one that torch lacks.
        code: Name of the type in safetensors.
        shape: Its shape.
    """

    key: str
    path: Path
    start: int
    n_bytes: int
    dtype: torch.dtype | None
    code: str
    shape: tuple[int, ...]

    @property
    def holds_codes(self) -> bool:
        """Whether the values may be codes, which mean nothing without a scale."""
        if self.dtype is None:
            return True
        return self.dtype.itemsize < 2 if self.dtype.is_floating_point else self.dtype in _CODES


class Checkpoint:
    """All tensors of a model folder, by their names in the files.

    Args:
        folder: Holds `model.safetensors`, or its shards and their index.

    Raises:
        InputError: If there is no such file, or a file is missing, truncated or damaged; the text names it.
    """

    def __init__(self, folder: Path) -> None:
        self.files, listed = _files(folder)
        self.entries: dict[str, TensorEntry] = {}
        for path in self.files:
            for entry in _read_header(path):
                self.entries[entry.key] = entry
        for key, path in listed.items():
            if key not in self.entries:
                raise InputError(f"`{path}` lacks {key}, which {_INDEX} lists for it; download or save it again")

    def float_dtype(self) -> torch.dtype | None:
        """Return the type of the first floating-point tensor."""
        types = (entry.dtype for entry in self.entries.values() if entry.dtype is not None)
        return next((dtype for dtype in types if dtype.is_floating_point), None)


def stored_tensors(folder: Path) -> dict[str, TensorEntry]:
    """Return the tensors of a model folder, of safetensors or pickled files; none if neither can be read.

    Raises:
        InputError: If a safetensors file is missing, truncated or damaged.
    """
    if (folder / _SINGLE).is_file() or (folder / _INDEX).is_file():
        return Checkpoint(folder).entries
    entries = {}
    for path in sorted(folder.glob("pytorch_model*.bin")):
        try:
            tensors = torch.load(path, map_location="meta", weights_only=True, mmap=True)
        except Exception:  # a damaged file or one of before torch 1.6: the loader says what is wrong, or reads it
            return {}
        for key, tensor in tensors.items():
            size = tensor.numel() * tensor.element_size()
            entries[key] = TensorEntry(key, path, 0, size, tensor.dtype, "", tuple(tensor.shape))
    return entries


def _files(folder: Path) -> tuple[list[Path], dict[str, Path]]:
    """Return the files, and the file of each key according to the index."""
    index = folder / _INDEX
    if (folder / _SINGLE).is_file():  # as transformers chooses if there are both
        return [folder / _SINGLE], {}
    if not index.is_file():
        raise InputError(
            f"`{folder}` holds neither {_SINGLE} nor {_INDEX}; streaming reads safetensors: load the model and "
            "save it again with `save_pretrained`"
        )
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        listed = {str(key): folder / str(name) for key, name in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"`{index}` is damaged; download or save it again") from error
    for path in listed.values():
        if path != folder / path.name:
            name = os.path.relpath(path, folder)
            raise InputError(f"`{index}` lists {name}, which is not a file of its folder; download or save it again")
    files = sorted(set(listed.values()))
    for path in files:
        if not path.is_file():
            raise InputError(f"`{path}` is missing, which {_INDEX} lists; download or save it again")
    return files, listed


def _read_header(path: Path) -> Iterator[TensorEntry]:
    """Yield the tensors of one file, after a check of the file's length against its header."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER
        text = file.read(length) if length < _MAX_HEADER else b""
    if len(prefix) < 8 or (length < _MAX_HEADER and len(text) < length):
        raise InputError(f"`{path}` is truncated: it ends within its header; download or save it again")
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        items = [
            (key, str(item["dtype"]), tuple(map(int, item["shape"])), *map(int, item["data_offsets"]))
            for key, item in header.items()
        ]
        end = max((stop for *_, stop in items), default=0)
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"`{path}` is no safetensors file: its header is damaged; download it again") from error
    if size != 8 + length + end:
        what = "truncated" if size < 8 + length + end else "longer than it should be"
        raise InputError(f"`{path}` is {what}: {size} bytes of {8 + length + end}; download or save it again")
    for key, code, shape, start, stop in items:
        dtype = _DTYPES.get(code)
        wanted = stop - start if dtype is None else math.prod(shape) * dtype.itemsize
        if stop - start != wanted:
            raise InputError(f"`{path}`: {key} has {stop - start} bytes, its shape and type need {wanted}")
        yield TensorEntry(key, path, 8 + length + start, stop - start, dtype, code, shape)
