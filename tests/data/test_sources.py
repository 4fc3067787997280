"""Rows of files, folders, packaged data sets and the hub."""

from __future__ import annotations

import gzip
import json
import socket
from pathlib import Path

import pytest

from plop_ext.data import load_rows
from plop_ext.errors import InputError, SetupError

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
ROWS = [{"text": "x\u2028y"}, {"text": "z"}]


def write(path: Path, text: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


class TestFiles:
    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("a.jsonl", '{"text": "x\\u2028y"}\n\n{"text": "z"}\n'),
            ("a.ndjson", '{"text": "x\\u2028y"}\r\n{"text": "z"}\r\n'),
            ("a.json", '[{"text": "x\\u2028y"},\n {"text": "z"}]'),
            ("lines.json", '{"text": "x\\u2028y"}\n{"text": "z"}'),
            ("wrapped.json", '{"version": 1, "data": [{"text": "x\\u2028y"}, {"text": "z"}]}'),
            ("wrapped.json", '{\n "data": [\n  {"text": "x\\u2028y"},\n  {"text": "z"}]\n}'),
            ("a.csv", "text\nx\u2028y\nz\n"),
            ("bom.csv", "\ufefftext\r\nx\u2028y\r\nz\r\n"),
            ("a.txt", "x\u2028y\n\n   \nz\n"),
            ("A.TXT", "x\u2028y\r\nz"),
            ("a.tsv", "text\nx\u2028y\nz\n"),
        ],
    )
    def test_formats_agree(self, tmp_path: Path, name: str, text: str) -> None:
        assert load_rows(write(tmp_path / name, text)) == ROWS

    @pytest.mark.parametrize("suffix", [".gz", ".bz2", ".zst", ".lz4"])
    def test_compressed(self, tmp_path: Path, suffix: str) -> None:
        import pyarrow

        lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
        for name in (f"a.jsonl{suffix}", f"A.JSON{suffix.upper()}"):
            with pyarrow.output_stream(
                str(tmp_path / "part"), compression={".zst": "zstd", ".gz": "gzip"}.get(suffix, suffix[1:])
            ) as out:
                out.write(lines)
            (tmp_path / "part").rename(tmp_path / name)
            rows = load_rows(str(tmp_path / name))
            assert rows == ROWS and str(rows.places[1]) == f"{tmp_path / name}, line 2"

    @pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ";"), ("a.csv", "|"), ("a.csv", "\t"), ("a.tsv", "\t")])
    def test_delimiters(self, tmp_path: Path, name: str, delimiter: str) -> None:
        text = f'text{delimiter}label\n"a{delimiter} ""b""\nc"{delimiter}1\nNA, null{delimiter}\n'
        rows = load_rows(write(tmp_path / name, text))
        assert rows == [{"text": f'a{delimiter} "b"\nc', "label": "1"}, {"text": "NA, null", "label": ""}]
        assert [place.number for place in rows.places] == [2, 4]

    def test_csv_with_quotes_and_a_long_field(self, tmp_path: Path) -> None:
        long = "a" * 200_000
        path = write(tmp_path / "a.csv", f'prompt,completion\n"a, ""b""\nc",{long}\n')
        assert load_rows(path) == [{"prompt": 'a, "b"\nc', "completion": long}]

    def test_parquet_and_arrow(self, tmp_path: Path) -> None:
        import datasets
        import pyarrow.parquet

        rows = [{"text": "x", "n": 1, "messages": MESSAGES}, {"text": None, "n": 2, "messages": []}]
        path = tmp_path / "split=train" / "a.parquet"
        path.parent.mkdir()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        assert load_rows(str(path)) == rows
        datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
        [arrow] = (tmp_path / "saved").glob("*.arrow")
        assert load_rows(str(arrow)) == rows

    def test_one_object_is_one_row(self, tmp_path: Path) -> None:
        for text in (json.dumps({"messages": MESSAGES}), json.dumps({"messages": MESSAGES}, indent=1)):
            assert load_rows(write(tmp_path / "a.json", text)) == [{"messages": MESSAGES}]

    @pytest.mark.parametrize(
        ("name", "text", "match"),
        [
            ("a.jsonl", '{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2: not JSON .*; put one object on each line"),
            ("a.jsonl", '{"text": "x"}\n["y"]\n', r"a\.jsonl, line 2: a row must be a JSON object, got list"),
            ("a.jsonl", '{"n": ' + "[" * 100_000, r"a\.jsonl, line 1: not JSON \(maximum recursion"),
            ("a.jsonl", '{"n": ' + "9" * 5000 + "}", r"a\.jsonl, line 1: not JSON \(Exceeds the limit"),
            ("a.json", '[{"text": "x"},\n{"text" "y"}]', r"a\.json, line 2: not JSON"),
            ("a.json", '{\n"data": [\n{"text": }]}', r"a\.json, line 3: not JSON"),
            ("a.json", "[" * 100_000, r"a\.json, line 1: not JSON"),
            ("a.json", '[{"text": "x"}, 3]', r"a\.json, item 2: a row must be a JSON object, got int"),
            ("a.json", '{\n"data": []}', r"a\.json holds no rows"),
            (
                "a.json",
                '{"train": [{"text": "x"}], "test": []}',
                r"several lists of objects \(`train`, `test`\); give",
            ),
            ("a.json", "3", r"a\.json holds a JSON int; give an array of objects"),
            ("a.csv", "a,b\n1,2\n3\n", r"a\.csv, line 3: fewer fields than the 2 of the header; quote"),
            ("a.csv", 'a,b\n"1\n",2\n1,2,3\n', r"a\.csv, line 4: more fields than the 2 of the header; quote"),
            ("a.csv", 'a,b\n1,"2" x\n', r"a\.csv, line 2: not CSV"),
            ("a.csv", 'a,b\n1,"2', r"a\.csv, line 2: not CSV"),
            ("a.parquet", "PAR1 no more", r"a\.parquet is not a readable parquet file"),
            ("a.arrow", "nothing", r"a\.arrow is not a readable Arrow file"),
            ("a.jsonl.gz", "plain", r"a\.jsonl\.gz cannot be read: .*; check the file"),
            (
                "a.jsonl.gz",
                gzip.compress(b'{"text": "x"}', mtime=0)[:12],
                r"a\.jsonl\.gz cannot be read: .*; check the file",
            ),
            ("a.jsonl.zst", "plain", r"a\.jsonl\.zst cannot be read: .*; check the file"),
            (
                "a.xlsx",
                "x",
                r"unknown extension '\.xlsx'; give one of \.jsonl, \.ndjson, \.json, .* compressed \(\.gz",
            ),
            ("a.gz", "x", r"unknown extension '\.gz'"),
            ("a.jsonl", "\n\n", r"a\.jsonl holds no rows"),
            ("a.json", "", r"a\.json holds no rows"),
            ("a.txt", "", r"a\.txt holds no rows"),
            ("a.csv", "text\n", r"a\.csv holds no rows"),
            ("a.txt", b"abc\n\xff", r"a\.txt, line 2: not UTF-8 text \(byte 4 of the file\); convert"),
        ],
    )
    def test_bad_files(self, tmp_path: Path, name: str, text: str | bytes, match: str) -> None:
        with pytest.raises(InputError, match=match) as caught:
            load_rows(write(tmp_path / name, text))
        assert str(caught.value).startswith("`source` ") and "\n" not in str(caught.value)

    @pytest.mark.parametrize("source", ["nowhere.jsonl", "./nowhere", "a/b/c", "~/x/y.json", "", "two words", "a\0b"])
    def test_no_such_file(self, source: str) -> None:
        with pytest.raises(InputError, match="no such file; check the path"):
            load_rows(source)

    @pytest.mark.parametrize("source", ["a" * 300 + ".jsonl", "~no-such-user/a.jsonl"])
    def test_paths_that_the_system_refuses(self, source: str) -> None:
        with pytest.raises(InputError, match=r"cannot be read: .*; check the path"):
            load_rows(source)


class TestFolders:
    def test_shards_and_splits(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        for name, text in (("train-00000-of-00002", "a"), ("train-00001-of-00002", "b"), ("test-00000-of-00001", "c")):
            write(tmp_path / "x[1]" / "data" / f"{name}.jsonl", f'{{"text": "{text}"}}\n')
        write(tmp_path / "x[1]" / "README.md", "# Data")
        rows = load_rows(str(tmp_path / "x[1]"))
        assert rows == [{"text": "a"}, {"text": "b"}] and rows.numbers == [0, 1]
        assert rows.places[1].source.endswith("train-00001-of-00002.jsonl") and rows.places[1].number == 1
        assert load_rows(str(tmp_path / "x[1]"), split="test") == [{"text": "c"}]
        with pytest.raises(InputError, match=r"`split` 'dev': the folder .* has train, test"):
            load_rows(str(tmp_path / "x[1]"), split="dev")
        assert not caplog.records

    def test_missing_shards_and_other_files_are_said(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        write(tmp_path / "train-00001-of-00003.csv", "text\na\n")
        write(tmp_path / "train-00002-of-00003.csv", "text\nb\n")
        write(tmp_path / "train.txt", "notes")
        assert load_rows(str(tmp_path)) == [{"text": "a"}, {"text": "b"}]
        assert "reading the .csv files, and not train.txt" in caplog.text
        assert "holds 2 of the 3 shards of train; reading these" in caplog.text

    def test_saved_data_sets(self, tmp_path: Path) -> None:
        import datasets

        one = datasets.Dataset.from_list([{"text": "a"}])
        one.save_to_disk(str(tmp_path / "one"))
        datasets.DatasetDict(train=one, dev=one).save_to_disk(str(tmp_path / "two"))
        assert load_rows(str(tmp_path / "one")) == load_rows(str(tmp_path / "two"), split="dev") == [{"text": "a"}]
        with pytest.raises(InputError, match=r"`split` 'test': the folder .* has train, dev"):
            load_rows(str(tmp_path / "two"), split="test")
        write(tmp_path / "one" / "state.json", "{")
        with pytest.raises(InputError, match=r"one is not a readable data set \(.*\); save or download it again"):
            load_rows(str(tmp_path / "one"))

    def test_no_data(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"is a folder without data files; put \.jsonl"):
            load_rows(str(tmp_path))
        write(tmp_path / "README.md", "# Data")
        with pytest.raises(InputError, match=r"is a folder without data files; put \.jsonl"):
            load_rows(str(tmp_path))


class TestNames:
    def test_hub_offline_is_one_quick_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import datasets
        import huggingface_hub

        def refuse(*args: object) -> None:
            raise socket.gaierror(-2, "Name or service not known")

        for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(socket, "getaddrinfo", refuse)
        before = (datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE)
        with pytest.raises(SetupError, match=r"`source` 'owner/name' is no local file, .* give the path of a file"):
            load_rows("owner/name")
        assert (datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE) == before

    @pytest.mark.parametrize(("name", "column"), [("arithmetic", "prompt"), ("prose", "text")])
    def test_embedded_splits_share_no_row(self, name: str, column: str) -> None:
        train, test = (load_rows(name, split=split) for split in ("train", "test"))
        assert len(train) > len(test) > 0
        assert not {row[column] for row in train} & {row[column] for row in test}
        assert test == load_rows(name, split="test", seed=5)
        with pytest.raises(InputError, match=f"`split` 'dev': the packaged data set {name} has train and test"):
            load_rows(name, split="dev")

    def test_arithmetic_is_as_long_as_asked_for(self) -> None:
        assert len(load_rows("arithmetic", max_samples=6000)) == 6000


def test_subset_is_seeded_and_keeps_the_order(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "\n".join(map(str, range(100))))
    rows = load_rows(path, max_samples=10, seed=1)
    chosen = [int(row["text"]) for row in rows]
    assert chosen == sorted(chosen) and len(set(chosen)) == 10
    assert chosen == rows.numbers == [place.number - 1 for place in rows.places]
    assert chosen == [int(row["text"]) for row in load_rows(path, max_samples=10, seed=1)]
    assert chosen != [int(row["text"]) for row in load_rows(path, max_samples=10, seed=2)]
    assert len(load_rows(path, max_samples=1000)) == 100
    with pytest.raises(InputError, match="`max_samples` must be at least 1, got 0"):
        load_rows(path, max_samples=0)
