"""What a command hands to a program that called it: JSON on stdout with --json, and an exit code."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from plop_ext.cli.exit_codes import ExitCode
from plop_ext.cli.options import console


@dataclass(frozen=True)
class Result:
    """How a command ended.

    Attributes:
        content: What --json prints. Numbers that are not finite become null, which JSON has no other word for.
        code: The exit code.
    """

    content: Mapping[str, Any] = field(default_factory=dict)
    code: ExitCode = ExitCode.DONE

    def to_json(self) -> str:
        """Return the content as JSON."""
        return json.dumps(_plain(self.content), indent=1, allow_nan=False)


@contextmanager
def stdout_for(results_only: bool) -> Iterator[None]:
    """Move tables and sentences to stderr in the block, if stdout is for JSON or an output file only."""
    before = console.stderr
    console.stderr = before or results_only
    try:
        yield
    finally:
        console.stderr = before


def _plain(value: Any) -> Any:
    """Return a value with the types that JSON has."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value
