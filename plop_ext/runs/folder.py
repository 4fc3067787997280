"""The files of a run folder, and what a killed process leaves in it."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from plop_ext.errors import InputError
from plop_ext.files import check_new_folder, make_folder, resolve, writing


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run folder. `result.json` is written last: with it the run is finished.

    Attributes:
        path: The folder.
    """

    path: Path

    @property
    def journal(self) -> Path:
        """Inputs, schedule and finished trials."""
        return self.path / "journal.jsonl"

    @property
    def scores(self) -> Path:
        """The scores, as `plop score` writes them."""
        return self.path / "scores.json"

    @property
    def scoring(self) -> Path:
        """The journal of scoring, until it ends."""
        return self.path / "scores.json.partial"

    @property
    def adapters(self) -> Path:
        """Adapters of the finalists, until the verdict."""
        return self.path / "adapters"

    @property
    def adapter(self) -> Path:
        """Adapter of the winner."""
        return self.path / "adapter"

    @property
    def placement(self) -> Path:
        """Placement of the winner, as `plop place` writes it."""
        return self.path / "placement.json"

    @property
    def report(self) -> Path:
        """The page."""
        return self.path / "report.html"

    @property
    def result(self) -> Path:
        """The result, for programs."""
        return self.path / "result.json"

    def keep_adapter(self, trained: Path | None) -> None:
        """Move the winner's adapter to its place, and delete those of the others. Repeating it changes nothing."""
        with writing(self.path):
            if trained is not None and trained.exists():
                if self.adapter.exists():
                    shutil.rmtree(self.adapter)
                os.replace(trained, self.adapter)
            if self.adapters.exists():
                shutil.rmtree(self.adapters)

    def clean(self) -> None:
        """Delete the temporary files of a process that was killed; only the holder of the journal may."""
        for folder in (self.path, self.adapters):
            for leftover in folder.glob(".plop-*") if folder.exists() else ():
                if leftover.is_dir():
                    shutil.rmtree(leftover, ignore_errors=True)
                else:
                    leftover.unlink(missing_ok=True)


def open_folder(path: str | os.PathLike[str], resume: bool) -> RunFolder:
    """Create a run folder, or with `resume` return an existing one.

    Raises:
        InputError: If the folder holds other files, or a run and `resume` is false.
    """
    check_folder(path, resume)
    return RunFolder(make_folder(path))


def check_folder(path: str | os.PathLike[str], resume: bool) -> None:
    """Check that `open_folder` will accept a folder, without creating it.

    Raises:
        InputError: If it will not.
    """
    with writing(path):
        folder = RunFolder(resolve(path))
        begun = folder.journal.is_file()
    if begun and not resume:
        state = "a finished run" if folder.result.is_file() else "an interrupted run"
        raise InputError(f"`folder` {path} holds {state}; continue it with `resume`, or name a new folder")
    if not begun and folder.path.is_dir() and any(folder.path.iterdir()):
        raise InputError(f"`folder` {path} is not empty and holds no run; name a new folder")
    if not begun and folder.path.parent.is_dir():
        check_new_folder(path, "folder")
