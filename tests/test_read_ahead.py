"""Weights are read into the file cache in the background, and nothing depends on it."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from plop_ext import read_ahead
from plop_ext.read_ahead import reading_ahead, weight_files


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "plop-read-ahead"]


def wait_for_the_end() -> None:
    for thread in threads():
        thread.join(timeout=10)
    assert not threads()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in (1, 2):
        (tmp_path / f"model-{number}.safetensors").write_bytes(os.urandom(1000))
    (tmp_path / "other.safetensors").write_bytes(b"never read")
    index = '{"weight_map": {"b": "model-2.safetensors", "a": "model-1.safetensors", "c": "model-2.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    return tmp_path


def test_every_byte_of_the_weights_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "_CHUNK", 300)
    monkeypatch.setattr(read_ahead, "_BUFFER", 130)
    monkeypatch.setattr(read_ahead, "_is_cached", lambda *_: False)
    read: list[tuple[str, int, int]] = []
    preadv = os.preadv

    def noted(descriptor: int, buffers: list[Any], offset: int, *flags: int) -> int:
        count = preadv(descriptor, buffers, offset, *flags)
        read.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")).name, offset, count))
        return count

    monkeypatch.setattr(os, "preadv", noted)
    with reading_ahead(folder), reading_ahead(folder):  # the second is that of the loader
        wait_for_the_end()
    parts = [(0, 300), (300, 300), (600, 300), (900, 100)]
    assert sorted(read) == [(f"model-{number}.safetensors", *part) for number in (1, 2) for part in parts]


def test_what_is_in_memory_is_not_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    descriptor = os.open(folder / "model-1.safetensors", os.O_RDONLY)
    try:
        os.read(descriptor, 1000)
        if not read_ahead._is_cached(descriptor, 0, 1000):
            pytest.skip("this file system does not say what is in memory")
        assert read_ahead._is_cached(descriptor, 300, 1)
    finally:
        os.close(descriptor)


def test_the_end_of_the_block_ends_the_reading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "_CHUNK", 1)
    monkeypatch.setattr(read_ahead, "_is_cached", lambda *_: time.sleep(0.01))
    with reading_ahead(folder):
        assert threads()
    wait_for_the_end()


def test_no_more_is_read_than_the_memory_keeps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "_CHUNK", 100)
    monkeypatch.setattr("plop_ext.memory.available_ram", lambda: 1000)
    asked: list[int] = []
    monkeypatch.setattr(read_ahead, "_is_cached", lambda _, start, size: asked.append(start) or True)
    with reading_ahead(folder):
        wait_for_the_end()
    assert sorted(asked) == [0, 100, 200, 300, 400]


@pytest.mark.parametrize(
    "index", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": [1]}}', '{"weight_map": null}']
)
def test_a_damaged_index_is_left_to_the_loader(index: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert weight_files(tmp_path) == []
    with reading_ahead(tmp_path):
        pass


def test_what_is_no_folder_is_left_to_the_loader(tmp_path: Path) -> None:
    for name in ("plop-tiny", tmp_path / "none", "a\0b", "x" * 5000):
        with reading_ahead(name):
            assert not threads()


def test_files_that_are_missing_or_cannot_be_opened_end_the_reading(folder: Path) -> None:
    (folder / "model-1.safetensors").unlink()
    with reading_ahead(folder):
        wait_for_the_end()


def test_one_file_comes_before_its_shards(folder: Path) -> None:
    assert [path.name for path in weight_files(folder)] == ["model-1.safetensors", "model-2.safetensors"]
    (folder / "model.safetensors").write_bytes(b"")
    assert [path.name for path in weight_files(folder)] == ["model.safetensors"]


def test_an_index_that_names_no_path_is_left_to_the_loader(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "x\0y", "b": "\ud800"}}))
    with reading_ahead(tmp_path):
        pass
