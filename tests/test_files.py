"""Outputs are whole or absent, and replace nothing that is no file."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from plop_ext import files
from plop_ext.cli.main import main
from plop_ext.errors import InputError, OutputError
from plop_ext.files import check_writable, save_or_rescue, write_json, write_text_atomic
from tests.support.disks import limited_file_size


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


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    real, link, chain = tmp_path / "real.json", tmp_path / "link.json", tmp_path / "chain.json"
    real.write_text("old")
    link.symlink_to("real.json")
    chain.symlink_to(link)
    write_text_atomic(chain, "new")
    assert real.read_text() == "new" and link.is_symlink() and chain.is_symlink()
    (tmp_path / "new.json").symlink_to(tmp_path / "absent.json")
    write_text_atomic(tmp_path / "new.json", "new")
    assert (tmp_path / "absent.json").read_text() == "new"
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OutputError, match="loop`: Too many levels of symbolic links"):
        write_text_atomic(tmp_path / "loop", "x")


def test_devices_pipes_and_descriptors_are_written_through(tmp_path: Path) -> None:
    null, pipe = tmp_path / "null", tmp_path / "pipe"
    null.symlink_to(os.devnull)
    check_writable(null)
    write_text_atomic(null, "x")
    assert null.is_char_device() and not list(tmp_path.glob(".*"))

    os.mkfifo(pipe)
    check_writable(pipe)
    with pytest.raises(OutputError, match="start the reader of the pipe first"):
        write_text_atomic(pipe, "x")
    with ThreadPoolExecutor() as pool:
        reading = pool.submit(pipe.read_text)
        while True:  # the reader may not have opened the pipe yet
            try:
                write_text_atomic(pipe, "x" * 100_000)
                break
            except OutputError:
                time.sleep(0.01)
        assert reading.result(timeout=10) == "x" * 100_000 and pipe.is_fifo()

    (tmp_path / "opened").write_text("before ")
    descriptor = os.open(tmp_path / "opened", os.O_WRONLY | os.O_APPEND)
    try:
        check_writable(f"/dev/fd/{descriptor}")
        write_text_atomic(f"/dev/fd/{descriptor}", "after")
    finally:
        os.close(descriptor)
    assert (tmp_path / "opened").read_text() == "before after"


@pytest.mark.parametrize("name", ["a\0b", 5, None, "~no-such-user/x", "x" * 300])
def test_what_is_no_path_is_one_line(name: Any) -> None:
    for write in (check_writable, lambda path: write_text_atomic(path, "text")):
        with pytest.raises(OutputError):
            write(name)


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No space left on device; free some space"):
        write_text_atomic("/dev/full", "x")
    old = tmp_path / "old.json"
    old.write_text("old")
    with limited_file_size(1000), pytest.raises(OutputError, match="File too large; free some space"):
        write_text_atomic(old, "x" * 2000)
    assert old.read_text() == "old" and list(tmp_path.iterdir()) == [old]


def test_a_result_that_cannot_be_written_is_saved_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("HOME", str(home))  # which does not exist
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    with pytest.raises(OutputError, match=r"No space left .* saved as `.*` instead") as raised:
        save_or_rescue(lambda path: write_text_atomic(path, "result"), "/dev/full")
    (spare,) = temporary.rglob("full")
    assert str(spare) in str(raised.value) and spare.read_text() == "result"


def test_only_results_of_the_same_kind_are_replaced_unasked(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"format": "plop_ext.scores", "version": 1})
    write_json(path, {"format": "plop_ext.scores", "version": 2})
    assert json.loads(path.read_text())["version"] == 2
    for content in (path.read_text(), "my data"):
        path.write_text(content)
        with pytest.raises(OutputError, match="is another kind of file"):
            write_json(path, {"format": "plop_ext.placement"})
        assert path.read_text() == content
    write_json(path, {"format": "plop_ext.placement"}, overwrite=True)
    assert "placement" in path.read_text()


def test_half_a_character_is_written_as_an_escape(tmp_path: Path) -> None:
    write_text_atomic(tmp_path / "x", "a\ud800b")
    assert (tmp_path / "x").read_text() == "a\\ud800b"


def test_a_replaced_file_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.touch(0o600)
    write_text_atomic(path, "x")
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("text", ['{"format": "x", "version": 1, "n": [1, 0.1, "\\u00e9"]}', "{", '{"n": NaN}'])
def test_files_read_the_same_without_orjson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    found = []
    for module in (files.orjson, None):
        monkeypatch.setattr(files, "orjson", module)
        try:
            found.append(repr(files.read_json(path, "x", 1, "a test")))
        except InputError as error:
            found.append(str(error))
    assert found[0] == found[1]


def test_a_device_is_not_read_for_ever(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="`/dev/zero`: it is a device, not a file; name a file"):
        files.read_json("/dev/zero", "x", 1, "a test")
    assert main(["place", "s.json", "--config", "/dev/full"]) == 2
    assert "cannot read `/dev/full`: it is a device, not a file; name a TOML file" in capsys.readouterr().err


def test_a_pipe_is_read_to_its_end_and_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="it is a pipe to which nothing writes"):
        files.read_whole(pipe)
    reading, writing = os.pipe()

    def write() -> None:
        with os.fdopen(writing, "wb") as file:
            for part in (b"ab", b"c" * 100_000):  # more than a pipe holds
                time.sleep(0.1)
                file.write(part)
                file.flush()

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(write)
        assert files.read_whole(f"/dev/fd/{reading}") == b"ab" + b"c" * 100_000
        done.result()
    os.close(reading)
