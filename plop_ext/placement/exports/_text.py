"""The forms of exports: comments, YAML, TOML, a call in Python, and words of a command line."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def comment(lines: Iterable[str]) -> str:
    """Return lines of comments, as YAML, TOML, Python and shells read them alike."""
    return "".join(f"# {' '.join(line.split())}\n" for line in lines)


def as_yaml(content: Mapping[str, Any]) -> str:
    """Return YAML with the keys in the order given."""
    import yaml

    return yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True, width=1_000_000)


def as_toml(content: Mapping[str, Any]) -> str:
    """Return TOML."""
    import tomli_w

    return tomli_w.dumps(content)


def as_call(function: str, positional: Sequence[str], keywords: Mapping[str, Any]) -> str:
    """Return a call in Python, with one argument or item of an argument on each line."""
    arguments = [*positional, *(f"{name}={_literal(value)}" for name, value in keywords.items())]
    return f"{function}(\n" + "".join(f"    {argument},\n" for argument in arguments) + ")\n"


def _literal(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list) and value:
        return "[\n" + "".join(f"        {_literal(item)},\n" for item in value) + "    ]"
    if isinstance(value, Mapping) and value:
        items = (f"        {_literal(key)}: {_literal(item)},\n" for key, item in value.items())
        return "{\n" + "".join(items) + "    }"
    return repr(value)


def as_array(name: str, words: Mapping[str, Sequence[str] | str | int | float]) -> str:
    """Return a file that Bash reads with `source`: an array of options with their values."""
    lines = []
    for option, value in words.items():
        values = [value] if isinstance(value, (str, int, float)) else value
        lines.append(f"  {option} {' '.join(shlex.quote(str(item)) for item in values)}\n")
    return f"{name}=(\n{''.join(lines)})\n"


def one_regex(names: Iterable[str]) -> str:
    """Return one regular expression that matches exactly these names where the whole name has to match."""
    return f"(?:{'|'.join(map(re.escape, names))})"
