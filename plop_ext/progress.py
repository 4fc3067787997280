"""Progress on stderr, so that results on stdout can be piped: a bar on a terminal, otherwise lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

# Without a terminal, a line says at least this often that the run goes on.
LINE_SECONDS = 60.0


class Progress(Protocol):
    """Moves a bar on, or writes lines."""

    def __call__(self, steps: int = 1, note: str = "") -> None:
        """Move on by `steps`; `note` says what is under way."""

    def say(self, text: str) -> None:
        """Write a line of its own."""


@contextmanager
def progress_bar(description: str, total: int | None, enabled: bool = True) -> Iterator[Progress]:
    """Show count, rate and time left while the context lasts.

    On a terminal this is a bar. Elsewhere, as in a log file, it is a line a minute and one at the end.

    Args:
        description: Text before the count.
        total: Number of steps, or None if unknown.
        enabled: False shows nothing.

    Yields:
        The progress to report to.
    """
    if not enabled:
        yield _Silent()
        return
    from rich.console import Console

    console = Console(stderr=True, markup=False, emoji=False)
    if not console.is_terminal:
        lines = _Lines(description, total)
        yield lines
        lines.end()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Bar(*columns, console=console) as bar:
        task = bar.add_task(description, total=total, note="")

        def advance(steps: int, note: str) -> None:
            bar.update(task, advance=steps, note=note)

        yield _OnBar(advance, lambda text: console.print(text, highlight=False, soft_wrap=True))
        # The data may end before the announced total, which is then the number of steps done.
        bar.update(task, total=bar.tasks[task].completed)


def span(seconds: float) -> str:
    """Return a time in words, such as `45 s`, `12 min` or `2 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class _Silent:
    def __call__(self, steps: int = 1, note: str = "") -> None: ...

    def say(self, text: str) -> None: ...


class _OnBar:
    def __init__(self, advance: Callable[[int, str], None], say: Callable[[str], None]) -> None:
        self._advance, self._say = advance, say

    def __call__(self, steps: int = 1, note: str = "") -> None:
        self._advance(steps, note)

    def say(self, text: str) -> None:
        self._say(text)


class _Lines:
    def __init__(self, description: str, total: int | None) -> None:
        self._description, self._total = description, total
        self._done, self._note = 0, ""
        self._started = self._last = time.monotonic()

    def __call__(self, steps: int = 1, note: str = "") -> None:
        self._done += steps
        self._note = note
        if time.monotonic() - self._last >= LINE_SECONDS:
            self.say(self._count())

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
        self._last = time.monotonic()

    def end(self) -> None:
        self._total = self._done
        self.say(self._count())

    def _count(self) -> str:
        of = "" if self._total is None else f"/{self._total}"
        note = f", {self._note}" if self._note else ""
        return f"{self._description} {self._done}{of}, {span(time.monotonic() - self._started)}{note}"
