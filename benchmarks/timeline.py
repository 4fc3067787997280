"""Runs `plop score` in this process; writes when it imports, loads, scores and writes, and what it has read by then.

python -m benchmarks.timeline OUT BEGAN MODEL DATA -o scores.json ...

BEGAN is the time (`time.time`) at which the process was started. Functions of the package are timed by wrapping them,
from outside: the command itself keeps no clock.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Module, function, and the span that its call is.
_FUNCTIONS = (
    ("plop_ext.models.load", "load_model", "load"),
    ("plop_ext.data.encoding", "encode", "data"),
    ("plop_ext.scoring.score", "score", "score"),
    ("plop_ext.streaming.score", "score_streaming", "stream"),
    ("plop_ext.files", "save_or_rescue", "write"),
)
_SHORTEST_IMPORT = 0.05
_SAMPLE_EVERY = 0.05


class Timeline:
    """Spans and samples of the process, in seconds since it was started.

    Args:
        began: `time.time` at its start.
    """

    def __init__(self, began: float) -> None:
        self._began = began
        self._importing = 0
        self._wrapped: set[str] = set()
        self._import = builtins.__import__
        self.spans: list[tuple[str, float, float]] = []
        self.read: list[tuple[float, int]] = []

    def start(self) -> None:
        """Time from now on."""
        builtins.__import__ = self._timed_import
        threading.Thread(target=self._sample, daemon=True).start()

    def now(self) -> float:
        return time.time() - self._began

    def _timed_import(self, name: str, *rest: Any, **named: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            return self._import(name, *rest, **named)
        started, self._importing = self.now(), self._importing + 1
        try:
            return self._import(name, *rest, **named)
        finally:
            self._importing -= 1
            if self._importing == 0:
                if self.now() - started > _SHORTEST_IMPORT:
                    self.spans.append((f"import {name}", started, self.now()))
                self._wrap()

    def _wrap(self) -> None:
        """Time the functions of what has been imported, wherever their names have been imported to."""
        for module, name, span in _FUNCTIONS:
            if module in self._wrapped or module not in sys.modules or not hasattr(sys.modules[module], name):
                continue
            self._wrapped.add(module)
            original = getattr(sys.modules[module], name)
            timed = self._timed(original, span)
            for other in list(sys.modules.values()):
                if getattr(other, "__name__", "").startswith("plop_ext") and vars(other).get(name) is original:
                    setattr(other, name, timed)

    def _timed(self, function: Callable[..., Any], span: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **named: Any) -> Any:
            started = self.now()
            try:
                return function(*args, **named)
            finally:
                self.spans.append((span, started, self.now()))

        return timed

    def _sample(self) -> None:
        """Note how many bytes the process has read, from files and from the file cache."""
        while True:
            fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
            self.read.append((self.now(), int(fields["rchar"])))
            time.sleep(_SAMPLE_EVERY)


def main() -> None:
    output, began, *arguments = sys.argv[1:]
    timeline = Timeline(float(began))
    timeline.start()
    command = importlib.import_module("plop_ext.cli.main").main
    code = command(["score", *arguments])
    found = {"code": code, "ended": timeline.now(), "spans": timeline.spans, "read": timeline.read}
    Path(output).write_text(json.dumps(found))
    raise SystemExit(code)


if __name__ == "__main__":
    main()
