"""Atomic writes of files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from plop_ext.errors import InputError
from plop_ext.files import check_writable, write_text_atomic


@pytest.mark.parametrize(
    ("name", "message"),
    [(".", "is a folder"), ("missing/s.json", "No such file"), ("file/s.json", "Not a directory")],
)
def test_what_cannot_be_written_is_known_before_it_is(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file").touch()
    for write in (check_writable, lambda path: write_text_atomic(path, "text")):
        with pytest.raises(InputError, match=message):
            write(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_check_leaves_nothing_and_an_old_file_alone(tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    old.write_text("old")
    check_writable(old)
    check_writable(tmp_path / "new.json")
    assert list(tmp_path.iterdir()) == [old] and old.read_text() == "old"


def test_a_file_gets_the_permissions_of_any_other(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        write_text_atomic(tmp_path / "s.json", "text")
    finally:
        os.umask(umask)
    assert (tmp_path / "s.json").stat().st_mode & 0o777 == 0o640
