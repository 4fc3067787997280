"""The pretraining text: Python sources and documentation that the machine has, each content once, in a fixed order."""

from __future__ import annotations

import hashlib
import os
import sysconfig
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.placement.encode import END
from benchmarks.placement.settings import Settings

_SUFFIXES = (".py", ".pyi", ".md", ".rst", ".txt")
_LARGEST = 400_000  # bytes of a file; larger ones are tables and generated code
_SMALLEST = 200
_VALIDATION = 100  # one file in so many


def folders(parts: Sequence[str]) -> list[Path]:
    """Where installed sources and documentation are: paths of `sysconfig`, and `"doc"` for those of the system."""
    paths = {**sysconfig.get_paths(), "doc": "/usr/share/doc"}
    return [Path(paths[name]) for name in parts]


def build(folder: Path, settings: Settings) -> dict[str, Any]:
    """Write tokenizer and tokens to `folder`, unless they are there, and say what they are made of."""
    from tokenizers import Tokenizer

    started = time.perf_counter()
    texts = list(_texts(settings))
    files, size = len(texts), sum(len(text) for text in texts)
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text).digest())
    folder.mkdir(parents=True, exist_ok=True)
    decoded = [text.decode("utf-8", errors="replace") for text in texts]
    tokenizer = _train_tokenizer(decoded, settings)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size() <= settings.vocabulary
    parts: dict[str, list[NDArray[np.uint16]]] = {"train": [], "validation": []}
    for start in range(0, files, 2000):
        encoded = tokenizer.encode_batch_fast(decoded[start : start + 2000], add_special_tokens=False)
        for index, each in enumerate(encoded, start):
            split = "validation" if index % _VALIDATION == 0 else "train"
            parts[split].append(np.array([*each.ids, END], dtype=np.uint16))
    tokens = {}
    for split, arrays in parts.items():
        np.save(folder / f"{split}.npy", np.concatenate(arrays))
        tokens[split] = sum(len(array) for array in arrays)
    return {
        "files": files,
        "bytes": size,
        "sha256": digest.hexdigest(),
        "tokens": tokens,
        "vocabulary": tokenizer.get_vocab_size(),
        "seconds": round(time.perf_counter() - started, 1),
    }


def load(folder: Path, split: str) -> NDArray[np.uint16]:
    """The tokens of a split, not read before they are used."""
    array: NDArray[np.uint16] = np.load(folder / f"{split}.npy", mmap_mode="r")
    return array


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer that `build` trained."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def _paths(parts: Sequence[str]) -> list[Path]:
    found: set[Path] = set()
    for folder in folders(parts):
        for parent, below, names in os.walk(folder):
            below[:] = [name for name in below if name != "__pycache__"]
            found.update(Path(parent, name) for name in names if name.endswith(_SUFFIXES))
    return sorted(found, key=lambda path: hashlib.sha256(str(path).encode()).digest())


def _texts(settings: Settings) -> Iterator[bytes]:
    """Contents of the files, each once, until there are `corpus_bytes` of them."""
    seen, size = set(), 0
    with ThreadPoolExecutor(16) as pool:
        paths = _paths(settings.corpus_parts)
        for start in range(0, len(paths), 1000):
            for text in pool.map(_read, paths[start : start + 1000]):
                digest = hashlib.sha256(text).digest()
                if len(text) < _SMALLEST or digest in seen:
                    continue
                seen.add(digest)
                size += len(text)
                yield text
                if size >= settings.corpus_bytes:
                    return


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes() if path.is_file() and path.stat().st_size <= _LARGEST else b""
    except OSError:
        return b""


def _train_tokenizer(texts: list[str], settings: Settings) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first(texts, settings.tokenizer_bytes), trainer)
    return tokenizer


def _first(texts: list[str], limit: int) -> Iterator[str]:
    size = 0
    for text in texts:
        if size >= limit:
            return
        size += len(text)
        yield text
