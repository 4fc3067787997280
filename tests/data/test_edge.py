"""Whatever a data file holds, it is read, or one line says what is wrong with it and where."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from plop_ext.data import encode, load_rows
from plop_ext.data.formats import COLUMNS
from plop_ext.data.readers import READERS
from plop_ext.errors import InputError
from tests.support.chat_templates import FAMILIES

KEYS = ("role", "content", "from", "value", "tool_calls", "function", "name", "arguments", "type", "text")
SCALARS = (None, True, 0, -5, 2**70, 1.5, float("nan"), "", "a", "\ud83d", "<|im_start|>", "[", "[{}]", "\0\u2028")
ROLES = ("user", "assistant", "tool", "system")


def value(random: Random, depth: int = 0) -> Any:
    kind = random.random() if depth < 4 else 0
    if kind < 0.4:
        return random.choice(SCALARS)
    if kind < 0.6:
        return [value(random, depth + 1) for _ in range(random.randint(0, 3))]
    chosen = random.choices(KEYS, k=random.randint(0, 4))
    return {key: random.choice(ROLES) if key in ("role", "from") else value(random, depth + 1) for key in chosen}


def rows(random: Random) -> list[dict[str, Any]]:
    columns = random.sample(sorted(COLUMNS), random.randint(1, 4))
    return [{column: value(random) for column in columns} for _ in range(random.randint(1, 3))]


def content(random: Random, kind: str) -> bytes:
    if kind == "bytes":
        return bytes(random.choices(range(256), k=random.randint(0, 60)))
    if kind == "text":
        return "".join(random.choices("{}[]\",:;\n\r\t|ab\\u1 '", k=random.randint(0, 60))).encode()
    if kind == "lines":
        return "\n".join(map(json.dumps, rows(random))).encode()
    return json.dumps({"data": rows(random)}).encode()


@pytest.mark.parametrize("kind", ["bytes", "text", "lines", "wrapped"])
def test_any_file_is_read_or_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    random = Random(kind)
    tokenizer = FAMILIES["qwen3"].tokenizer()
    extensions = [*READERS, ".jsonl.gz", ".csv.zst", ".parquet.bz2", ""] if kind in ("bytes", "text") else [".json"]
    for _ in range(200):
        path = tmp_path / f"a{random.choice(extensions)}"
        path.write_bytes(content(random, kind))
        try:
            encode(load_rows(str(path)), tokenizer)
        except InputError as error:
            assert "\n" not in str(error) and (";" in str(error) or ": " in str(error))
