"""The embedded model's training text: Python code, its docstrings, and documentation, found on this machine."""

from __future__ import annotations

import hashlib
import inspect
import os
import random
import re
import site
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

# Bytes that UTF-8 never uses mark documents, so that the corpus fits one uint8 tensor.
BOS_BYTE, EOS_BYTE = 0xFE, 0xFF
TEXT_SUFFIXES = {".rst", ".md", ".txt"}
FILE_CAP = 100_000
# PLoP's own data must stay unseen, and a cache holds nothing new.
SKIPPED_FOLDERS = {"plop_ext", "__pycache__", "node_modules", ".git"}
DOCSTRING = re.compile(r'"""(.*?)"""', re.DOTALL)


class Corpus(NamedTuple):
    """Documents as bytes between marks, and where their lines start."""

    data: Tensor  # [N] uint8
    starts: Tensor  # [L] int64, first byte of each line that a whole window follows
    files: int


def default_folders() -> list[Path]:
    """Return the standard library and the site-packages folders of this interpreter."""
    paths = sysconfig.get_paths()
    names = [paths["stdlib"], paths["purelib"], paths["platlib"], *site.getsitepackages()]
    # Where PYTHONPATH provides the libraries, torch's own folder is the one that holds them.
    names.append(str(Path(torch.__file__).parent.parent))
    folders = sorted({Path(name).resolve() for name in names if Path(name).is_dir()})
    return [folder for folder in folders if not any(other in folder.parents for other in folders)]


def find_files(folders: list[Path], seed: int) -> list[Path]:
    """Return the .py files and text documents below `folders`: sorted, then shuffled by `seed`."""
    found = set()
    for folder in folders:
        for parent, children, names in os.walk(folder):
            children[:] = [child for child in children if child not in SKIPPED_FOLDERS]
            for name in names:
                if Path(name).suffix in TEXT_SUFFIXES or name.endswith(".py") or name == "METADATA":
                    found.add(Path(parent, name))
    files = sorted(found)
    random.Random(seed).shuffle(files)
    return files


def read_document(path: Path) -> str | None:
    """Return a file's text, cut at the size cap; None if it is not UTF-8, minified, tiny, or a table of data."""
    try:
        raw = path.read_bytes()[:FILE_CAP]
        text = raw[: raw.rfind(b"\n") + 1].decode("utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError):
        return None
    if len(text) < 200 or max(map(len, text.split("\n"))) > 1000:
        return None
    sample = text[:20_000]
    letters = sum(map(str.isalpha, sample)) + sample.count(" ")
    digits = sum(map(str.isdigit, sample))
    return text if letters > 0.6 * len(sample) and digits < 0.15 * len(sample) else None


def documents(files: list[Path], seen: set[bytes]) -> Iterator[str]:
    """Yield each new document of `files`; a Python file is followed by its long docstrings as one prose document.

    Args:
        files: Files to read.
        seen: Digests of the Python files and prose paragraphs yielded before; extended.
    """

    def is_new(text: str) -> bool:
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        known = digest in seen
        seen.add(digest)
        return not known

    for path in files:
        text = read_document(path)
        if text is None:
            continue
        prose = text
        if path.suffix == ".py":
            if not is_new(text):
                continue
            yield text
            strings = (inspect.cleandoc(string) for string in DOCSTRING.findall(text) if len(string) >= 200)
            prose = "\n\n".join(strings)
        # Licences and inherited docstrings recur with small changes: paragraphs, not files, are what repeats.
        prose = "\n\n".join(part for part in prose.split("\n\n") if is_new(part.strip()))
        if len(prose) >= 200:
            yield prose


def build_corpus(files: list[Path], seen: set[bytes], cap: int, window: int, device: torch.device) -> Corpus:
    """Read `files` into one tensor on `device`, `cap` bytes at most."""
    buffer = bytearray()
    used = 0
    for document in documents(files, seen):
        encoded = document.encode("utf-8")
        if len(buffer) + len(encoded) + 2 > cap:
            break
        buffer += bytes((BOS_BYTE,)) + encoded + bytes((EOS_BYTE,))
        used += 1
    if not buffer:
        raise SystemExit("no usable .py, .rst, .md or .txt file below the corpus folders; name others with --corpus")
    # A corpus smaller than a window repeats itself, so that even a tiny one trains.
    while len(buffer) < 2 * window:
        buffer += buffer
    data = torch.frombuffer(buffer, dtype=torch.uint8).to(device)
    before, first = data[:-window], data[1 : len(data) - window + 1]
    starts = (((before == ord("\n")) & (first != EOS_BYTE)) | (before == BOS_BYTE)).nonzero().squeeze(1) + 1
    return Corpus(data, starts, used)
